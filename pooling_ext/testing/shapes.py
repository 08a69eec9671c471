"""Named pooling cases, taken from the networks people run; tests and benchmarks share them.

Each :class:`PoolCase` is data: the function's name, the input's shape and the arguments. Where a name
such as ``vgg-adaptive`` stands for a layer that is an identity at the network's usual input size,
the case has the size of a larger image, and ``...-identity`` is the usual one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch.nn.functional
from torch import Tensor

import pooling_ext.functional


@dataclass(frozen=True)
class PoolCase:
    """One pooling call.

    Attributes:
        name: unique, in kebab case; usable as a test id.
        op: a function of :mod:`pooling_ext.functional`; all but the global ones are torch's too.
        shape: the input's, ``(N, C, *spatial)``.
        kwargs: the function's other arguments.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def rank(self) -> int:
        """How many spatial axes the input has."""
        return len(self.shape) - 2

    @property
    def kind(self) -> str:
        """What is computed: "max", "avg" or "lp"."""
        return next(kind for kind in ("max", "avg", "lp") if kind in self.op)

    def ours(self) -> Callable[[Tensor], Tensor]:
        """The function of one input that pooling_ext offers."""
        return partial(getattr(pooling_ext.functional, self.op), **self.kwargs)

    def torch(self) -> Callable[[Tensor], Tensor]:
        """The function of one input that a PyTorch user writes for the same thing."""
        name, kwargs = self.op, dict(self.kwargs)
        if name.startswith("global_"):
            name = name.removeprefix("global_")
            if self.kind == "lp":
                kwargs["kernel_size"] = self.shape[2:]
            else:
                name, kwargs["output_size"] = f"adaptive_{name}", 1
        return partial(getattr(torch.nn.functional, name), **kwargs)

    def resized(self, batch: int, channels: int) -> PoolCase:
        """The same call on ``batch`` images of ``channels`` channels; tests use a few."""
        return dataclasses.replace(self, shape=(batch, channels, *self.shape[2:]))

    def __str__(self) -> str:
        return self.name


#: 2-d max pooling.
MAX = (
    PoolCase("resnet-stem", "max_pool2d", (16, 64, 112, 112), {"kernel_size": 3, "stride": 2, "padding": 1}),
    PoolCase("vgg", "max_pool2d", (8, 64, 224, 224), {"kernel_size": 2, "stride": 2}),
    PoolCase("vgg-deep", "max_pool2d", (16, 512, 14, 14), {"kernel_size": 2, "stride": 2}),
    PoolCase("alexnet", "max_pool2d", (16, 64, 55, 55), {"kernel_size": 3, "stride": 2}),
    PoolCase(
        "squeezenet-ceil", "max_pool2d", (16, 256, 54, 54), {"kernel_size": 3, "stride": 2, "ceil_mode": True}
    ),
    PoolCase("googlenet", "max_pool2d", (16, 192, 28, 28), {"kernel_size": 3, "stride": 1, "padding": 1}),
    PoolCase("yolo-sppf", "max_pool2d", (16, 256, 20, 20), {"kernel_size": 5, "stride": 1, "padding": 2}),
    PoolCase("yolo-spp", "max_pool2d", (4, 256, 20, 20), {"kernel_size": 13, "stride": 1, "padding": 6}),
)

#: 2-d average and Lp pooling.
AVERAGE = (
    PoolCase(
        "resnet-stem-avg", "avg_pool2d", (16, 64, 112, 112), {"kernel_size": 3, "stride": 2, "padding": 1}
    ),
    PoolCase("inception-avg", "avg_pool2d", (16, 192, 35, 35), {"kernel_size": 3, "stride": 1, "padding": 1}),
    PoolCase("inception-aux", "avg_pool2d", (16, 768, 17, 17), {"kernel_size": 5, "stride": 3}),
    PoolCase("densenet-transition", "avg_pool2d", (16, 128, 56, 56), {"kernel_size": 2, "stride": 2}),
    PoolCase(
        "resnet-d-shortcut",
        "avg_pool2d",
        (16, 256, 55, 55),
        {"kernel_size": 2, "stride": 2, "ceil_mode": True, "count_include_pad": False},
    ),
    PoolCase(
        "poolformer",
        "avg_pool2d",
        (16, 64, 56, 56),
        {"kernel_size": 3, "stride": 1, "padding": 1, "count_include_pad": False},
    ),
    PoolCase("lp2", "lp_pool2d", (16, 64, 56, 56), {"norm_type": 2, "kernel_size": 2}),
)

#: 2-d windows whose size follows from the output's.
ADAPTIVE = (
    PoolCase("alexnet-adaptive", "adaptive_avg_pool2d", (16, 256, 13, 13), {"output_size": 6}),
    PoolCase("alexnet-adaptive-identity", "adaptive_avg_pool2d", (16, 256, 6, 6), {"output_size": 6}),
    PoolCase("vgg-adaptive", "adaptive_avg_pool2d", (8, 512, 14, 14), {"output_size": 7}),
    PoolCase("vgg-adaptive-identity", "adaptive_avg_pool2d", (8, 512, 7, 7), {"output_size": 7}),
    PoolCase("spp-adaptive-max", "adaptive_max_pool2d", (16, 256, 13, 13), {"output_size": 4}),
    PoolCase("resnet-gap", "adaptive_avg_pool2d", (16, 2048, 7, 7), {"output_size": 1}),
    PoolCase("large-gap", "global_avg_pool2d", (16, 64, 112, 112)),
    PoolCase("global-max", "global_max_pool2d", (16, 512, 14, 14)),
    PoolCase("global-lp2", "global_lp_pool2d", (16, 512, 14, 14), {"norm_type": 2}),
)

#: One and three spatial axes.
OTHER_RANKS = (
    PoolCase("audio-max-1d", "max_pool1d", (32, 64, 4000), {"kernel_size": 4}),
    PoolCase("audio-avg-1d", "avg_pool1d", (32, 64, 4000), {"kernel_size": 4}),
    PoolCase("c3d-max", "max_pool3d", (2, 64, 16, 56, 56), {"kernel_size": 2, "stride": 2}),
    PoolCase("unet3d-avg", "avg_pool3d", (2, 64, 16, 56, 56), {"kernel_size": 2, "stride": 2}),
    PoolCase("r3d-gap", "adaptive_avg_pool3d", (4, 512, 4, 14, 14), {"output_size": 1}),
)

CASES: tuple[PoolCase, ...] = MAX + AVERAGE + ADAPTIVE + OTHER_RANKS


def find(patterns: Iterable[str]) -> tuple[PoolCase, ...]:
    """The cases whose names match any of ``patterns`` (shell globs), in their own order."""
    globs = tuple(patterns)
    return tuple(case for case in CASES if any(fnmatchcase(case.name, glob) for glob in globs))
