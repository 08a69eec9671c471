"""The picture that accelerate_resnet.py draws: photographs, feature maps, pooling, and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from accelerate_measure import pooling_kinds
from style import AFTER, BEFORE, FAINT, STYLE, THIRD

COLOURS = (BEFORE, AFTER, THIRD)
#: Milliseconds by label and then by group; None where there is nothing to show.
Bars = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Chart:
    """Horizontal bars: in each of ``groups``, one for each label of ``bars``, the first to compare with."""

    title: str
    groups: Sequence[str]
    bars: Bars


def draw(
    path: Path, title: str, photos: Sequence[tuple[Image.Image, str]], stem: Tensor, charts: Sequence[Chart]
) -> None:
    """Write the picture: a row a photograph, and the times below.

    Args:
        photos: what the model saw of those to draw, and what it took each for.
        stem: the stem's feature maps of the whole batch, ``(N, C, H, W)``, the photographs' first.
    """
    rows = len(photos)
    # The channel with most contrast shows most.
    channel = int(stem[:rows].std(dim=(2, 3)).mean(0).argmax())
    bars = max(sum(len(chart.groups) for _ in chart.bars) for chart in charts)
    heights = [2.3 * rows + 0.7, 0.26 * bars + 1.1]
    with rc_context(STYLE), torch.no_grad():
        figure = Figure(figsize=(14, sum(heights)), layout="constrained")
        top, bottom = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
        axes = top.subplots(rows, 6, squeeze=False)
        for row, (photo, label) in enumerate(photos):
            draw_maps(axes[row], photo, label, stem[row : row + 1], channel, heads=row == 0)
        top.suptitle(title, x=0.01, ha="left", weight="bold", size=13)
        for axis, chart in zip(bottom.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            draw_bars(axis, chart)
        figure.savefig(path, dpi=120, facecolor="white")


def draw_maps(
    axes: Sequence[Any], photo: Image.Image, label: str, maps: Tensor, channel: int, heads: bool
) -> None:
    """Draw a photograph, a channel of its ``(1, C, H, W)`` feature maps, and that channel pooled.

    A color means the same value throughout, but for the L2 norm, whose scale is three times as long: that
    is the norm of nine ones.
    """
    brightest = float(maps[0, channel].max())
    axes[0].imshow(photo)
    if label:
        box = {"facecolor": "black", "alpha": 0.6, "edgecolor": "none", "pad": 2}
        style: dict[str, Any] = {"color": "white", "size": 8, "bbox": box, "parse_math": False}
        axes[0].text(0.02, 0.02, label, transform=axes[0].transAxes, **style)
    axes[1].imshow(maps[0, channel].numpy(), cmap="magma", vmin=0, vmax=brightest)
    titles = ["photograph", f"stem, channel {channel}\n{maps.shape[2]}x{maps.shape[3]}"]
    for axis, (kind, _, ours) in zip(axes[2:], pooling_kinds(), strict=True):
        pooled = ours(maps)[0]
        height, width = pooled.shape[1:]
        shown, longest = pooled[channel], brightest * (3 if kind == "L2" else 1)
        title = f"{kind}\n{height}x{width}"
        if height * width == 1:
            # One number a channel: all channels, as a square, with this one framed.
            side = int(len(pooled) ** 0.5)
            shown, longest = pooled[: side * side, 0, 0].reshape(side, side), None
            y, x = divmod(channel, side)
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#22d3ee", linewidth=2))
            title = f"{kind}\n1x1, {side * side} channels"
        axis.imshow(shown.numpy(), cmap="magma", vmin=0, vmax=longest)
        titles.append(title)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_axis_off()
        if heads:
            axis.set_title(title, size=10)


def draw_bars(axis: Any, chart: Chart) -> None:
    """Draw ``chart``, each bar with its milliseconds and how many times less than the first that is."""
    thick = 0.8 / len(chart.bars)
    first = next(iter(chart.bars.values()))
    longest = max(ms for times in chart.bars.values() for ms in times if ms is not None)
    for which, ((label, times), color) in enumerate(zip(chart.bars.items(), COLOURS, strict=False)):
        for group, (ms, before) in enumerate(zip(times, first, strict=True)):
            if ms is None:
                continue
            place = group - 0.4 + (which + 0.5) * thick
            axis.barh(place, ms, 0.94 * thick, color=color, label=None if group else label)
            text = f"{ms:.3g} ms" if ms < 1000 else f"{ms:.0f} ms"
            if which and before is not None:
                ratio = before / ms
                text += f"  {ratio:.{0 if ratio >= 9.95 else 1 if ratio >= 1.95 else 2}f}x"
            style: dict[str, Any] = {"va": "center", "size": 9, "weight": "bold" if which else "normal"}
            axis.annotate(text, (ms, place), xytext=(4, 0), textcoords="offset points", **style)
    axis.set_yticks(range(len(chart.groups)), list(chart.groups))
    axis.set_ylim(len(chart.groups) - 0.5, -0.5)
    # Room for what is written beside the longest bar.
    axis.set_xlim(0, 1.45 * longest)
    axis.set_title(chart.title, loc="left", size=11)
    axis.grid(axis="x", color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(chart.bars), frameon=False)
