# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
"""The geometry of pooling in Triton, on the host and in kernels.

Kernels see a dense tensor as ``[outer, d, h, w, channels]``: the contiguous format has every plane in
``outer`` and one channel, the channels-last formats have the batch in ``outer``. Lower ranks have ``d``, or
``d`` and ``h``, of size 1. A program computes a tile ``(items, h, w, channels)`` of what it writes, where an
item is one ``d`` of one ``outer``; as a block that is ``[pixels, channels]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import _library
from ...windows import Windows, adaptive_kernel

Ints = tuple[int, int, int]

#: What one program writes, in bytes of values, and the bytes of channels in it: one line of cache.
TILE_BYTES = 4096
CHANNEL_BYTES = 128
#: What one program writes in the contiguous format, in elements; each takes registers for its address.
PLAIN_TILE = 1024
#: The widest tile in channels_last; in the contiguous format a tile may be as wide as it has elements.
COLUMNS = 16
#: Tiles below one another go to one program, which reads their common rows once, as long as there are so many
#: programs that all processors of a large GPU have some.
STRIP = 16
ENOUGH_PROGRAMS = 1024
THREADS = 256
WARP_SIZE = 64 if torch.version.hip else 32
#: More elements in a window than this are walked by a loop instead of being unrolled.
UNROLLED = 32


class PoolGeometry(NamedTuple):
    """Sizes and windows along (d, h, w), in what :func:`geometry` makes of an input's shape."""

    outer: int
    channels: int
    size: Ints
    out: Ints
    kernel: Ints  # adaptive: of the largest window, or more
    stride: Ints
    before: Ints
    after: Ints
    dilation: Ints
    adaptive: bool

    @property
    def window_size(self) -> int:
        return math.prod(self.kernel)

    @property
    def whole(self) -> bool:
        """Whether the only window is the whole plane."""
        return (
            not self.adaptive
            and self.kernel == self.size
            and self.out == (1, 1, 1)
            and not any(self.before + self.after)
            and all(d == 1 for d in self.dilation)
        )

    @property
    def wide(self) -> bool:
        """Whether an offset within an item of the input or the output may not fit 32 bits."""
        span = zip(self.size, self.kernel, self.stride, self.dilation, strict=True)
        reach = math.prod(n + 2 * k * d + s for n, k, s, d in span)
        return max(reach, math.prod(self.out)) * self.channels >= 2**31

    @property
    def inside(self) -> Ints:
        """Along each axis, the first element with which a window may reach beyond the input's end."""
        if self.adaptive:
            return self.kernel
        ends = zip(self.size, self.out, self.kernel, self.stride, self.before, self.dilation, strict=True)
        room = (((n - 1) - ((o - 1) * s - p), k, d) for n, o, k, s, p, d in ends)
        return tuple(min(max(rest // d + 1, 0), k) for rest, k, d in room)  # type: ignore[return-value]

    @property
    def constants(self) -> dict[str, object]:
        """The windows as the ``tl.constexpr`` arguments that every kernel of windows takes."""
        return {
            "KERNEL": self.kernel,
            "STRIDE": self.stride,
            "PADDING": self.before,
            "DILATION": self.dilation,
            "ADAPTIVE": self.adaptive,
            "WIDE": self.wide,
        }


#: Of so many elements nearly all are outside the input, and offsets_dtype in ops/max_pool.py takes indices.
MANY_ELEMENTS = 2**30


@lru_cache(maxsize=1024)
def without_outside(g: PoolGeometry) -> PoolGeometry:
    """``g`` for a maximum: of many elements, those are left out that are inside the input in no window.

    Kernels count offsets in 32 bits; an average counts some of those that are left out.
    """
    if g.adaptive or g.window_size < MANY_ELEMENTS:
        return g
    axes = zip(g.size, g.out, g.kernel, g.stride, g.before, g.dilation, strict=True)
    kernels, pads = [], []
    for n, out, kernel, step, pad, dilation in axes:
        before = max(pad - (out - 1) * step, 0) // dilation
        pads.append(pad - before * dilation)
        kernels.append(min(kernel - before, -(-(n + pads[-1]) // dilation)))
    return g._replace(kernel=tuple(kernels), before=tuple(pads), after=(0, 0, 0))


def geometry(sizes: Sequence[int], channels_last: bool, *windows: Sequence[int]) -> PoolGeometry:
    """The geometry of an input of shape ``sizes`` under the fields of a ``Windows``."""
    return _geometry(tuple(sizes), channels_last, Windows(*map(tuple, windows)))


@lru_cache(maxsize=1024)
def _geometry(sizes: tuple[int, ...], channels_last: bool, windows: Windows) -> PoolGeometry:
    rank = len(windows.output_size)
    leading, spatial = sizes[: len(sizes) - rank], sizes[len(sizes) - rank :]
    adaptive = windows.adaptive
    if adaptive:
        kernel = tuple(adaptive_kernel(n, out) for n, out in zip(spatial, windows.output_size, strict=True))
        # Windows of one size are fixed ones.
        adaptive = any(out and n % out for n, out in zip(spatial, windows.output_size, strict=True))
        windows = windows._replace(kernel_size=kernel)
    output_size, kernel, stride, padding, dilation = windows.full
    # One window makes no step, which may be as long as it likes.
    stride = tuple(
        min(step, size) if out == 1 else step
        for step, size, out in zip(stride, kernel, output_size, strict=True)
    )

    def axes(values: Sequence[int], fill: int) -> Ints:
        return (fill,) * (3 - rank) + tuple(values)  # type: ignore[return-value]

    return PoolGeometry(
        sizes[0] if channels_last else math.prod(leading),
        sizes[1] if channels_last else 1,
        axes(spatial, 1),
        axes(output_size, 1),
        axes(kernel, 1),
        axes(stride, 1),
        axes(padding[::2], 0),
        axes(padding[1::2], 0),
        axes(dilation, 1),
        adaptive,
    )


def channels_last(x: Tensor, rank: int) -> bool:
    """Whether kernels see ``x`` in a channels-last format, as the operators' results for it are."""
    return _library.keeps_channels_last(x, rank)


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """``x``, or a copy of it in the dense format that kernels read."""
    return x.contiguous(memory_format=_library.memory_format(x.dim() - 2, channels_last))


def lowest(dtype: torch.dtype) -> float | int:
    """What every maximum in ``dtype`` starts from."""
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


class Tiling(NamedTuple):
    """How the work is cut: the tile's (items, h, w, channels), tiles of a program, programs, warps."""

    tile: tuple[int, int, int, int]
    strip: int
    programs: int
    warps: int


@lru_cache(maxsize=1024)
def tiling(
    items: int,
    h: int,
    w: int,
    channels: int,
    itemsize: int,
    item_size: int,
    most: int = STRIP,
    tile_bytes: int | None = None,
) -> Tiling:
    """Cut ``[items, h, w, channels]`` into tiles.

    Args:
        itemsize: of a value in bytes.
        item_size: the elements of an item that are read or written; the offsets in a tile fit 32 bits.
        most: the most tiles in a strip.
        tile_bytes: of the values in a tile; by default ``TILE_BYTES``.
    """
    elements = (tile_bytes or TILE_BYTES) // itemsize
    if channels == 1:
        elements = min(elements, PLAIN_TILE)
    tc = min(triton.next_power_of_2(channels), CHANNEL_BYTES // itemsize)
    pixels = elements // tc
    tw = _cut(w, pixels if channels == 1 else COLUMNS)
    th = _cut(h, pixels // tw)
    tp = min(triton.next_power_of_2(items), pixels // (tw * th), max(1, 2**30 // item_size))
    tp = 2 ** (tp.bit_length() - 1)
    across = triton.cdiv(items, tp) * triton.cdiv(w, tw) * triton.cdiv(channels, tc)
    down = triton.cdiv(h, th)
    strip = 1
    while strip < min(most, down) and across * triton.cdiv(down, 2 * strip) >= ENOUGH_PROGRAMS:
        strip *= 2
    # A vector of 16 bytes for each thread, if there are enough.
    vector = 16 // itemsize if channels > 1 else PLAIN_TILE // THREADS
    warps = max(1, min(THREADS, tp * th * tw * tc // vector) // WARP_SIZE)
    return Tiling((tp, th, tw, tc), strip, across * triton.cdiv(down, strip), warps)


def _cut(size: int, most: int) -> int:
    """A power of two up to ``most`` that cuts ``size`` with little left over, and not into many parts."""
    widest = min(triton.next_power_of_2(size), most)
    choices = {widest, max(widest // 2, 1), max(widest // 4, 1)}
    return min(choices, key=lambda part: (triton.cdiv(size, part) * (part + 4), -part))


@triton.jit
def tile_pixels(TILE: tl.constexpr):
    """The (item, h, w) of each pixel of a tile."""
    i = tl.arange(0, TILE[0] * TILE[1] * TILE[2])
    w = i % TILE[2]
    if TILE[3] == 1:
        # Neighboring threads take neighboring pixels: windows start anywhere, so that a thread with several
        # would read them one by one, each in a line of its own.
        w = tl.max_contiguous(w, 1)
    return i // (TILE[1] * TILE[2]), i // TILE[2] % TILE[1], w


@triton.jit
def program_tile(h, w, channels, TILE: tl.constexpr, STRIP: tl.constexpr):
    """The (item, h, w, channel) where this program's tiles of ``[items, h, w, channels]`` start."""
    blocks = tl.cdiv(channels, TILE[3])
    columns = tl.cdiv(w, TILE[2])
    strips = tl.cdiv(h, TILE[1] * STRIP)
    program = tl.program_id(0)
    channel = program % blocks * TILE[3]
    program = program // blocks
    column = program % columns * TILE[2]
    program = program // columns
    return program // strips * TILE[0], program % strips * (TILE[1] * STRIP), column, channel


@triton.jit
def window_start(o, size, out, STRIDE: tl.constexpr, PADDING: tl.constexpr, ADAPTIVE: tl.constexpr):
    """The position of the first element of window ``o``, which may be in the padding."""
    if ADAPTIVE:
        start = (o.to(tl.int64) * size // out).to(tl.int32)
    else:
        start = o * STRIDE - PADDING
    return start


@triton.jit
def window_length(o, size, out, KERNEL: tl.constexpr, ADAPTIVE: tl.constexpr):
    """How many elements window ``o`` has, whether in the input or not."""
    if ADAPTIVE:
        o = o.to(tl.int64)
        length = (((o + 1) * size + out - 1) // out - o * size // out).to(tl.int32)
    else:
        length = o * 0 + KERNEL
    return length


@triton.jit
def window_count(start, length, size, BEFORE: tl.constexpr, AFTER: tl.constexpr, INCLUDE_PAD: tl.constexpr):
    """How many elements the average over a window divides by, along one axis."""
    if INCLUDE_PAD:
        low = tl.maximum(start, -BEFORE)
        high = tl.minimum(start + length, size + AFTER)
    else:
        low = tl.maximum(start, 0)
        high = tl.minimum(start + length, size)
    return high - low


@triton.jit
def first_element(start, length, size, DILATION: tl.constexpr):
    """The first element of a window that is in the input, and whether there is one."""
    element = (tl.maximum(-start, 0) + DILATION - 1) // DILATION
    return element, (element < length) & (start + element * DILATION < size)


@triton.jit
def within(ok, at, size, LOW: tl.constexpr, HIGH: tl.constexpr):
    """``ok``, where ``at`` is in ``[0, size)`` too; only what may be below or above is looked at."""
    if LOW:
        ok &= at >= 0
    if HIGH:
        ok &= at < size
    return ok
