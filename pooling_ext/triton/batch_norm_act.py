# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportInvalidTypeForm=false
"""Batch normalisation with residual and ReLU in Triton.

The statistics are shifted sums: a program takes the mean of its first tile as center, so that a float32 sum
of squares loses no more than the number of its tiles in rounding errors, however large the mean is (where
the center is far from the other elements, the deviation is as large). The programs' means and squared
deviations are merged in float64 by Chan, Golub and LeVeque's formula ("Algorithms for computing the
sample variance", 1983), in a fixed order. The backward pass has the two passes of Ioffe and Szegedy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import Parts, affine, batch_norm_update_running, slopes, store_parts, through, vector
from .channels import EACH, SUMS, WARPS, Channels, add_lanes, program, tile
from .launching import launch

__all__ = [
    "batch_norm_stats",
    "batch_norm_act",
    "batch_norm_act_sums",
    "batch_norm_act_backward",
    "batch_norm_act_training",
    "batch_norm_act_training_backward",
    "batch_norm_update_running",
]


@triton.jit
def _stats_kernel(
    input,
    parts,
    counts,
    rows,
    channels,
    inner,
    tiles,
    blocks,
    splits,
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

    at, mask, n = tile(split, rows, channels, inner, exists, row, column, within, LAST, UNROLL, ROWS, COLUMNS)
    first = tl.sum(tl.load(input + at, mask=mask, other=0.0).to(acc), 0, keep_dims=True)
    center = (add_lanes(first, LAST) / n).to(acc)
    count = tl.cast(0, tl.int64)
    deviations = tl.full((1, ROWS, COLUMNS), 0.0, acc)
    squares = tl.full((1, ROWS, COLUMNS), 0.0, acc)
    for i in range(split, tiles, splits):
        at, mask, n = tile(i, rows, channels, inner, exists, row, column, within, LAST, UNROLL, ROWS, COLUMNS)
        x = tl.load(input + at, mask=mask, other=0.0).to(acc)
        d = tl.where(mask, x - center, 0.0)
        deviations += tl.sum(d, 0, keep_dims=True)
        squares += tl.sum(d * d, 0, keep_dims=True)
        count += n

    away = add_lanes(deviations, LAST)
    mean = away / count
    store_parts(
        parts,
        split,
        center.to(tl.float64) + mean,
        add_lanes(squares, LAST) - away * mean,
        channels,
        channel,
        exists,
    )
    tl.store(counts + split, count.to(tl.float64), mask=tl.program_id(0) % blocks == 0)


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
    RELU: tl.constexpr,
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
        if RELU:
            z = tl.where(z < 0.0, 0.0, z)
        tl.store(output + at, z.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _sums_kernel(
    grad,
    input,
    output,
    masked,
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
    RELU: tl.constexpr,
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
        if output is not None:
            g = through(tl.load(output + at, mask=mask, other=0.0).to(acc), g)
            tl.store(masked + at, g.to(masked.dtype.element_ty), mask=mask)
        d = tl.where(mask, x - center, 0.0)
        if RELU and output is None:
            g = through(tl.fma(d, scale, shift), g)
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
    RELU: tl.constexpr,
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
        if RELU or sums is not None:
            d = tl.load(input + at, mask=mask).to(acc) - center
        if RELU:
            g = through(tl.fma(d, scale, shift), g)
        y = g * scale
        if sums is not None:
            y += tl.fma(d, slope, offset)
        tl.store(grad_input + at, y.to(grad_input.dtype.element_ty), mask=mask)


def stats_parts(view: Channels) -> Parts:
    """Each program's means and squared deviations."""
    walk = view.all()
    parts = Parts(view.input, walk.splits(SUMS))
    launch(
        _stats_kernel,
        (walk.blocks * parts.splits,),
        view.input,
        parts.sums,
        parts.counts,
        *walk.shape,
        parts.splits,
        num_warps=WARPS,
        **walk.constants,
    )
    return parts


def act(
    view: Channels,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
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
        RELU=relu,
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
    output: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor | None, Parts]:
    """The masked gradient where a residual went into the output, and each program's sums."""
    walk = view.all()
    parts = Parts(view.input, walk.splits(SUMS))
    masked = None if output is None else view.empty()
    launch(
        _sums_kernel,
        (walk.blocks * parts.splits,),
        view.like(grad),
        view.input,
        None if output is None else view.like(output),
        masked,
        parts.sums,
        stats,
        vector(weight),
        vector(bias),
        *walk.shape,
        parts.splits,
        eps,
        RELU=relu,
        num_warps=WARPS,
        **walk.constants,
    )
    return masked, parts


def spread_gradient(
    view: Channels,
    grad: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    count: float,
    eps: float,
    relu: bool,
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
        RELU=relu,
        num_warps=WARPS,
        **walk.constants,
    )
    return grad_input


def batch_norm_stats(input: Tensor) -> Tensor:
    if input.numel() == 0:
        return input.new_zeros((2, input.shape[1]), dtype=torch.float64)
    return stats_parts(Channels(input)).merge()


def batch_norm_act(
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    return act(Channels(input), stats, weight, bias, residual, eps, relu)


def batch_norm_act_sums(
    grad: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    view = Channels(input)
    masked, parts = sums_parts(view, grad, stats, weight, bias, output, eps, relu)
    return input.new_empty(0) if masked is None else masked, parts.total(stats, eps)


def batch_norm_act_backward(
    grad: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sums: Tensor | None,
    count: float,
    eps: float,
    relu: bool,
) -> Tensor:
    return spread_gradient(Channels(input), grad, stats, weight, bias, sums, count, eps, relu)


def batch_norm_act_training(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    view = Channels(input)
    if input.numel() == 0:
        return view.empty(), input.new_zeros((2, view.channels), dtype=torch.float64)
    stats = stats_parts(view).merge()
    return act(view, stats, weight, bias, residual, eps, relu), stats


def batch_norm_act_training_backward(
    grad: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    view = Channels(input)
    grad_weight, grad_bias = (
        None if x is None else input.new_empty(x.shape, dtype=x.dtype) for x in (weight, bias)
    )
    masked, parts = sums_parts(view, grad, stats, weight, bias, output, eps, relu)
    sums = parts.total(stats, eps, grad_weight, grad_bias)
    if masked is not None:
        grad, relu = masked, False
    count = view.batch * view.inner
    grad_input = spread_gradient(view, grad, stats, weight, bias, sums, count, eps, relu)
    none = input.new_empty(0, dtype=torch.float64)
    return (
        grad_input,
        input.new_empty(0) if masked is None else masked,
        none if grad_weight is None else grad_weight,
        none if grad_bias is None else grad_bias,
    )
