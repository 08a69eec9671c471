# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
"""Reductions over windows: maxima, with or without the offsets of the winners, averages and power averages.

A program reduces the windows of a tile of outputs, element by element: each element is one load for the whole
tile, of vectors along the channels in channels_last, of neighboring elements by neighboring threads in the
contiguous format. Windows that overlap find what they share in the first-level cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch
from .geometry import (
    UNROLLED,
    PoolGeometry,
    first_element,
    lowest,
    program_tile,
    tile_pixels,
    tiling,
    window_count,
    window_length,
    window_start,
    within,
)
from .reductions import MAX, MEAN, accumulator, larger, power, root, wins


def pool_windows(
    x: Tensor,
    y: Tensor,
    offsets: Tensor | None,
    g: PoolGeometry,
    reduction: tl.constexpr,
    *,
    norm: int = 0,
    magnitude: bool = False,
    include_pad: bool = True,
    divisor: int = 0,
) -> None:
    """Write the reduction of dense ``x`` over the windows of ``g`` to ``y``, the winners' to ``offsets``."""
    items = g.outer * g.out[0]
    item_size = max(g.size[0] * g.size[1] * g.size[2], g.out[1] * g.out[2]) * g.channels
    tile, strip, programs, warps = tiling(items, *g.out[1:], g.channels, x.element_size(), item_size)
    launch(
        _pool_windows,
        (programs,),
        x,
        y,
        offsets,
        items,
        g.channels,
        *g.size,
        *g.out,
        REDUCTION=reduction,
        NORM=norm,
        MAGNITUDE=magnitude,
        LOWEST=lowest(x.dtype) if reduction == MAX else 0,
        INDICES=offsets is not None and offsets.dtype == torch.int64,
        DIVISOR=divisor,
        INCLUDE_PAD=include_pad,
        AFTER=g.after,
        INSIDE=g.inside,
        UNROLL=g.window_size <= UNROLLED,
        TILE=tile,
        STRIP=strip,
        num_warps=warps,
        num_stages=1,
        **g.constants,
    )


