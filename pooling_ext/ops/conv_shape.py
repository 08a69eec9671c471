"""A convolution before it runs: its sizes, and how much work each way to do it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

#: Fewer channels than these fill no vector of Winograd's kernels.
LEAST_CHANNELS = 16
#: The kernels of rows and columns that Winograd's way is there for; all but the first with a stride of 1.
WINOGRAD_KERNELS = ((3, 3), (5, 5), (1, 3), (3, 1), (1, 7), (7, 1))
#: Pixels of a tile along an axis, and its points, by the kernel's size along it.
_TILES = {1: (1, 1), 3: (4, 6), 5: (4, 8), 7: (4, 10)}
_STRIDED_POINTS = 81


class Conv(NamedTuple):
    """A 2-d or 3-d convolution, before it runs.

    Attributes:
        batch, channels, size: of the input; ``size`` is (height, width), or (depth, height, width).
        features: channels of the output.
        kernel, stride, dilation: along the same axes.
        padding: before each axis, and then after each: (top, left, bottom, right).
        dtype: of input and weight, after autocast.
        channels_last: whether the output will be; otherwise it is contiguous.
    """

    batch: int
    channels: int
    size: tuple[int, ...]
    features: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    channels_last: bool

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """The padding before and after each axis."""
        return tuple(zip(self.padding[: self.rank], self.padding[self.rank :], strict=True))

    @property
    def is_symmetric(self) -> bool:
        """Whether the padding is the same before and after each axis, as PyTorch's operators have it."""
        return self.padding[: self.rank] == self.padding[self.rank :]

    @property
    def output_size(self) -> tuple[int, ...]:
        return tuple(
            (size + before + after - gap * (kernel - 1) - 1) // step + 1
            for size, (before, after), kernel, step, gap in zip(
                self.size, self.sides, self.kernel, self.stride, self.dilation, strict=True
            )
        )

    @property
    def outputs(self) -> int:
        """Pixels of the output."""
        return self.batch * math.prod(self.output_size)

    @property
    def planes(self) -> int:
        """Of the kernel."""
        return self.kernel[0] if self.rank == 3 else 1

    @property
    def work(self) -> int:
        """Multiplications of the direct convolution."""
        return self.outputs * self.features * self.channels // self.groups * math.prod(self.kernel)

    @property
    def tiles(self) -> int:
        """Of Winograd's way, of each phase of a dilated convolution."""
        tiles = self.batch * (self.output_size[0] if self.rank == 3 else 1)
        for size, gap, kernel in zip(
            self.output_size[-2:], self.dilation[-2:], self.kernel[-2:], strict=True
        ):
            tiles *= gap * -(-size // (gap * _tile(kernel)[0]))
        return tiles

    @property
    def winograd_work(self) -> int:
        """Multiplications of Winograd's way."""
        points = winograd_points(self.kernel) if self.stride[-2:] == (1, 1) else _STRIDED_POINTS
        return self.tiles * points * self.features * self.channels // self.groups * self.planes

    @property
    def winograd_bytes(self) -> int:
        """What the transformed weight takes."""
        features = -(-(self.features // self.groups) // LEAST_CHANNELS) * LEAST_CHANNELS
        elements = self.channels * self.planes * features * winograd_points(self.kernel)
        return elements * (8 if self.dtype == torch.float64 else 4)


def winograd_points(kernel: Sequence[int]) -> int:
    """How many points the transform of a kernel has, of each plane."""
    return _tile(kernel[-2])[1] * _tile(kernel[-1])[1]


def _tile(size: int) -> tuple[int, int]:
    # A compiler's symbol is no key.
    for kernel, tile in _TILES.items():
        if size == kernel:
            return tile
    raise KeyError(size)


def has_winograd_kernel(kernel: Sequence[int]) -> bool:
    """Whether there is a Winograd way for a kernel (along 1 to 3 axes) of stride 1."""
    rows, columns = (1, *kernel) if len(kernel) == 1 else kernel[-2:]
    # One comparison after the other: a compiler takes minutes over one of all kernels at once, where
    # these are symbols.
    for known_rows, known_columns in WINOGRAD_KERNELS[: 1 if len(kernel) == 3 else None]:
        if rows == known_rows and columns == known_columns:
            return True
    return False
