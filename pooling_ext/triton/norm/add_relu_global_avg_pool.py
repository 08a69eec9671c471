# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportInvalidTypeForm=false
"""Residual add, ReLU and global average pooling in Triton: each plane is one program's, and read once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...ops import _library
from ..launching import launch
from .batch_norm import narrow, relu_backward
from .channels import WARPS, Channels, add_lanes, program, tile


@triton.jit
def _forward_kernel(
    input,
    residual,
    output,
    rows,
    channels,
    inner,
    tiles,
    blocks,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    channels, inner, image, channel, exists, row, column, within = program(
        channels, inner, blocks, LAST, VECTOR, UNROLL, ROWS, COLUMNS
    )
    within += image.to(tl.int64) * rows * channels * inner
    total = tl.full((1, ROWS, COLUMNS), 0.0, acc)
    for i in range(tiles):
        at, mask, _n = tile(
            i, rows, channels, inner, exists, row, column, within, LAST, UNROLL, ROWS, COLUMNS
        )
        z = tl.load(input + at, mask=mask, other=0.0).to(acc)
        z += tl.load(residual + at, mask=mask, other=0.0).to(acc)
        total += tl.sum(tl.where(z < 0.0, 0.0, z), 0, keep_dims=True)
    mean = narrow(add_lanes(total, LAST) / (rows * inner), output.dtype.element_ty)
    tl.store(output + image.to(tl.int64) * channels + channel, mean, mask=exists)


@triton.jit
def _backward_kernel(
    grad,
    input,
    residual,
    shared,
    rows,
    channels,
    inner,
    tiles,
    blocks,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    channels, inner, image, channel, exists, row, column, within = program(
        channels, inner, blocks, LAST, VECTOR, UNROLL, ROWS, COLUMNS
    )
    within += image.to(tl.int64) * rows * channels * inner
    share = tl.load(grad + image.to(tl.int64) * channels + channel, mask=exists).to(acc)
    share = (share.to(tl.float64) / (rows * inner)).to(acc)
    for i in range(tiles):
        at, mask, _n = tile(
            i, rows, channels, inner, exists, row, column, within, LAST, UNROLL, ROWS, COLUMNS
        )
        z = tl.load(input + at, mask=mask).to(acc) + tl.load(residual + at, mask=mask).to(acc)
        tl.store(shared + at, relu_backward(z, share).to(shared.dtype.element_ty), mask=mask)


def add_relu_global_avg_pool(input: Tensor, residual: Tensor) -> Tensor:
    view = Channels(input)
    output = _library.empty(input, (1, 1))
    _launch(_forward_kernel, view, view.input, view.like(residual), output)
    return output


def add_relu_global_avg_pool_backward(grad: Tensor, input: Tensor, residual: Tensor) -> Tensor:
    view = Channels(input)
    shared = view.empty()
    _launch(_backward_kernel, view, grad.contiguous(), view.input, view.like(residual), shared)
    return shared


def _launch(kernel, view: Channels, *tensors: Tensor) -> None:
    images, walk = view.each()
    launch(kernel, (walk.blocks * images,), *tensors, *walk.shape, num_warps=WARPS, **walk.constants)
