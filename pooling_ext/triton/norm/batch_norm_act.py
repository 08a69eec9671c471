# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportInvalidTypeForm=false
"""Batch normalization with residual and activation in Triton.

The backward pass has the two passes of Ioffe and Szegedy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.activations import ACTIVATIONS
from ..activations import activated, gradient
from ..launching import launch
from .batch_norm import Parts, affine, batch_norm_update_running, slopes, store_parts, vector
from .batch_norm_statistics import batch_norm_stats, stats_parts
from .channels import EACH, SUMS, WARPS, Channels, add_lanes, program, tile

__all__ = [
    "batch_norm_stats",
    "batch_norm_act_elemt",
    "batch_norm_act_backward_reduce",
    "batch_norm_act_backward_elemt",
    "batch_norm_act_training",
    "batch_norm_act_training_backward",
    "batch_norm_update_running",
]

_IDENTITY = ACTIVATIONS.index("identity")


@triton.jit
def _act_kernel(
    input,
    residual,
    output,
    stats,
    weight,
    bias,
    rows,
    channels,
    inner,
    tiles,
    blocks,
    splits,
    eps: tl.float64,
    negative_slope: tl.float64,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    channels, inner, split, channel, exists, row, column, within = program(
        channels, inner, blocks, LAST, VECTOR, UNROLL, ROWS, COLUMNS
    )
    center, scale, shift, _rest, _inverse = affine(stats, weight, bias, channels, channel, exists, eps, acc)
    # The last tile first: what the statistics read last may still be in the cache.
    for i in range(split, tiles, splits):
        at, mask, _n = tile(
            tiles - 1 - i, rows, channels, inner, exists, row, column, within, LAST, UNROLL, ROWS, COLUMNS
        )
        x = tl.load(input + at, mask=mask).to(acc)
        if residual is not None:
            added = tl.load(residual + at, mask=mask).to(acc)
        z = tl.fma(x - center, scale, shift)
        if residual is not None:
            z += added
        z = activated(z, negative_slope, ACTIVATION)
        tl.store(output + at, z.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _sums_kernel(
    grad,
    input,
    kept,
    residual_grad,
    parts,
    stats,
    weight,
    bias,
    rows,
    channels,
    inner,
    tiles,
    blocks,
    splits,
    eps: tl.float64,
    negative_slope: tl.float64,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    channels, inner, split, channel, exists, row, column, within = program(
        channels, inner, blocks, LAST, VECTOR, UNROLL, ROWS, COLUMNS
    )
    center, scale, shift, _rest, _inverse = affine(stats, weight, bias, channels, channel, exists, eps, acc)
    gradients = tl.full((1, ROWS, COLUMNS), 0.0, acc)
    products = tl.full((1, ROWS, COLUMNS), 0.0, acc)
    for i in range(split, tiles, splits):
        at, mask, _n = tile(
            i, rows, channels, inner, exists, row, column, within, LAST, UNROLL, ROWS, COLUMNS
        )
        g = tl.load(grad + at, mask=mask, other=0.0).to(acc)
        x = tl.load(input + at, mask=mask, other=0.0).to(acc)
        if kept is not None:
            other = tl.load(kept + at, mask=mask, other=0.0).to(acc)
        d = tl.where(mask, x - center, 0.0)
        z = tl.fma(d, scale, shift)
        if kept is not None:
            z = other if ACTIVATION == "relu" else z + other
        g = gradient(z, g, negative_slope, ACTIVATION)
        if kept is not None:
            tl.store(residual_grad + at, g.to(residual_grad.dtype.element_ty), mask=mask)
        gradients += tl.sum(g, 0, keep_dims=True)
        products += tl.sum(g * d, 0, keep_dims=True)
    store_parts(
        parts, split, add_lanes(gradients, LAST), add_lanes(products, LAST), channels, channel, exists
    )


@triton.jit
def _backward_kernel(
    grad,
    input,
    grad_input,
    stats,
    weight,
    bias,
    sums,
    rows,
    channels,
    inner,
    tiles,
    blocks,
    splits,
    share: tl.float64,
    eps: tl.float64,
    negative_slope: tl.float64,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    acc: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    channels, inner, split, channel, exists, row, column, within = program(
        channels, inner, blocks, LAST, VECTOR, UNROLL, ROWS, COLUMNS
    )
    center, scale, shift, away, inverse = affine(stats, weight, bias, channels, channel, exists, eps, acc)
    if sums is not None:
        slope, offset = slopes(sums, scale, away, inverse, channels, channel, exists, share, acc)
    for i in range(split, tiles, splits):
        at, mask, _n = tile(
            tiles - 1 - i, rows, channels, inner, exists, row, column, within, LAST, UNROLL, ROWS, COLUMNS
        )
        g = tl.load(grad + at, mask=mask).to(acc)
        if ACTIVATION != "identity" or sums is not None:
            d = tl.load(input + at, mask=mask).to(acc) - center
        if ACTIVATION != "identity":
            g = gradient(tl.fma(d, scale, shift), g, negative_slope, ACTIVATION)
        y = g * scale
        if sums is not None:
            y += tl.fma(d, slope, offset)
        tl.store(grad_input + at, y.to(grad_input.dtype.element_ty), mask=mask)


def act(
    view: Channels,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> Tensor:
    output = view.empty()
    walk = view.all()
    splits = walk.splits(EACH)
    launch(
        _act_kernel,
        (walk.blocks * splits,),
        view.input,
        None if residual is None else view.like(residual),
        output,
        stats,
        vector(weight),
        vector(bias),
        *walk.shape,
        splits,
        eps,
        negative_slope,
        ACTIVATION=ACTIVATIONS[activation],
        num_warps=WARPS,
        **walk.constants,
    )
    return output


def sums_parts(
    view: Channels,
    grad: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[Tensor | None, Parts]:
    """The gradient of the residual where one went into the output, and each program's sums."""
    walk = view.all()
    parts = Parts(view.input, walk.splits(SUMS))
    residual_grad = None if kept is None else view.empty()
    launch(
        _sums_kernel,
        (walk.blocks * parts.splits,),
        view.like(grad),
        view.input,
        None if kept is None else view.like(kept),
        residual_grad,
        parts.sums,
        stats,
        vector(weight),
        vector(bias),
        *walk.shape,
        parts.splits,
        eps,
        negative_slope,
        ACTIVATION=ACTIVATIONS[activation],
        num_warps=WARPS,
        **walk.constants,
    )
    return residual_grad, parts


