"""ResNet-50 on a GPU: a step of training, and inference, against eager PyTorch and torch.compile."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pooling_ext
from pooling_ext import tuning
from pooling_ext.ops import tuned_conv

from ..harness.gpu_timing import measure
from ..harness.suite import DTYPES
from ..reports.gpu_report import AUTOTUNED, CAPTURED, COMPILED, EAGER, FROZEN, PATCHED, UNTUNED, Entry, Run
from .gpu_operators import ALLOWED, CHECKED, first_call
from .model_training import Trainer

#: The models' largest error, relative to eager's own.
SLACK = 5
#: Sides of an image; fewer in a dry run.
SIZE = 224
#: Batches up to which a captured step is a rival: there Python decides.
SMALL = 64
#: torch.compile's modes.
MODES: dict[str, str | None] = {COMPILED: None, AUTOTUNED: "max-autotune"}

TRAINING, INFERENCE = "training step", "inference"


def make_model(name: str, device: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.get_model(name).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_images(batch: int, device: str) -> Tensor:
    images = torch.randn(batch, 3, SIZE, SIZE, device=device)
    return images.contiguous(memory_format=torch.channels_last)


@contextmanager
def untuned() -> Iterator[None]:
    """Convolutions in PyTorch's way, whatever is remembered of faster ones."""
    wanted = {"POOLING_EXT_TUNE": "0", "POOLING_EXT_TUNING_FILE": os.devnull}
    before = {name: os.environ.get(name) for name in wanted}
    chosen = dict(tuned_conv._chosen)
    os.environ.update(wanted)
    tuned_conv._chosen.clear()
    tuning.forget()
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            os.environ.update({} if value is None else {name: value})
        tuned_conv._chosen.clear()
        tuned_conv._chosen.update(chosen)
        tuning.forget()


def measure_training(
    found: Run,
    name: str,
    dtype: str,
    batches: Sequence[int],
    budget: float,
    device: str,
    modes: Sequence[str],
) -> None:
    """One step of SGD: eager, patched and torch.compile in ``modes``; bfloat16 is autocast's."""
    model = make_model(name, device).train()
    patched = copy.deepcopy(model)
    pooling_ext.patch(patched)
    few = make_images(CHECKED, device)
    losses = [float(Trainer(copy.deepcopy(net), few, dtype).loss()) for net in (model, patched)]
    if not abs(losses[1] - losses[0]) <= 2e-2 * abs(losses[0]):
        raise AssertionError(f"{name}: loss {losses[1]} where eager's is {losses[0]}")
    for batch in batches:
        images = make_images(batch, device)
        ours = UNTUNED if os.environ.get("POOLING_EXT_TUNE") == "0" else PATCHED
        rivals: dict[str, Callable[[], Any]] = {
            EAGER: Trainer(model, images, dtype),
            ours: Trainer(patched, images, dtype),
        }
        if device == "cuda" and batch <= SMALL and ours == PATCHED:
            trainer = Trainer(copy.deepcopy(patched), images, dtype)
            rivals[CAPTURED] = pooling_ext.capture_step(trainer.loss, trainer.model, trainer.optimizer)
        _finish(found, f"{name} {TRAINING}", dtype, batch, rivals,
                lambda net: Trainer(net, images, dtype), model, budget, device, modes)  # fmt: skip  # noqa: B023


def measure_inference(
    found: Run,
    name: str,
    dtype: str,
    batches: Sequence[int],
    budget: float,
    device: str,
    modes: Sequence[str],
) -> None:
    """Eager, frozen and torch.compile in ``modes``."""
    model = make_model(name, device).eval().to(DTYPES[dtype])
    few = make_images(CHECKED, device).to(DTYPES[dtype])
    frozen = pooling_ext.freeze(model, few)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(few.double())
        errors = [float((net(few).double() - exact).norm() / exact.norm()) for net in (model, frozen)]
        if not errors[1] <= max(SLACK * errors[0], ALLOWED[dtype]):
            raise AssertionError(f"{name}: off by {errors[1]:.2g}, eager by {errors[0]:.2g}")
        for batch in batches:
            images = make_images(batch, device).to(DTYPES[dtype])
            rivals: dict[str, Callable[[], Any]] = {
                EAGER: partial(model, images),
                FROZEN: partial(frozen, images),
            }
            _finish(found, f"{name} {INFERENCE}", dtype, batch, rivals,
                    lambda net: partial(net, images), model, budget, device, modes)  # fmt: skip  # noqa: B023


def _finish(
    found: Run,
    what: str,
    dtype: str,
    batch: int,
    rivals: dict[str, Callable[[], Any]],
    wrap: Callable[[nn.Module], Callable[[], Any]],
    model: nn.Module,
    budget: float,
    device: str,
    modes: Sequence[str],
) -> None:
    """Add torch.compile to ``rivals``, time all and note their times."""
    compile_s: dict[str, float] = {}
    for rival in modes:
        torch._dynamo.reset()
        call = wrap(torch.compile(copy.deepcopy(model), mode=MODES[rival], dynamic=False))  # type: ignore[arg-type]
        compile_s[rival] = first_call(call)
        rivals[rival] = call
    for rival, (time, _) in measure(rivals, budget * len(rivals), device, capture=False).items():
        entry = Entry(what, dtype, "NHWC", batch, rival, time.ms, time.spread, None, compile_s.get(rival))
        found.entries.append(entry)
