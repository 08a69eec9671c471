"""A small network with convolutions by Winograd, its gradients, and which of our kernels made them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from pooling_ext.ops import conv_choice, conv_speeds

#: Operators of Winograd's kernels in a training step.
STATS, FORWARD, INPUT_GRAD, WEIGHT_GRAD = (
    "winograd_conv_stats",
    "winograd_conv",
    "winograd_input_grad",
    "winograd_weight_grad",
)
T = TypeVar("T")


@contextmanager
def preferring_ours(preferred: bool = True):
    """Our kernels do what they can, on whatever processor, though PyTorch's may be faster."""
    before = conv_speeds.speedup, conv_speeds.weights_count, conv_choice.HAS_AMX
    if preferred:
        conv_speeds.speedup, conv_speeds.weights_count, conv_choice.HAS_AMX = lambda *_: None, False, False
    try:
        yield
    finally:
        conv_speeds.speedup, conv_speeds.weights_count, conv_choice.HAS_AMX = before


class Block(nn.Module):
    """A ResNet's basic block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + x)


class ResNet(nn.Module):
    """Small: a stem, two blocks around a convolution that has no batch norm, and a head."""

    #: Convolutions that are Winograd's, and of those the ones before a batch norm.
    WINOGRAD, NORMED = 5, 4

    def __init__(self, channels: int = 32, colors: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(colors, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.block1 = Block(channels)
        self.between = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.block2 = Block(2 * channels)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, classes))

    def body(self, x: Tensor) -> Tensor:
        return self.block2(self.pool(self.between(self.block1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


def batch(size: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images and their classes: the same for every call of one size."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, 20, 20, generator=generator).to(dtype), torch.arange(size) % 10


def gradients(
    model: nn.Module, images: Tensor, labels: Tensor, call: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Of the parameters and of the images (""), by ``call`` in place of the model's own."""
    model.zero_grad()
    leaf = images.detach().clone().requires_grad_()
    output = (model if call is None else call)(leaf)
    F.cross_entropy(output.float() if output.dtype == torch.bfloat16 else output, labels).backward()
    assert leaf.grad is not None
    return {"": leaf.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def in_float64(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The same for a copy in float64."""
    return gradients(copy.deepcopy(model).double(), images.double(), labels)


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By how much each gradient is off, relative to its norm."""
    assert found.keys() == expected.keys()
    return {
        name: float((found[name].double() - right.double()).norm() / right.double().norm())
        for name, right in expected.items()
    }


def ran(call: Callable[[], T]) -> tuple[T, Counter[str]]:
    """What ``call`` gives, and how often each of our operators ran, also in compiled graphs and backward."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = call()
    events: Any = profiler.events()
    prefix = "pooling_ext::"
    return result, Counter(e.name.removeprefix(prefix) for e in events if e.name.startswith(prefix))


def assert_trained_by_winograd(kernels: dict[str, int], steps: int = 1) -> None:
    """As many calls as a step has, neither more nor fewer."""
    assert kernels[STATS] == ResNet.NORMED * steps
    assert kernels[FORWARD] == (ResNet.WINOGRAD - ResNet.NORMED) * steps
    assert kernels[INPUT_GRAD] == kernels[WEIGHT_GRAD] == ResNet.WINOGRAD * steps
