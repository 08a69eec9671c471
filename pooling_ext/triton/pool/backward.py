# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
"""Gradients of pooling over windows: each input gathers from the windows that cover it.

Inputs are taken in cells of ``stride`` in each axis. Which windows cover an input, and at which of their
offsets, depends only on where in its cell it lies, so for windows of fixed size there is nothing to search:
see :func:`_spread_cells`. Windows with very many elements, and adaptive ones, are looked up input by input.
Every sum is made by one thread in one order: nothing depends on timing.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch
from .geometry import (
    UNROLLED,
    PoolGeometry,
    program_tile,
    tile_pixels,
    tiling,
    window_count,
    window_length,
    window_start,
    within,
)
from .reductions import accumulator


def spread_windows(
    grad: Tensor,
    offsets: Tensor | None,
    result: Tensor,
    g: PoolGeometry,
    *,
    include_pad: bool = True,
    divisor: int = 0,
) -> None:
    """Write the gradient of the dense input that ``g`` describes.

    Args:
        grad: of the outputs, dense in the same format as ``result``.
        offsets: who won each window; None for an average, of which all of a window have their share.
    """
    cells = not g.adaptive and g.window_size <= UNROLLED and math.prod(g.stride) <= UNROLLED
    cell = g.stride if cells else (1, 1, 1)
    size = tuple(triton.cdiv(n, step) for n, step in zip(g.size, cell, strict=True))
    items = g.outer * size[0]
    item_size = max(math.prod(g.size), math.prod(g.out)) * g.channels
    tile, strip, programs, warps = tiling(items, *size[1:], g.channels, grad.element_size(), item_size)
    # How many windows cover an input, at most.
    covering = tuple(
        min(out, triton.cdiv(out, n) + 1 if g.adaptive else triton.cdiv(d * (k - 1) + 1, s))
        for n, out, k, s, d in zip(g.size, g.out, g.kernel, g.stride, g.dilation, strict=True)
    )
    # How many windows there are beyond the last cell, as far as the kernel is told.
    slack = tuple(max(min(out - n, 16), -16) for out, n in zip(g.out, size, strict=True))
    launch(
        _spread_cells if cells else _spread_windows,
        (programs,),
        grad,
        offsets,
        result,
        items,
        g.channels,
        *g.size,
        *g.out,
        *(() if cells else (math.prod(covering),)),
        INDICES=offsets is not None and offsets.dtype == torch.int64,
        DIVISOR=divisor,
        INCLUDE_PAD=include_pad,
        AFTER=g.after,
        TILE=tile,
        STRIP=strip,
        num_warps=warps,
        num_stages=1,
        **({"SLACK": slack} if cells else {"COVERING": covering}),
        **g.constants,
    )


# A kernel is one function: what its branches leave out is left out as it is compiled.
@triton.jit
def _spread_cells(  # noqa: PLR0915
    grad,
    offsets,
    result,
    items,
    channels,
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    INDICES: tl.constexpr,
    DIVISOR: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    AFTER: tl.constexpr,
    DILATION: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    SLACK: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
):
    """A tile of cells.

    Input ``a * stride + r`` is element ``k`` of window ``a + (r + padding - k * dilation) / stride``.
    """
    cells_d = tl.cdiv(in_d, STRIDE[0])
    cells_h = tl.cdiv(in_h, STRIDE[1])
    cells_w = tl.cdiv(in_w, STRIDE[2])
    first_item, first_h, first_w, first_c = program_tile(cells_h, cells_w, channels, TILE, STRIP)
    item_at, h_at, w_at = tile_pixels(TILE)
    c = first_c + tl.arange(0, TILE[3])[None, :]
    c_ok = c < channels
    first_outer = first_item // cells_d
    result += first_outer.to(tl.int64) * in_d * in_h * in_w * channels
    grad += first_outer.to(tl.int64) * out_d * out_h * out_w * channels
    if offsets is not None:
        offsets += first_outer.to(tl.int64) * out_d * out_h * out_w * channels
    item = first_item + item_at
    outer = item // cells_d - first_outer
    cell_d = item % cells_d
    cell_w = first_w + w_at
    if WIDE:
        outer = outer.to(tl.int64)
    for tile in tl.range(STRIP):
        cell_h = first_h + tile * TILE[1] + h_at
        at = (((outer * out_d + cell_d) * out_h + cell_h) * out_w + cell_w)[:, None] * channels + c
        for rd in tl.static_range(tl.constexpr(STRIDE[0])):
            d = cell_d * STRIDE[0] + rd
            d_ok = (item < items) & (d < in_d)
            for rh in tl.static_range(tl.constexpr(STRIDE[1])):
                h = cell_h * STRIDE[1] + rh
                h_ok = d_ok & (h < in_h)
                for rw in tl.static_range(tl.constexpr(STRIDE[2])):
                    w = cell_w * STRIDE[2] + rw
                    ok = h_ok & (w < in_w)
                    total = tl.zeros(at.shape, accumulator(grad, "sum"))
                    for offset in tl.static_range(tl.constexpr(KERNEL[0] * KERNEL[1] * KERNEL[2])):
                        if _covers(offset, rd, rh, rw, KERNEL, STRIDE, PADDING, DILATION):
                            up_d = _ahead(0, offset, rd, KERNEL, STRIDE, PADDING, DILATION)
                            up_h = _ahead(1, offset, rh, KERNEL, STRIDE, PADDING, DILATION)
                            up_w = _ahead(2, offset, rw, KERNEL, STRIDE, PADDING, DILATION)
                            od = cell_d + up_d
                            oh = cell_h + up_h
                            ow = cell_w + up_w
                            there = within(ok, od, out_d, up_d < 0, up_d > SLACK[0])
                            there = within(there, oh, out_h, up_h < 0, up_h > SLACK[1])
                            there = within(there, ow, out_w, up_w < 0, up_w > SLACK[2])
                            step = ((up_d * out_h + up_h) * out_w + up_w) * channels
                            mine = offset
                            if INDICES:
                                mine = ((d.to(tl.int64) * in_h + h) * in_w + w)[:, None]
                            factor = 1.0
                            if offsets is None:
                                d_count = _count(
                                    od, in_d, out_d, 0, KERNEL, STRIDE, PADDING, AFTER, ADAPTIVE, INCLUDE_PAD
                                )
                                h_count = _count(
                                    oh, in_h, out_h, 1, KERNEL, STRIDE, PADDING, AFTER, ADAPTIVE, INCLUDE_PAD
                                )
                                w_count = _count(
                                    ow, in_w, out_w, 2, KERNEL, STRIDE, PADDING, AFTER, ADAPTIVE, INCLUDE_PAD
                                )
                                factor = _factor(d_count * h_count * w_count, DIVISOR, total.dtype)
                            mask = there[:, None] & c_ok
                            total += _part(grad, offsets, step, at, mask, mine, factor, total.dtype)
                    to = (((outer * in_d + d) * in_h + h) * in_w + w)[:, None] * channels + c
                    tl.store(result + to, total.to(result.dtype.element_ty), mask=ok[:, None] & c_ok)


@triton.jit
def _spread_windows(
    grad,
    offsets,
    result,
    items,
    channels,
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    candidates,
    INDICES: tl.constexpr,
    DIVISOR: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    AFTER: tl.constexpr,
    DILATION: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    COVERING: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
):
    """A tile of inputs, each of which looks for its windows among ``COVERING`` ones along each axis."""
    first_item, first_h, first_w, first_c = program_tile(in_h, in_w, channels, TILE, STRIP)
    item_at, h_at, w_at = tile_pixels(TILE)
    c = first_c + tl.arange(0, TILE[3])[None, :]
    c_ok = c < channels
    first_outer = first_item // in_d
    result += first_outer.to(tl.int64) * in_d * in_h * in_w * channels
    grad += first_outer.to(tl.int64) * out_d * out_h * out_w * channels
    if offsets is not None:
        offsets += first_outer.to(tl.int64) * out_d * out_h * out_w * channels
    item = first_item + item_at
    outer = item // in_d - first_outer
    d = item % in_d
    w = first_w + w_at
    if WIDE:
        outer = outer.to(tl.int64)
    first_d = _first_covering(d, in_d, out_d, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0], ADAPTIVE)
    first_ow = _first_covering(w, in_w, out_w, KERNEL[2], STRIDE[2], PADDING[2], DILATION[2], ADAPTIVE)
    for tile in tl.range(STRIP):
        h = first_h + tile * TILE[1] + h_at
        ok = (item < items) & (h < in_h) & (w < in_w)
        first_oh = _first_covering(h, in_h, out_h, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1], ADAPTIVE)
        total = tl.zeros((TILE[0] * TILE[1] * TILE[2], TILE[3]), accumulator(grad, "sum"))
        for candidate in tl.range(candidates):
            od = first_d + candidate // (COVERING[1] * COVERING[2])
            oh = first_oh + candidate // COVERING[2] % COVERING[1]
            ow = first_ow + candidate % COVERING[2]
            kd, d_ok = _element_of(
                od, d, in_d, out_d, KERNEL[0], STRIDE[0], PADDING[0], DILATION[0], ADAPTIVE
            )
            kh, h_ok = _element_of(
                oh, h, in_h, out_h, KERNEL[1], STRIDE[1], PADDING[1], DILATION[1], ADAPTIVE
            )
            kw, w_ok = _element_of(
                ow, w, in_w, out_w, KERNEL[2], STRIDE[2], PADDING[2], DILATION[2], ADAPTIVE
            )
            if INDICES:
                mine = ((d.to(tl.int64) * in_h + h) * in_w + w)[:, None]
            else:
                mine = ((kd * KERNEL[1] + kh) * KERNEL[2] + kw)[:, None]
            factor = 1.0
            if offsets is None:
                d_count = _count(od, in_d, out_d, 0, KERNEL, STRIDE, PADDING, AFTER, ADAPTIVE, INCLUDE_PAD)
                h_count = _count(oh, in_h, out_h, 1, KERNEL, STRIDE, PADDING, AFTER, ADAPTIVE, INCLUDE_PAD)
                w_count = _count(ow, in_w, out_w, 2, KERNEL, STRIDE, PADDING, AFTER, ADAPTIVE, INCLUDE_PAD)
                factor = _factor(d_count * h_count * w_count, DIVISOR, total.dtype)
            at = (((outer * out_d + od) * out_h + oh) * out_w + ow)[:, None] * channels + c
            there = (ok & d_ok & h_ok & w_ok)[:, None] & c_ok
            total += _part(grad, offsets, 0, at, there, mine, factor, total.dtype)
        to = (((outer * in_d + d) * in_h + h) * in_w + w)[:, None] * channels + c
        tl.store(result + to, total.to(result.dtype.element_ty), mask=ok[:, None] & c_ok)


@triton.jit
def _part(grad, offsets, step, at, ok, mine, factor, ACC: tl.constexpr):
    """What the windows at ``step + at`` give an input: all to the winner, or to each its share."""
    part = tl.load(grad + step + at, mask=ok, other=0).to(ACC)
    if offsets is not None:
        offset = tl.load(offsets + step + at, mask=ok, other=0)
        if offset.dtype.is_int_unsigned():
            offset = offset.to(tl.int32)
        part = tl.where(offset == mine, part, 0)
    else:
        part *= factor
    return part


@triton.constexpr_function
def _distance(axis, offset, r, KERNEL, PADDING, DILATION):
    """From element ``offset`` of window 0 to input ``r`` of cell 0."""
    k = offset // math.prod(KERNEL[axis + 1 :]) % KERNEL[axis]
    return r + PADDING[axis] - k * DILATION[axis]


@triton.constexpr_function
def _covers(offset, rd, rh, rw, KERNEL, STRIDE, PADDING, DILATION):
    """Whether input (rd, rh, rw) of every cell is element ``offset`` of some window."""
    rest = (_distance(axis, offset, r, KERNEL, PADDING, DILATION) for axis, r in enumerate((rd, rh, rw)))
    return all(distance % step == 0 for distance, step in zip(rest, STRIDE, strict=True))


@triton.constexpr_function
def _ahead(axis, offset, r, KERNEL, STRIDE, PADDING, DILATION):
    """How many windows that one is ahead of the cell, along an axis."""
    return _distance(axis, offset, r, KERNEL, PADDING, DILATION) // STRIDE[axis]


@triton.jit
def _factor(count, DIVISOR: tl.constexpr, ACC: tl.constexpr):
    """By what an average multiplies the elements of its window."""
    if DIVISOR == 0:
        # Windows that are not there must not divide by 0.
        divisor = tl.maximum(count, 1).to(ACC)[:, None]
    else:
        divisor = tl.full((1, 1), DIVISOR, ACC)
    return 1 / divisor


@triton.jit
def _count(
    o,
    size,
    out,
    AXIS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    AFTER: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
):
    start = window_start(o, size, out, STRIDE[AXIS], PADDING[AXIS], ADAPTIVE)
    length = window_length(o, size, out, KERNEL[AXIS], ADAPTIVE)
    return window_count(start, length, size, PADDING[AXIS], AFTER[AXIS], INCLUDE_PAD)


@triton.jit
def _first_covering(
    i,
    size,
    out,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):
    """The first window that may cover input ``i``."""
    if ADAPTIVE:
        first = (i.to(tl.int64) * out // size).to(tl.int32)
    else:
        first = (tl.maximum(i + (PADDING - DILATION * (KERNEL - 1)), 0) + STRIDE - 1) // STRIDE
    return first


@triton.jit
def _element_of(
    o,
    i,
    size,
    out,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    ADAPTIVE: tl.constexpr,
):
    """Which element of window ``o`` input ``i`` is, and whether it is one."""
    distance = i - window_start(o, size, out, STRIDE, PADDING, ADAPTIVE)
    element = tl.maximum(distance, 0) // DILATION
    ok = (o < out) & (distance >= 0) & (element * DILATION == distance)
    return element, ok & (element < window_length(o, size, out, KERNEL, ADAPTIVE))
