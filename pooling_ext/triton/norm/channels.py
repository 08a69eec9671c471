"""How the kernels that work on whole channels walk a tensor.

A tensor ``(N, C, *)`` is ``rows`` of channels in a channels_last format, ``(N * pixels, C)``, and planes
in the contiguous one, ``(N, C, inner)``. A program has a block of channels and every ``splits``-th tile of
them. A tile is ``UNROLL x ROWS x COLUMNS`` elements, where columns are adjacent in memory: rows by channels,
or batch by channels by pixels. Its layout has the first axis within a thread, so that these are as many
independent loads of 16 bytes, and what is summed along it stays in registers.
"""

from __future__ import annotations

from math import gcd, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops._library import memory_format, suggests_channels_last
from ..pool.geometry import WARP_SIZE

THREADS = 128
WARPS = THREADS // WARP_SIZE
#: Bytes that a thread moves with one instruction.
ACCESS = 16
#: Independent loads of a thread, for each tensor that is read; in the contiguous format no more than have 16
#: values, since there a thread's columns have sums of their own.
UNROLL = 4
#: Columns in channels_last: with a whole line of memory in each row, many channels leave enough rows to each
#: program that its sums are few beside what it read.
LINE = 128


class Work(NamedTuple):
    """How many programs a kernel has at most, and how many tiles each at least."""

    programs: int
    tiles: int


#: Sums: four for each of 132 processors, which has room for as many at once, and little to add up. A lane
#: adds at most `LANE_TILES` tiles.
SUMS = Work(528, 8)
#: One output for each input: more of them, so that the last ones to end leave little idle.
EACH = Work(4096, 4)
LANE_TILES = 256


class Walk:
    """How a tensor is cut into tiles, and the launch arguments that say so.

    Args:
        rows: pixels of all images in channels_last, else images.
        channels, inner: of the tensor; no pixels of its own in channels_last.
        last: whether it is in channels_last.
        itemsize: of an element in bytes.

    Attributes:
        shape: ``rows, channels, inner, tiles, blocks``; the second in channels_last, else the third, as a
            multiple of ``VECTOR``, so that the compiler knows what it is divisible by.
        constants: the ``tl.constexpr`` ones.
    """

    def __init__(self, rows: int, channels: int, inner: int, last: bool, itemsize: int):
        vector = ACCESS // itemsize
        slab = THREADS * vector
        width = channels if last else inner
        if last:
            columns = min(triton.next_power_of_2(max(width, 1)), LINE // itemsize)
        else:
            columns = _columns(inner, WARP_SIZE * vector, slab)
        at_once = slab // columns
        if not last:
            at_once = min(at_once, triton.next_power_of_2(max(channels, 1)))
        unit = gcd(width, vector) or 1
        # Where a vector takes several loads, those are independent too. The rows of small tensors are
        # not padded to a whole tile.
        loads = UNROLL if last else min(UNROLL, itemsize)
        most = max(loads * unit // vector, 1)
        unroll = min(most, triton.next_power_of_2(max(rows // (at_once if last else 1), 1)))
        if last:
            self.blocks = triton.cdiv(channels, columns)
            self.tiles = triton.cdiv(rows, at_once * unroll)
            self.shape = (rows, channels // unit, 1, self.tiles, self.blocks)
        else:
            self.blocks = triton.cdiv(channels, at_once)
            self.tiles = triton.cdiv(rows, unroll) * triton.cdiv(inner, columns)
            self.shape = (rows, channels, inner // unit, self.tiles, self.blocks)
        self.constants = {
            "LAST": last,
            "VECTOR": unit,
            "UNROLL": unroll,
            "ROWS": at_once,
            "COLUMNS": columns,
        }

    def splits(self, work: Work) -> int:
        """How many programs share a block of channels."""
        most = triton.cdiv(self.tiles, work.tiles)
        return max(min(work.programs // max(self.blocks, 1), most), triton.cdiv(self.tiles, LANE_TILES), 1)


class Channels:
    """A dense tensor of channels: its sizes, and others that lie as it does."""

    def __init__(self, input: Tensor):
        self.batch, self.channels = input.shape[:2]
        self.inner = prod(input.shape[2:])
        channels_last = suggests_channels_last(input)
        self.format = memory_format(input.dim() - 2, channels_last)
        # With one pixel the formats are the same, and rows over channels are the longer ones.
        self.last = channels_last or self.inner == 1
        self.input = input.contiguous(memory_format=self.format)

    def all(self) -> Walk:
        """Programs take channels of all images."""
        rows, inner = (self.batch * self.inner, 1) if self.last else (self.batch, self.inner)
        return Walk(rows, self.channels, inner, self.last, self.input.element_size())

    def each(self) -> tuple[int, Walk]:
        """Programs take planes: how many tensors there are to walk, one after the other, and how each."""
        size = self.input.element_size()
        if self.last:
            return self.batch, Walk(self.inner, self.channels, 1, True, size)
        return 1, Walk(1, self.batch * self.channels, self.inner, False, size)

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of the input's shape as it lies."""
        return tensor.contiguous(memory_format=self.format)

    def empty(self) -> Tensor:
        return torch.empty_like(self.input, memory_format=self.format)


def _columns(inner: int, least: int, most: int) -> int:
    """The power of two of which least is beyond the end of a plane; the largest of equals."""
    if inner <= least:
        return triton.next_power_of_2(max(inner, 1))
    sizes = []
    while most >= least:
        sizes.append(most)
        most //= 2
    return min(sizes, key=lambda size: triton.cdiv(inner, size) * size)


@triton.jit
def program(
    channels,
    inner,
    blocks,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What is the same for all of a program's tiles.

    Returns:
        Channels and pixels as they are; the first tile; the channels of this block and which of them exist,
        along a tile's axis; a tile's rows or images, and columns; where its elements lie from the first one.
    """
    split = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    u = tl.arange(0, UNROLL)[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    column = tl.arange(0, COLUMNS)[None, None, :]
    if LAST:
        channels *= VECTOR
        row = u * ROWS + row
        channel = block * COLUMNS + column
        within = row.to(tl.int64) * channels + channel
        return channels, inner, split, channel, channel < channels, row, column, within
    else:
        inner *= VECTOR
        channel = block * ROWS + row
        within = (u.to(tl.int64) * channels + channel) * inner + column
        return channels, inner, split, channel, channel < channels, u, column, within


@triton.jit
def tile(
    i,
    rows,
    channels,
    inner,
    exists,
    row,
    column,
    within,
    LAST: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Where the elements of tile ``i`` lie, which of them exist, and how many each channel has."""
    if LAST:
        first = tl.cast(i, tl.int64) * (UNROLL * ROWS)
        some = tl.minimum(rows - first, UNROLL * ROWS).to(tl.int32)
        return first * channels + within, (row < some) & exists, some
    else:
        across = (inner + (COLUMNS - 1)) // COLUMNS
        n = tl.cast(i // across, tl.int64) * UNROLL
        pixel = tl.cast(i % across, tl.int64) * COLUMNS
        images = tl.minimum(rows - n, UNROLL).to(tl.int32)
        pixels = tl.minimum(inner - pixel, COLUMNS).to(tl.int32)
        at = n * channels * inner + pixel + within
        return at, (row < images) & exists & (column < pixels), images * pixels


@triton.jit
def add_lanes(lanes, LAST: tl.constexpr):
    """Each channel's sum of lanes ``(1, ROWS, COLUMNS)``, in float64."""
    return tl.sum(lanes.to(tl.float64), axis=1 if LAST else 2, keep_dims=True)
