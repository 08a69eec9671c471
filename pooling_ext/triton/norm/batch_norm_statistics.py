# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportInvalidTypeForm=false
"""The statistics of batch normalization in Triton.

They are shifted sums: a program takes the mean of its first tile as center, so that a float32 sum
of squares loses no more than the number of its tiles in rounding errors, however large the mean is (where
the center is far from the other elements, the deviation is as large). The programs' means and squared
deviations are merged in float64 by Chan, Golub and LeVeque's formula ("Algorithms for computing the
sample variance", 1983), in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch
from .batch_norm import Parts, store_parts
from .channels import SUMS, WARPS, Channels, add_lanes, program, tile


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


def batch_norm_stats(input: Tensor) -> Tensor:
    if input.numel() == 0:
        return input.new_zeros((2, input.shape[1]), dtype=torch.float64)
    return stats_parts(Channels(input)).merge()
