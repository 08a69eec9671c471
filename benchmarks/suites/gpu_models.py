"""ResNet-50 on a GPU: a step of training, and inference, against eager PyTorch and torch.compile."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pooling_ext
from pooling_ext.backends import autotune
from pooling_ext.ops import conv_autotune

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
    chosen = dict(conv_autotune._chosen)
    os.environ.update(wanted)
    conv_autotune._chosen.clear()
    autotune.forget()
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            os.environ.update({} if value is None else {name: value})
        conv_autotune._chosen.clear()
        conv_autotune._chosen.update(chosen)
        autotune.forget()


@dataclass(frozen=True)
class Sweep:
    """What a model is measured with.

    Attributes:
        found: where times go.
        budget: seconds for each rival.
        modes: of torch.compile, by :data:`MODES`' names.
    """

    found: Run
    dtype: str
    batches: Sequence[int]
    budget: float
    device: str
    modes: Sequence[str]

    def measure(
        self,
        what: str,
        model: nn.Module,
        rivals: Callable[[Tensor], dict[str, Callable[[], Any]]],
        wrap: Callable[[nn.Module, Tensor], Callable[[], Any]],
    ) -> None:
        """For each batch time ``rivals`` and torch.compile's of ``model``, which ``wrap`` makes a call."""
        for batch in self.batches:
            images = make_images(batch, self.device)
            calls, compile_s = rivals(images), {}
            for rival in self.modes:
                torch._dynamo.reset()
                compiled = torch.compile(copy.deepcopy(model), mode=MODES[rival], dynamic=False)
                calls[rival] = wrap(compiled, images)  # type: ignore[arg-type]
                compile_s[rival] = first_call(calls[rival])
            times = measure(calls, self.budget * len(calls), self.device, capture=False)
            for rival, (time, _) in times.items():
                seconds = compile_s.get(rival)
                entry = Entry(what, self.dtype, "NHWC", batch, rival, time.ms, time.spread, None, seconds)
                self.found.entries.append(entry)


def measure_training(sweep: Sweep, name: str) -> None:
    """One step of SGD: eager, patched and torch.compile; bfloat16 is autocast's."""
    dtype, device = sweep.dtype, sweep.device
    model = make_model(name, device).train()
    patched = copy.deepcopy(model)
    pooling_ext.patch(patched)
    few = make_images(CHECKED, device)
    losses = [float(Trainer(copy.deepcopy(net), few, dtype).loss()) for net in (model, patched)]
    if not abs(losses[1] - losses[0]) <= 2e-2 * abs(losses[0]):
        raise AssertionError(f"{name}: loss {losses[1]} where eager's is {losses[0]}")
    ours = UNTUNED if os.environ.get("POOLING_EXT_TUNE") == "0" else PATCHED

    def rivals(images: Tensor) -> dict[str, Callable[[], Any]]:
        calls: dict[str, Callable[[], Any]] = {
            EAGER: Trainer(model, images, dtype),
            ours: Trainer(patched, images, dtype),
        }
        if device == "cuda" and len(images) <= SMALL and ours == PATCHED:
            trainer = Trainer(copy.deepcopy(patched), images, dtype)
            calls[CAPTURED] = pooling_ext.capture_step(trainer.loss, trainer.model, trainer.optimizer)
        return calls

    sweep.measure(f"{name} {TRAINING}", model, rivals, lambda net, images: Trainer(net, images, dtype))


def measure_inference(sweep: Sweep, name: str) -> None:
    """Eager, frozen and torch.compile."""
    dtype = DTYPES[sweep.dtype]
    model = make_model(name, sweep.device).eval().to(dtype)
    few = make_images(CHECKED, sweep.device).to(dtype)
    frozen = pooling_ext.freeze(model, few)

    def rivals(images: Tensor) -> dict[str, Callable[[], Any]]:
        images = images.to(dtype)
        return {EAGER: partial(model, images), FROZEN: partial(frozen, images)}

    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(few.double())
        errors = [float((net(few).double() - exact).norm() / exact.norm()) for net in (model, frozen)]
        if not errors[1] <= max(SLACK * errors[0], ALLOWED[sweep.dtype]):
            raise AssertionError(f"{name}: off by {errors[1]:.2g}, eager by {errors[0]:.2g}")
        sweep.measure(
            f"{name} {INFERENCE}", model, rivals, lambda net, images: partial(net, images.to(dtype))
        )