def spread_gradient(
    view: Channels,
    grad: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    count: float,
    eps: float,
    activation: int,
    negative_slope: float,
) -> Tensor:
    grad_input = view.empty()
    walk = view.all()
    splits = walk.splits(EACH)
    launch(
        _backward_kernel,
        (walk.blocks * splits,),
        view.like(grad),
        view.input,
        grad_input,
        stats,
        vector(weight),
        vector(bias),
        sums,
        *walk.shape,
        splits,
        1.0 / max(count, 1.0),
        eps,
        negative_slope,
        ACTIVATION=ACTIVATIONS[activation],
        num_warps=WARPS,
        **walk.constants,
    )
    return grad_input


def batch_norm_act_elemt(
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> Tensor:
    return act(Channels(input), stats, weight, bias, residual, eps, activation, negative_slope)


def batch_norm_act_backward_reduce(
    grad: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    view = Channels(input)
    residual_grad, parts = sums_parts(view, grad, stats, weight, bias, kept, eps, activation, negative_slope)
    return input.new_empty(0) if residual_grad is None else residual_grad, parts.total(stats, eps)


def batch_norm_act_backward_elemt(
    grad: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    count: float,
    eps: float,
    activation: int,
    negative_slope: float,
) -> Tensor:
    rest = count, eps, activation, negative_slope
    return spread_gradient(Channels(input), grad, stats, weight, bias, sums, *rest)


def batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    view = Channels(input)
    if input.numel() == 0:
        return view.empty(), input.new_zeros((2, view.channels), dtype=torch.float64)
    stats = stats_parts(view).merge()
    return act(view, stats, weight, bias, residual, eps, activation, negative_slope), stats


def batch_norm_act_training_backward(
    grad: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kept: Tensor | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    view = Channels(input)
    grad_weight, grad_bias = (
        None if x is None else input.new_empty(x.shape, dtype=x.dtype) for x in (weight, bias)
    )
    residual_grad, parts = sums_parts(view, grad, stats, weight, bias, kept, eps, activation, negative_slope)
    sums = parts.total(stats, eps, grad_weight, grad_bias)
    if residual_grad is not None:
        grad, activation = residual_grad, _IDENTITY
    rest = view.batch * view.inner, eps, activation, negative_slope
    grad_input = spread_gradient(view, grad, stats, weight, bias, sums, *rest)
    none = input.new_empty(0, dtype=torch.float64)
    return (
        grad_input,
        input.new_empty(0) if residual_grad is None else residual_grad,
        none if grad_weight is None else grad_weight,
        none if grad_bias is None else grad_bias,
    )
