# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportInvalidTypeForm=false
"""Batch normalization, ReLU and max pooling in Triton: the stem of a ResNet.

Forward, a program normalizes the elements of its windows as it reads them; what neighboring windows share
it finds in the first-level cache. In training the winners' elements are kept: with them backward's sums are
those of a batch norm of the output's size. Backward, each input gathers the gradients of the windows that
picked it. Windows with many elements take the operators in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops import _library
from ...ops.activations import RELU
from ..launching import launch
from ..pool.geometry import (
    STRIP,
    TILE_BYTES,
    UNROLLED,
    PoolGeometry,
    channels_last,
    dense,
    geometry,
    program_tile,
    tile_pixels,
    tiling,
    within,
)
from ..pool.max_pool import max_pool, max_pool_backward, max_pool_gather, max_pool_with_offsets
from ..pool.reductions import wins
from .batch_norm import affine, relu_backward, slopes, vector
from .batch_norm_act import batch_norm_act_backward_elemt, batch_norm_act_elemt

Ints = Sequence[int]

#: In training, forward and backward, which keeps more in registers than 256 threads have.
TRAINING_TILE_BYTES = TILE_BYTES // 2


@triton.jit
def _channels_of(first_item, item_at, first_c, planes, TILE: tl.constexpr, LAST: tl.constexpr):
    """The channel of each element of a tile, where an item is an image in channels_last, else a plane."""
    if LAST:
        return first_c + tl.arange(0, TILE[3])[None, :]
    elif TILE[0] == 1:
        return tl.full((1, 1), 0, tl.int32) + first_item % planes
    else:
        return ((first_item + item_at) % planes)[:, None]


@triton.jit
def _pool_kernel(
    x,
    y,
    offsets,
    winners,
    stats,
    weight,
    bias,
    items,
    planes,
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    eps: tl.float64,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    INSIDE: tl.constexpr,
    WIDE: tl.constexpr,
    LAST: tl.constexpr,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    first_item, first_h, first_w, first_c = program_tile(out_h, out_w, channels, TILE, STRIP)
    item_at, h_at, w_at = tile_pixels(TILE)
    x += first_item.to(tl.int64) * in_h * in_w * channels
    y += first_item.to(tl.int64) * out_h * out_w * channels
    if offsets is not None:
        offsets += first_item.to(tl.int64) * out_h * out_w * channels
        winners += first_item.to(tl.int64) * out_h * out_w * channels
    item_ok = first_item + item_at < items
    c = first_c + tl.arange(0, TILE[3])[None, :]
    c_ok = c < channels
    channel = _channels_of(first_item, item_at, first_c, planes, TILE, LAST)
    center, scale, shift, _rest, _inverse = affine(
        stats, weight, bias, planes, channel, channel < planes, eps, acc
    )
    w = first_w + w_at
    w_start = w * STRIDE[2] - PADDING[2]
    pixel_ok = item_ok & (w < out_w)
    if WIDE:
        item_at = item_at.to(tl.int64)
    for tile in tl.range(STRIP):
        h = first_h + tile * TILE[1] + h_at
        h_start = h * STRIDE[1] - PADDING[1]
        h_ok = pixel_ok & (h < out_h)
        origin = ((item_at * in_h + h_start) * in_w + w_start)[:, None] * channels + c
        best = tl.full((TILE[0] * TILE[1] * TILE[2], TILE[3]), float("-inf"), acc)
        where = tl.full((1, 1), 0, tl.int32)
        winner = best
        if offsets is not None:
            # Until something larger comes along, the first element in the input wins.
            first_kh = (tl.maximum(-h_start, 0) + (DILATION[1] - 1)) // DILATION[1]
            first_kw = (tl.maximum(-w_start, 0) + (DILATION[2] - 1)) // DILATION[2]
            where = tl.broadcast_to((first_kh * KERNEL[2] + first_kw)[:, None], best.shape)
        for kh in tl.static_range(tl.constexpr(KERNEL[1])):
            row_ok = within(
                h_ok, h_start + kh * DILATION[1], in_h, kh * DILATION[1] < PADDING[1], kh >= INSIDE[1]
            )
            for kw in tl.static_range(tl.constexpr(KERNEL[2])):
                ok = within(
                    row_ok, w_start + kw * DILATION[2], in_w, kw * DILATION[2] < PADDING[2], kw >= INSIDE[2]
                )
                ok = ok[:, None]
                step = (kh * DILATION[1] * in_w + kw * DILATION[2]) * channels
                v = tl.load(x + step + origin, mask=ok & c_ok, other=0.0).to(acc)
                # Rounded as the operators in turn would, on which it depends who wins.
                z = tl.fma(v - center, scale, shift).to(y.dtype.element_ty).to(acc)
                z = tl.where(ok, z, float("-inf"))
                if offsets is not None:
                    better = wins(z, best)
                    best = tl.where(better, z, best)
                    where = tl.where(better, kh * KERNEL[2] + kw, where)
                    winner = tl.where(better, v, winner)
                else:
                    best = tl.maximum(best, z, propagate_nan=tl.PropagateNan.ALL)
        # ReLU changes the winner only among elements that it makes zero, which get no gradient.
        best = tl.where(best < 0.0, 0.0, best)
        to = ((item_at * out_h + h) * out_w + w)[:, None] * channels + c
        ok = h_ok[:, None] & c_ok
        tl.store(y + to, best.to(y.dtype.element_ty), mask=ok)
        if offsets is not None:
            tl.store(offsets + to, where.to(offsets.dtype.element_ty), mask=ok)
            tl.store(winners + to, winner.to(winners.dtype.element_ty), mask=ok)


@triton.constexpr_function
def _covers(axis, element, r, KERNEL, STRIDE, PADDING, DILATION):
    """Whether input ``r`` of every cell of ``STRIDE`` is element ``element`` of some window along an axis."""
    return (r + PADDING[axis] - element * DILATION[axis]) % STRIDE[axis] == 0


@triton.constexpr_function
def _ahead(axis, element, r, KERNEL, STRIDE, PADDING, DILATION):
    """How many windows that one is ahead of the cell."""
    return (r + PADDING[axis] - element * DILATION[axis]) // STRIDE[axis]


@triton.jit
def _backward_kernel(
    grad,
    offsets,
    x,
    grad_x,
    stats,
    weight,
    bias,
    sums,
    items,
    planes,
    channels,
    in_h,
    in_w,
    out_h,
    out_w,
    share: tl.float64,
    eps: tl.float64,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    INSIDE: tl.constexpr,
    WIDE: tl.constexpr,
    LAST: tl.constexpr,
    TILE: tl.constexpr,
    STRIP: tl.constexpr,
):
    """A tile of cells of ``STRIDE``: where in its cell an input lies says which windows cover it."""
    acc: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    first_item, first_h, first_w, first_c = program_tile(
        tl.cdiv(in_h, STRIDE[1]), tl.cdiv(in_w, STRIDE[2]), channels, TILE, STRIP
    )
    item_at, h_at, w_at = tile_pixels(TILE)
    x += first_item.to(tl.int64) * in_h * in_w * channels
    grad_x += first_item.to(tl.int64) * in_h * in_w * channels
    grad += first_item.to(tl.int64) * out_h * out_w * channels
    offsets += first_item.to(tl.int64) * out_h * out_w * channels
    c = first_c + tl.arange(0, TILE[3])[None, :]
    c_ok = c < channels
    channel = _channels_of(first_item, item_at, first_c, planes, TILE, LAST)
    exists = channel < planes
    center, scale, shift, rest, inverse = affine(stats, weight, bias, planes, channel, exists, eps, acc)
    if sums is not None:
        slope, offset = slopes(sums, scale, rest, inverse, planes, channel, exists, share, acc)
    item_ok = first_item + item_at < items
    cell_w = first_w + w_at
    if WIDE:
        item_at = item_at.to(tl.int64)
    for tile in tl.range(STRIP):
        cell_h = first_h + tile * TILE[1] + h_at
        window = ((item_at * out_h + cell_h) * out_w + cell_w)[:, None] * channels + c
        for rh in tl.static_range(tl.constexpr(STRIDE[1])):
            h = cell_h * STRIDE[1] + rh
            for rw in tl.static_range(tl.constexpr(STRIDE[2])):
                w = cell_w * STRIDE[2] + rw
                ok = item_ok & (h < in_h) & (w < in_w)
                at = ((item_at * in_h + h) * in_w + w)[:, None] * channels + c
                d = tl.load(x + at, mask=ok[:, None] & c_ok, other=0.0).to(acc) - center
                g = tl.full((TILE[0] * TILE[1] * TILE[2], TILE[3]), 0.0, acc)
                for kh in tl.static_range(tl.constexpr(KERNEL[1])):
                    if _covers(1, kh, rh, KERNEL, STRIDE, PADDING, DILATION):
                        up = _ahead(1, kh, rh, KERNEL, STRIDE, PADDING, DILATION)
                        row_ok = within(ok, cell_h + up, out_h, up < 0, True)
                        for kw in tl.static_range(tl.constexpr(KERNEL[2])):
                            if _covers(2, kw, rw, KERNEL, STRIDE, PADDING, DILATION):
                                across = _ahead(2, kw, rw, KERNEL, STRIDE, PADDING, DILATION)
                                there = within(row_ok, cell_w + across, out_w, across < 0, True)
                                there = there[:, None] & c_ok
                                from_cell = window + (up * out_w + across) * channels
                                winner = tl.load(offsets + from_cell, mask=there, other=255).to(tl.int32)
                                part = tl.load(grad + from_cell, mask=there, other=0.0).to(acc)
                                g += tl.where(winner == kh * KERNEL[2] + kw, part, 0.0)
                g = relu_backward(tl.fma(d, scale, shift), g)
                result = g * scale
                if sums is not None:
                    result += tl.fma(d, slope, offset)
                tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask=ok[:, None] & c_ok)


class _Stem:
    """A call: its input and windows as the kernels see them."""

    def __init__(self, input: Tensor, windows: tuple[Ints, ...]):
        self.last = channels_last(input, 2)
        self.input = dense(input, self.last)
        self.g: PoolGeometry = geometry(input.shape, self.last, *windows)
        self.small = self.g.window_size <= UNROLLED and math.prod(self.g.stride) <= UNROLLED

    def launch(
        self,
        kernel: Any,
        tensors: tuple,
        after: tuple,
        h: int,
        w: int,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        """Launch a kernel whose programs have tiles of ``[items, h, w, channels]``.

        Args:
            after: numbers after the sizes.
        """
        g = self.g
        item_size = max(math.prod(g.size), math.prod(g.out)) * g.channels
        size = self.input.element_size()
        tile, strip, programs, warps = tiling(g.outer, h, w, g.channels, size, item_size, STRIP, tile_bytes)
        launch(
            kernel,
            (programs,),
            *tensors,
            g.outer,
            self.input.shape[1],
            g.channels,
            *g.size[1:],
            *g.out[1:],
            *after,
            KERNEL=g.kernel,
            STRIDE=g.stride,
            PADDING=g.before,
            DILATION=g.dilation,
            INSIDE=g.inside,
            WIDE=g.wide,
            LAST=self.last,
            TILE=tile,
            STRIP=strip,
            num_warps=warps,
            num_stages=1,
        )


def _pool(
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    windows: tuple[Ints, ...],
    training: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    stem = _Stem(input, windows)
    if not stem.small:
        normal = batch_norm_act_elemt(input, stats, weight, bias, None, eps, *RELU.arguments)
        if not training:
            return max_pool(normal, *windows), None, None
        output, offsets = max_pool_with_offsets(normal, *windows, False)  # pyright: ignore[reportCallIssue]
        return output, offsets, max_pool_gather(input, offsets, *windows)
    output = _library.empty(input, windows[0])
    offsets = _library.empty(input, windows[0], torch.uint8) if training else None
    winners = _library.empty(input, windows[0]) if training else None
    if output.numel():
        stem.launch(
            _pool_kernel,
            (stem.input, output, offsets, winners, stats, vector(weight), vector(bias)),
            (eps,),
            *stem.g.out[1:],
            tile_bytes=TRAINING_TILE_BYTES if training else TILE_BYTES,
        )
    return output, offsets, winners


def batch_norm_relu_max_pool(
    input: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *windows: Ints
) -> Tensor:
    return _pool(input, stats, weight, bias, eps, windows, False)[0]


def batch_norm_relu_max_pool_winners(
    input: Tensor, stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *windows: Ints
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return _pool(input, stats, weight, bias, eps, windows, True)


def batch_norm_relu_max_pool_backward_elemt(
    grad: Tensor,
    offsets: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    count: float,
    eps: float,
    *windows: Ints,
) -> Tensor:
    stem = _Stem(input, windows)
    if not stem.small:
        spread = max_pool_backward(grad, offsets, list(input.shape), *windows)
        rest = count, eps, *RELU.arguments
        return batch_norm_act_backward_elemt(spread, input, stats, weight, bias, sums, *rest)
    grad_input = torch.empty_like(stem.input)
    if input.numel():
        cells = (triton.cdiv(n, step) for n, step in zip(stem.g.size[1:], stem.g.stride[1:], strict=True))
        tensors = (
            dense(grad, stem.last),
            dense(offsets, stem.last),
            stem.input,
            grad_input,
            stats,
            weight,
            bias,
            sums,
        )
        stem.launch(
            _backward_kernel, tensors, (1.0 / max(count, 1.0), eps), *cells, tile_bytes=TRAINING_TILE_BYTES
        )
    return grad_input
