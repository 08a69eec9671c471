# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
"""Reductions of whole planes, as global pooling makes them, and their gradients.

Outputs come in groups of ``count`` that lie ``output_step`` apart in the input, each with ``size`` elements
``element_step`` apart: one group of every plane with steps (size, 1) in the contiguous format, a group for
each sample with steps (1, channels) in channels_last. A program reduces a block of ``[elements, outputs]``.
Where that makes too few programs, planes are cut into parts, whose results a second launch reduces.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch
from .geometry import CHANNEL_BYTES, WARP_SIZE, PoolGeometry, lowest
from .reductions import MAX, MEAN, accumulator, larger, power, root, wins

#: Values in a block, and how many programs are enough to occupy a large GPU.
BLOCK = 4096
ENOUGH_PROGRAMS = 512
#: The most parts of a plane, and the fewest elements in one.
MOST_PARTS = 64
PART = 1024
THREADS = 128


class Layout(NamedTuple):
    """Where the elements of each output lie, and how a program's block of them is shaped."""

    groups: int
    count: int
    size: int
    output_step: int
    element_step: int
    block: tuple[int, int]

    @property
    def blocks(self) -> int:
        """How many blocks of outputs there are."""
        return self.groups * triton.cdiv(self.count, self.block[1])


def _layout(groups: int, count: int, size: int, channels_last: bool, itemsize: int) -> Layout:
    elements = triton.next_power_of_2(size)
    if channels_last:
        across = min(triton.next_power_of_2(count), CHANNEL_BYTES // itemsize)
        return Layout(groups, count, size, 1, count, (min(elements, BLOCK // across), across))
    elements = min(elements, BLOCK // 2)
    across = min(triton.next_power_of_2(count), max(1, min(BLOCK // elements, 2**30 // size)))
    return Layout(groups, count, size, size, 1, (elements, 2 ** (across.bit_length() - 1)))


def layout_of(g: PoolGeometry, itemsize: int) -> Layout:
    """The layout of the planes of ``g``, whose only window is the whole plane."""
    size = g.size[0] * g.size[1] * g.size[2]
    if g.channels > 1:
        return _layout(g.outer, g.channels, size, True, itemsize)
    return _layout(1, g.outer, size, False, itemsize)


def pool_planes(
    x: Tensor,
    y: Tensor,
    offsets: Tensor | None,
    g: PoolGeometry,
    reduction: tl.constexpr,
    *,
    norm: int = 0,
    magnitude: bool = False,
    divisor: int = 0,
) -> None:
    """Write the reduction of each plane of dense ``x`` to ``y``, the winners' offsets to ``offsets``."""
    layout = layout_of(g, x.element_size())
    parts = min(MOST_PARTS, triton.cdiv(ENOUGH_PROGRAMS, layout.blocks), triton.cdiv(layout.size, PART))
    parts = max(parts, triton.cdiv(layout.size, 2**30))
    options = {"REDUCTION": reduction, "LOWEST": lowest(x.dtype) if reduction == MAX else 0, "NORM": norm}
    ending = {"FINISH": True, "DIVISOR": divisor or layout.size, "WHOLE": layout.size}
    if parts == 1:
        _launch(layout, 1, x, None, y, offsets, MAGNITUDE=magnitude, **options, **ending)
        return
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    outputs = y.numel()
    values = torch.empty((parts, outputs), dtype=dtype, device=x.device)
    winners = None if offsets is None else torch.empty((parts, outputs), dtype=torch.int64, device=x.device)
    _launch(
        layout,
        parts,
        x,
        None,
        values,
        winners,
        MAGNITUDE=magnitude,
        FINISH=False,
        DIVISOR=1,
        WHOLE=1,
        **options,
    )
    of_parts = _layout(1, outputs, parts, True, values.element_size())
    _launch(of_parts, 1, values, winners, y, offsets, MAGNITUDE=False, **options | ending | {"SUMMED": True})


def _launch(
    layout: Layout, parts: int, *tensors: Tensor | None, SUMMED: bool = False, **constants: object
) -> None:
    launch(
        _pool_planes,
        (layout.blocks * parts,),
        *tensors,
        layout.count,
        layout.size,
        layout.output_step,
        layout.element_step,
        triton.cdiv(triton.cdiv(layout.size, parts), layout.block[0]),
        parts,
        layout.groups * layout.count,
        SUMMED=SUMMED,
        BLOCK=layout.block,
        num_warps=THREADS // WARP_SIZE,
        num_stages=1,
        **constants,
    )


# A kernel is one function: what its branches leave out is left out as it is compiled.
@triton.jit
def _pool_planes(  # noqa: PLR0912, PLR0915
    x,
    winners,
    y,
    offsets,
    count,
    size,
    output_step,
    element_step,
    steps,
    parts,
    outputs,
    REDUCTION: tl.constexpr,
    NORM: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    LOWEST: tl.constexpr,
    SUMMED: tl.constexpr,
    FINISH: tl.constexpr,
    DIVISOR: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``steps`` blocks of one part of the planes. ``winners``: where ``x``'s values, of parts, come from."""
    ACC: tl.constexpr = accumulator(x, REDUCTION)
    blocks = tl.cdiv(count, BLOCK[1])
    block = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    first = block % blocks * BLOCK[1]
    group = (block // blocks).to(tl.int64)
    start = part.to(tl.int64) * steps * BLOCK[0]
    x += group * count * size + first.to(tl.int64) * output_step + start * element_step
    q = tl.arange(0, BLOCK[1])[None, :]
    element = tl.arange(0, BLOCK[0])[:, None]
    ok = first + q < count
    best = tl.full(BLOCK, LOWEST, ACC)
    where = tl.zeros((1, 1), tl.int32)
    if offsets is not None:
        # The first element of each thread stays its winner until something larger comes along.
        where = tl.broadcast_to(element, BLOCK)
    for step in tl.range(steps):
        at = element + step * BLOCK[0]
        there = ok & (start + at < size)
        v = tl.load(x + (element * element_step + q * output_step), mask=there, other=LOWEST).to(ACC)
        x += BLOCK[0] * element_step
        if REDUCTION == MEAN:
            if SUMMED:
                best += v
            else:
                best += power(v, NORM, MAGNITUDE)
        elif offsets is not None:
            better = wins(v, best)
            best = tl.where(better, v, best)
            where = tl.where(better, at, where)
        else:
            best = larger(best, v)
    to = group * count + first + tl.arange(0, BLOCK[1])
    if not FINISH:
        to += part.to(tl.int64) * outputs
    to_ok = first + tl.arange(0, BLOCK[1]) < count
    if REDUCTION == MEAN:
        result = tl.sum(best, 0)
        if FINISH:
            result = result / tl.full((1,), DIVISOR, ACC)
            if NORM > 0:
                result = root(result * WHOLE, NORM)
    else:
        # The maximum first, then the offset of whoever has it: the first of equals, the last NaN.
        result = tl.max(best, 0)
        nan = best != best
        any_nan = tl.max(nan.to(tl.int32), 0) > 0
        if ACC.is_floating():
            number = tl.max(tl.where(nan, LOWEST, best), 0)
            result = tl.where(any_nan, float("nan"), number).to(ACC)
        if offsets is not None:
            there = start + where < size
            last = tl.max(tl.where(nan & there, where, -1), 0)
            equal = tl.min(tl.where((best == result[None, :]) & there, where, 2147483647), 0)
            winner = tl.where(any_nan, last, equal)
            if winners is not None:
                winner = tl.load(winners + winner.to(tl.int64) * outputs + to, mask=to_ok, other=0)
            else:
                winner = start + winner
            tl.store(offsets + to, winner.to(offsets.dtype.element_ty), mask=to_ok)
    tl.store(y + to, result.to(y.dtype.element_ty), mask=to_ok)


def spread_planes(
    grad: Tensor, offsets: Tensor | None, result: Tensor, g: PoolGeometry, divisor: int = 0
) -> None:
    """Write the gradient of planes from that of their reductions: all to the winner, or to each its share."""
    layout = layout_of(g, grad.element_size())
    launch(
        _spread_planes,
        (layout.blocks * triton.cdiv(layout.size, layout.block[0]),),
        grad,
        offsets,
        result,
        layout.count,
        layout.size,
        layout.output_step,
        layout.element_step,
        DIVISOR=divisor or layout.size,
        BLOCK=layout.block,
        num_warps=THREADS // WARP_SIZE,
        num_stages=1,
    )


@triton.jit
def _spread_planes(
    grad,
    offsets,
    result,
    count,
    size,
    output_step,
    element_step,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = accumulator(grad, "sum")
    blocks = tl.cdiv(count, BLOCK[1])
    steps = tl.cdiv(size, BLOCK[0])
    block = tl.program_id(0) // steps
    start = (tl.program_id(0) % steps).to(tl.int64) * BLOCK[0]
    first = block % blocks * BLOCK[1]
    group = (block // blocks).to(tl.int64)
    result += group * count * size + first.to(tl.int64) * output_step + start * element_step
    q = tl.arange(0, BLOCK[1])[None, :]
    element = tl.arange(0, BLOCK[0])[:, None]
    ok = first + q < count
    part = tl.load(grad + (group * count + first) + q, mask=ok, other=0).to(ACC)
    if offsets is not None:
        offset = tl.load(offsets + (group * count + first) + q, mask=ok, other=0).to(tl.int64)
        part = tl.where(offset == start + element, part, 0)
    else:
        part = tl.broadcast_to(part / tl.full((1, 1), DIVISOR, ACC), BLOCK)
    to = element * element_step + q * output_step
    tl.store(result + to, part.to(result.dtype.element_ty), mask=ok & (start + element < size))
