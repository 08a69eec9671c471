# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
"""Max pooling in Triton; the operators are defined in pooling_ext/ops/max_pool.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import _library
from ...ops.max_pool import offsets_dtype
from ...windows import Windows
from ..launching import launch
from .backward import spread_windows
from .forward import pool_windows
from .geometry import (
    PoolGeometry,
    channels_last,
    dense,
    geometry,
    program_tile,
    tile_pixels,
    tiling,
    window_start,
    without_outside,
)
from .global_reduce import pool_planes, spread_planes
from .reductions import MAX

Ints = Sequence[int]


def max_pool(
    input: Tensor, output_size: Ints, kernel_size: Ints, stride: Ints, padding: Ints, dilation: Ints
) -> Tensor:
    """The maxima of all windows."""
    windows = (output_size, kernel_size, stride, padding, dilation)
    return _pool(input, windows, None)


def max_pool_with_offsets(
    input: Tensor,
    output_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    indices: bool,
) -> tuple[Tensor, Tensor]:
    """The maxima and the offsets of their winners."""
    windows = (output_size, kernel_size, stride, padding, dilation)
    dtype = offsets_dtype(Windows(*map(tuple, windows)), input, indices)
    offsets = _library.empty(input, output_size, dtype)
    return _pool(input, windows, offsets), offsets


def _pool(input: Tensor, windows: tuple[Ints, ...], offsets: Tensor | None) -> Tensor:
    output = _library.empty(input, windows[0])
    if output.numel() == 0:
        return output
    nhwc = channels_last(input, len(windows[0]))
    g = without_outside(geometry(input.shape, nhwc, *windows))
    pool = pool_planes if g.whole else pool_windows
    pool(dense(input, nhwc), output, offsets, g, MAX)
    return output


def max_pool_backward(
    grad: Tensor,
    offsets: Tensor,
    input_size: Ints,
    output_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
) -> Tensor:
    """The input's gradient: every output's goes to its winner."""
    rank = len(output_size)
    nhwc = channels_last(offsets, rank)
    result = _library.empty(offsets, input_size[len(input_size) - rank :], grad.dtype)
    if result.numel() == 0:
        return result
    if grad.numel() == 0:
        return result.zero_()
    g = without_outside(geometry(input_size, nhwc, output_size, kernel_size, stride, padding, dilation))
    spread = spread_planes if g.whole else spread_windows
    spread(dense(grad, nhwc), dense(offsets, nhwc), result, g)
    return result


def max_pool_gather(
    input: Tensor,
    offsets: Tensor,
    output_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
) -> Tensor:
    """The input's values at the offsets, 0 where there is none."""
    nhwc = channels_last(offsets, len(output_size))
    output = _library.empty(offsets, output_size, input.dtype)
    if output.numel() == 0:
        return output
    g = without_outside(geometry(input.shape, nhwc, output_size, kernel_size, stride, padding, dilation))
    _gather(dense(input, nhwc), dense(offsets, nhwc), output, g)
    return output


def _gather(x: Tensor, offsets: Tensor, y: Tensor, g: PoolGeometry) -> None:
    item_size = max(g.size[0] * g.size[1] * g.size[2], g.out[1] * g.out[2]) * g.channels
    tile, _, programs, warps = tiling(
        g.outer * g.out[0], *g.out[1:], g.channels, x.element_size(), item_size, 1
    )
    launch(
        _max_pool_gather,
        (programs,),
        x,
        offsets,
        y,
        g.outer * g.out[0],
        g.channels,
        *g.size,
        *g.out,
        INDICES=offsets.dtype == torch.int64,
        TILE=tile,
        num_warps=warps,
        num_stages=1,
        **g.constants,
    )


@triton.jit
def _max_pool_gather(
    x,
    offsets,
    y,
    items,
    channels,
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    INDICES: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    first_item, first_h, first_w, first_c = program_tile(out_h, out_w, channels, TILE, 1)
    item_at, h_at, w_at = tile_pixels(TILE)
    c = first_c + tl.arange(0, TILE[3])[None, :]
    first_outer = first_item // out_d
    x += first_outer.to(tl.int64) * in_d * in_h * in_w * channels
    y += first_item.to(tl.int64) * out_h * out_w * channels
    offsets += first_item.to(tl.int64) * out_h * out_w * channels
    item = first_item + item_at
    outer = (item // out_d - first_outer)[:, None]
    h = first_h + h_at
    w = first_w + w_at
    ok = ((item < items) & (h < out_h) & (w < out_w))[:, None] & (c < channels)
    if WIDE:
        outer = outer.to(tl.int64)
        item_at = item_at.to(tl.int64)
    at = ((item_at * out_h + h) * out_w + w)[:, None] * channels + c
    offset = tl.load(offsets + at, mask=ok, other=0)
    if INDICES:
        there = ok & (offset >= 0)
        index = offset
    else:
        if offset.dtype.is_int_unsigned():
            there = ok & (offset != 255)
        else:
            there = ok & (offset >= 0)
        offset = offset.to(tl.int32)
        d_start = window_start(item % out_d, in_d, out_d, STRIDE[0], PADDING[0], ADAPTIVE)[:, None]
        h_start = window_start(h, in_h, out_h, STRIDE[1], PADDING[1], ADAPTIVE)[:, None]
        w_start = window_start(w, in_w, out_w, STRIDE[2], PADDING[2], ADAPTIVE)[:, None]
        if WIDE:
            d_start = d_start.to(tl.int64)
        d = d_start + offset // (KERNEL[1] * KERNEL[2]) * DILATION[0]
        row = h_start + offset // KERNEL[2] % KERNEL[1] * DILATION[1]
        index = (d * in_h + row) * in_w + w_start + offset % KERNEL[2] * DILATION[2]
    v = tl.load(x + (outer * in_d * in_h * in_w + index) * channels + c, mask=there, other=0)
    tl.store(y + at, v, mask=ok)
