"""Each channel's numbers over a whole tensor from those that a kernel's tiles leave, in float64.

Tiles' means and squared deviations are combined with Chan, Golub and LeVeque's update ("Updating Formulae
and a Pairwise Algorithm for Computing Sample Variances", 1979), sums are added; in an order that depends on
the tiles alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch

#: How many tiles one program combines; with more there is another round.
TILES = 256
BLOCK_T, BLOCK_C = 16, 32


@triton.jit
def _combine_kernel(
    partials,
    output,
    stats,
    tiles,
    unit,
    total,
    C,
    MEANS: tl.constexpr,
    LAST: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Combine TILES of ``partials``, (tiles, 2, C), into one of ``output``, all float64 but ``partials``.

    Args:
        stats: None, or (2, C), from whose means as float32 the sums' deviations are, but are to be from them.
        unit: the elements in each tile but perhaps the last, of ``total``.
        MEANS: they are means and squared deviations, not sums.
        LAST: the result is the final one, so variances.
    """
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = channel < C
    first = program * TILES
    last = tl.minimum(first + TILES, tiles)
    count = tl.minimum(unit * TILES, total - program.to(tl.int64) * TILES * unit).to(tl.float64)

    ahead = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    second = tl.zeros((BLOCK_T, BLOCK_C), tl.float64)
    for start in range(first, last, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = (tile < last)[:, None] & ok[None, :]
        at = partials + (tile.to(tl.int64) * (2 * C))[:, None] + channel[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        if MEANS:
            elements = tl.minimum(total - tile.to(tl.int64) * unit, unit).to(tl.float64)
            value *= elements[:, None]
        ahead += value
        second += tl.load(at + C, mask=mask, other=0.0).to(tl.float64)
    one = tl.sum(ahead, 0)
    if MEANS:
        one /= count
        for start in range(first, last, BLOCK_T):
            tile = start + tl.arange(0, BLOCK_T)
            mask = (tile < last)[:, None] & ok[None, :]
            at = partials + (tile.to(tl.int64) * (2 * C))[:, None] + channel[None, :]
            apart = tl.load(at, mask=mask, other=0.0).to(tl.float64) - one[None, :]
            elements = tl.minimum(total - tile.to(tl.int64) * unit, unit).to(tl.float64)
            second += tl.where(mask, apart * apart * elements[:, None], 0.0)
    two = tl.sum(second, 0)
    if LAST and MEANS:
        two /= count
    if LAST and stats is not None:
        mean = tl.load(stats + channel, mask=ok, other=0.0)
        two -= (mean - mean.to(tl.float32).to(tl.float64)) * one
    at = output + program.to(tl.int64) * (2 * C) + channel
    tl.store(at, one, mask=ok)
    tl.store(at + C, two, mask=ok)


def new_partials(like: Tensor, tiles: int, channels: int) -> Tensor:
    """Where a kernel leaves two numbers of each tile and channel of a tensor of the dtype of ``like``."""
    # float32 holds the mean of a tile of 16-bit values to far more than their rounding.
    wide = torch.float64 if like.dtype == torch.float32 else torch.float32
    return like.new_empty((tiles, 2, channels), dtype=wide)


def _combine(partials: Tensor, stats: Tensor | None, unit: int, total: int, means: bool) -> Tensor:
    tiles, _, channels = partials.shape
    if tiles == 0:
        return partials.new_zeros((2, channels), dtype=torch.float64)
    while True:
        programs = triton.cdiv(tiles, TILES)
        output = partials.new_empty((programs, 2, channels), dtype=torch.float64)
        launch(
            _combine_kernel,
            (programs, triton.cdiv(channels, BLOCK_C), 1),
            partials,
            output,
            stats,
            tiles,
            unit,
            total,
            channels,
            MEANS=means,
            LAST=programs == 1,
            TILES=TILES,
            BLOCK_T=BLOCK_T,
            BLOCK_C=BLOCK_C,
        )
        if programs == 1:
            return output[0]
        partials, tiles, unit = output, programs, unit * TILES


def combine_means(partials: Tensor, unit: int, total: int) -> Tensor:
    """The statistics of ``total`` elements of each channel, as batch_norm_stats has them.

    Args:
        partials: ``(tiles, 2, C)``: means and sums of squared deviations of tiles of ``unit`` elements (the
            last of what is left).

    Returns:
        ``(2, C)`` float64: means and biased variances; zeros where there are no elements.
    """
    return _combine(partials, None, unit, total, True)


def combine_sums(partials: Tensor, stats: Tensor) -> Tensor:
    """The sums that batch_norm_act_sums has, from those of tiles about the means as float32.

    Args:
        partials: ``(tiles, 2, C)``: of the gradient, and of its products with the deviations.
        stats: ``(2, C)`` float64: means and variances.

    Returns:
        ``(2, C)`` float64.
    """
    return _combine(partials, stats.contiguous(), 1, 1, False)


@triton.jit
def _affine_kernel(stats, weight, bias, affine, C, eps, BLOCK_C: tl.constexpr):
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = channel < C
    mean = tl.load(stats + channel, mask=ok, other=0.0)
    variance = tl.load(stats + C + channel, mask=ok, other=1.0)
    scale = 1.0 / tl.sqrt(variance + eps)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=ok, other=0.0).to(tl.float64)
    center = mean.to(tl.float32)
    shift = (center.to(tl.float64) - mean) * scale
    if bias is not None:
        shift += tl.load(bias + channel, mask=ok, other=0.0).to(tl.float64)
    tl.store(affine + channel, center, mask=ok)
    tl.store(affine + C + channel, scale.to(tl.float32), mask=ok)
    tl.store(affine + 2 * C + channel, shift.to(tl.float32), mask=ok)


def affine_of(stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """A batch norm as ``(x - center) * scale + shift``: these three, float32 ``(3, C)``.

    The center is the mean as float32, so that nothing is lost where it is large beside the deviation.
    """
    channels = stats.shape[1]
    affine = stats.new_empty((3, channels), dtype=torch.float32)
    block = 128
    grid = (triton.cdiv(channels, block), 1, 1)
    weight, bias = (None if x is None else x.contiguous() for x in (weight, bias))
    launch(_affine_kernel, grid, stats.contiguous(), weight, bias, affine, channels, eps, BLOCK_C=block)
    return affine