# A kernel is one function: what its branches leave out is left out as it is compiled.
@triton.jit
def _pool_windows(  # noqa: C901, PLR0912, PLR0915
    x,
    y,
    offsets,
    items,
    channels,
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    REDUCTION: tl.constexpr,
    NORM: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    LOWEST: tl.constexpr,
    INDICES: tl.constexpr,
    DIVISOR: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    AFTER: tl.constexpr,
    DILATION: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    INSIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
):
    ACC: tl.constexpr = accumulator(x, REDUCTION)
    first_item, first_h, first_w, first_c = program_tile(out_h, out_w, channels, TILE, STRIP)
    item_at, h_at, w_at = tile_pixels(TILE)
    c = first_c + tl.arange(0, TILE[3])[None, :]
    # Offsets count from the program's first item, so that they fit 32 bits.
    first_outer = first_item // out_d
    x += first_outer.to(tl.int64) * in_d * in_h * in_w * channels
    y += first_item.to(tl.int64) * out_h * out_w * channels
    if offsets is not None:
        offsets += first_item.to(tl.int64) * out_h * out_w * channels
    item = first_item + item_at
    outer = item // out_d - first_outer
    d = item % out_d
    w = first_w + w_at
    c_ok = c < channels
    pixel_ok = (item < items) & (w < out_w)
    if WIDE:
        outer = outer.to(tl.int64)
        item_at = item_at.to(tl.int64)
    d_start = window_start(d, in_d, out_d, STRIDE[0], PADDING[0], ADAPTIVE)
    w_start = window_start(w, in_w, out_w, STRIDE[2], PADDING[2], ADAPTIVE)
    d_length = window_length(d, in_d, out_d, KERNEL[0], ADAPTIVE)
    w_length = window_length(w, in_w, out_w, KERNEL[2], ADAPTIVE)
    for tile in tl.range(STRIP):
        h = first_h + tile * TILE[1] + h_at
        h_start = window_start(h, in_h, out_h, STRIDE[1], PADDING[1], ADAPTIVE)
        h_length = window_length(h, in_h, out_h, KERNEL[1], ADAPTIVE)
        h_ok = pixel_ok & (h < out_h)
        origin = (((outer * in_d + d_start) * in_h + h_start) * in_w + w_start) * channels
        best = tl.full((TILE[0] * TILE[1] * TILE[2], TILE[3]), LOWEST, ACC)
        where = tl.full((1, 1), 0, tl.int32)
        if offsets is not None:
            # Until something larger comes along, the first element in the input wins, if there is one.
            kd, any_d = first_element(d_start, d_length, in_d, DILATION[0])
            kh, any_h = first_element(h_start, h_length, in_h, DILATION[1])
            kw, any_w = first_element(w_start, w_length, in_w, DILATION[2])
            where = (kd * KERNEL[1] + kh) * KERNEL[2] + kw
            if DILATION[0] * DILATION[1] * DILATION[2] > 1:  # or else there is always one
                where = tl.where(any_d & any_h & any_w, where, -1)
            where = tl.broadcast_to(where[:, None], best.shape)
        if UNROLL:
            for kd in tl.static_range(tl.constexpr(KERNEL[0])):
                d_ok = within(
                    h_ok, d_start + kd * DILATION[0], in_d, kd * DILATION[0] < PADDING[0], kd >= INSIDE[0]
                )
                if ADAPTIVE:
                    d_ok &= kd < d_length
                for kh in tl.static_range(tl.constexpr(KERNEL[1])):
                    row_ok = within(
                        d_ok, h_start + kh * DILATION[1], in_h, kh * DILATION[1] < PADDING[1], kh >= INSIDE[1]
                    )
                    if ADAPTIVE:
                        row_ok &= kh < h_length
                    row = (
                        x
                        + (kd * DILATION[0] * in_h + kh * DILATION[1]) * in_w * channels
                        + (origin[:, None] + c)
                    )
                    for kw in tl.static_range(tl.constexpr(KERNEL[2])):
                        ok = within(
                            row_ok,
                            w_start + kw * DILATION[2],
                            in_w,
                            kw * DILATION[2] < PADDING[2],
                            kw >= INSIDE[2],
                        )
                        if ADAPTIVE:
                            ok &= kw < w_length
                        step = kw * DILATION[2] * channels
                        v = tl.load(row + step, mask=ok[:, None] & c_ok, other=LOWEST)
                        offset = (kd * KERNEL[1] + kh) * KERNEL[2] + kw
                        best, where = _meet(best, where, v, offset, offsets, REDUCTION, NORM, MAGNITUDE)
        else:
            first_kd, _ = first_element(d_start, d_length, in_d, DILATION[0])
            first_kh, _ = first_element(h_start, h_length, in_h, DILATION[1])
            first_kw, _ = first_element(w_start, w_length, in_w, DILATION[2])
            # No more elements than these are in the input.
            most_h = tl.minimum(tl.cdiv(in_h, DILATION[1]), KERNEL[1])
            most_w = tl.minimum(tl.cdiv(in_w, DILATION[2]), KERNEL[2])
            for i in tl.range(tl.minimum(tl.cdiv(in_d, DILATION[0]), KERNEL[0]) * most_h * most_w):
                kd = first_kd + i // (most_h * most_w)
                kh = first_kh + i // most_w % most_h
                kw = first_kw + i % most_w
                d_at = d_start + kd * DILATION[0]
                row = h_start + kh * DILATION[1]
                column = w_start + kw * DILATION[2]
                ok = h_ok & (kd < d_length) & (kh < h_length) & (kw < w_length)
                ok &= (d_at < in_d) & (row < in_h) & (column < in_w)
                at = (((outer * in_d + d_at) * in_h + row) * in_w + column) * channels
                v = tl.load(x + (at[:, None] + c), mask=ok[:, None] & c_ok, other=LOWEST)
                offset = ((kd * KERNEL[1] + kh) * KERNEL[2] + kw)[:, None]
                best, where = _meet(best, where, v, offset, offsets, REDUCTION, NORM, MAGNITUDE)
        if REDUCTION == MEAN:
            if DIVISOR == 0:
                count = window_count(d_start, d_length, in_d, PADDING[0], AFTER[0], INCLUDE_PAD)
                count *= window_count(h_start, h_length, in_h, PADDING[1], AFTER[1], INCLUDE_PAD)
                count *= window_count(w_start, w_length, in_w, PADDING[2], AFTER[2], INCLUDE_PAD)
                divisor = count.to(ACC)[:, None]
            else:
                divisor = tl.full((1, 1), DIVISOR, ACC)
            best = best / divisor
            if NORM > 0:
                # PyTorch takes the average and multiplies by the full window's size.
                best = root(best * (d_length * h_length * w_length).to(ACC)[:, None], NORM)
        to = ((item_at * out_h + h) * out_w + w)[:, None] * channels + c
        ok = h_ok[:, None] & c_ok
        tl.store(y + to, best.to(y.dtype.element_ty), mask=ok)
        if offsets is not None:
            if INDICES:
                kd = d_start[:, None] + where // (KERNEL[1] * KERNEL[2]) * DILATION[0]
                kh = h_start[:, None] + where // KERNEL[2] % KERNEL[1] * DILATION[1]
                kw = w_start[:, None] + where % KERNEL[2] * DILATION[2]
                index = (kd.to(tl.int64) * in_h + kh) * in_w + kw
                tl.store(offsets + to, tl.where(where < 0, -1, index), mask=ok)
            else:
                tl.store(offsets + to, where.to(offsets.dtype.element_ty), mask=ok)


@triton.jit
def _meet(
    best, where, v, offset, offsets, REDUCTION: tl.constexpr, NORM: tl.constexpr, MAGNITUDE: tl.constexpr
):
    """The reduction with one more element in each window."""
    v = v.to(best.dtype)
    if REDUCTION == MEAN:
        best += power(v, NORM, MAGNITUDE)
    elif offsets is not None:
        better = wins(v, best)
        best = tl.where(better, v, best)
        where = tl.where(better, offset, where)
    else:
        best = larger(best, v)
    return best, where
