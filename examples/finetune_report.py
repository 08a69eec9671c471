"""What finetune.py shows at its end: the curves, a grid of predictions, and the throughput."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pooling_ext
from finetune_data import Splits, displayed
from finetune_model import STAGES, loss_of
from finetune_training import Epoch, Options, autocast, place
from style import AFTER, BEFORE, FAINT, STYLE, speedup
from timing import in_turn

RIGHT, WRONG = "#2b8a3e", "#c92a2a"


def draw_curves(path: Path, history: Sequence[Epoch], title: str) -> None:
    """Write accuracy and loss over the epochs, in training and validation, as a PNG."""
    numbers = range(1, len(history) + 1)
    kinds = (("accuracy", "lower right"), ("loss", "upper right"))
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4), layout="constrained")
        for axis, (kind, corner) in zip(figure.subplots(1, 2), kinds, strict=True):
            for split, color in (("train", BEFORE), ("valid", AFTER)):
                values = [getattr(epoch, f"{split}_{kind}") for epoch in history]
                axis.plot(numbers, values, color=color, label=split, marker="o", markersize=4)
            frozen = sum(epoch.stage == STAGES[0] for epoch in history)
            if 0 < frozen < len(history):
                axis.axvline(frozen + 0.5, color=FAINT, linestyle="--", label="all layers from here")
            axis.set_title(kind, loc="left", size=11)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(axis="y", color=FAINT, linewidth=0.8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(loc=corner, framealpha=1, edgecolor="white")
            if kind == "accuracy":
                axis.yaxis.set_major_formatter(PercentFormatter(1))
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=13)
        figure.savefig(path, dpi=120, facecolor="white")


def draw_predictions(
    path: Path, model: nn.Module, splits: Splits, options: Options, device: torch.device, title: str
) -> None:
    """Write random validation images as a PNG, each under its predicted class: green if right, else red."""
    columns, most = 8, 32
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(splits.valid), generator=generator)[:most].tolist()
    images, targets = zip(*(splits.valid[place] for place in chosen), strict=True)
    batch = place(torch.stack(images), device, options.channels_last)
    model.eval()
    with torch.no_grad(), autocast(device, options.bf16):
        predictions = model(batch).argmax(1).tolist()
    rows = -(-len(chosen) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(1.6 * columns, 1.9 * rows + 0.5), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes:
            axis.set_axis_off()
        for axis, image, target, prediction in zip(axes, images, targets, predictions, strict=False):
            axis.imshow(displayed(image).numpy())
            right = target == prediction
            label = splits.names[prediction]
            if not right:
                label += f"\nnot {splits.names[target]}"
            axis.set_title(label, size=9, color=RIGHT if right else WRONG, parse_math=False)
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=13)
        figure.savefig(path, dpi=120, facecolor="white")


def throughput(
    model: nn.Module, images: Tensor, targets: Tensor, options: Options, seconds: float
) -> dict[str, tuple[float, float]]:
    """Images a second of ``model`` without and with the patch, in training and in inference.

    Both work on the same batch and take turns, each of the two measurements for about ``seconds``.

    Args:
        model: not patched. It is left as it was.
        images, targets: a batch, ``(N, 3, H, W)`` and ``(N,)``, placed already.
    """
    contestants = [copy.deepcopy(model).requires_grad_(True) for _ in range(2)]
    pooling_ext.patch(contestants[1])
    steps: list[Callable[[], Any]] = []
    for contestant in contestants:
        optimizer = torch.optim.Adam(contestant.parameters(), lr=options.lr[STAGES[-1]])
        steps.append(partial(_step, contestant, images, targets, optimizer, options.bf16))
        contestant.train()
    rates = {"training": _rates(steps, images, seconds)}
    for contestant in contestants:
        contestant.eval()
    with torch.inference_mode():
        calls = [partial(_infer, contestant, images, options.bf16) for contestant in contestants]
        rates["inference"] = _rates(calls, images, seconds)
    return rates


def _step(
    model: nn.Module, images: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer, bf16: bool
) -> None:
    with autocast(images.device, bf16):
        outputs = model(images)
    loss, _ = loss_of(outputs, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def _infer(model: nn.Module, images: Tensor, bf16: bool) -> None:
    with autocast(images.device, bf16):
        model(images)


def _rates(calls: Sequence[Callable[[], Any]], images: Tensor, seconds: float) -> tuple[float, float]:
    before, after = (1e3 * len(images) / ms for ms in in_turn(calls, seconds))
    return before, after


def print_throughput(console: Console, rates: dict[str, tuple[float, float]], title: str) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for header in ("images a second", "unpatched", "patched", "speed-up"):
        table.add_column(header, justify="left" if header == "images a second" else "right")
    for what, (before, after) in rates.items():
        table.add_row(what, f"{before:.1f}", f"{after:.1f}", speedup(1 / before, 1 / after))
    console.print(table)
