# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportInvalidTypeForm=false
"""What the kernels on batch normalization share: its coefficients, and the sums of all programs.

As on the CPU, ``y = (x - center) * scale + shift``: the center is the mean rounded to the type that
kernels compute in, so that the difference loses nothing where the mean is large beside the deviation,
and what the rounding left goes into the shift.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching import launch
from ..pool.geometry import WARP_SIZE

#: Channels of a program that updates running statistics, and of one that makes coefficients.
RUNNING_CHANNELS = AFFINE_CHANNELS = 128
#: How many programs' sums one of the second stage adds up at a time, how many channels it has at least, and
#: how many sums in all.
MERGE_SPLITS, MERGE_CHANNELS, MERGE_SUMS, MERGE_WARPS = 512, 4, 2048, 256 // WARP_SIZE


@triton.jit
def inverse_root(value, acc: tl.constexpr):
    """``1 / sqrt(value)`` of a float64: for float32, by a Newton step from the approximate one."""
    if acc == tl.float64:
        return 1.0 / tl.sqrt(value)
    else:
        near = tl.rsqrt(value.to(tl.float32)).to(tl.float64)
        nearer = near * (1.5 - 0.5 * value * near * near)
        return tl.where(tl.abs(nearer) < float("inf"), nearer, near)


@triton.jit
def affine(stats, weight, bias, channels, channel, exists, eps, acc: tl.constexpr):
    """Center, scale and shift of each channel, what the center leaves of the mean, and 1 / deviation."""
    mean = tl.load(stats + channel, mask=exists, other=0.0)
    inverse = inverse_root(tl.load(stats + channels + channel, mask=exists, other=1.0) + eps, acc)
    center = mean.to(acc)
    away = mean - center.to(tl.float64)
    scale = inverse.to(acc)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=exists).to(acc)
    shift = -away.to(acc) * scale
    if bias is not None:
        shift += tl.load(bias + channel, mask=exists).to(acc)
    return center, scale, shift, away, inverse


@triton.jit
def slopes(sums, scale, away, inverse, channels, channel, exists, share, acc: tl.constexpr):
    """Slope and offset of the input's gradient ``g * scale + (x - center) * slope + offset``.

    Args:
        share: of an element in a mean; to divide in float64 takes a call that spills registers.
    """
    mean = tl.load(sums + channel, mask=exists, other=0.0) * share
    product = tl.load(sums + channels + channel, mask=exists, other=0.0) * share
    product = product * inverse * inverse
    wide = scale.to(tl.float64)
    return (-wide * product).to(acc), (wide * (away * product - mean)).to(acc)


@triton.jit
def relu_backward(z, grad):
    """The gradient of what ReLU was given; a NaN lets it through, as in PyTorch."""
    return tl.where(z <= 0.0, 0.0, grad)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """A float64 in another type; there is no direct way to bfloat16."""
    if dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32).to(dtype)


@triton.jit
def store_parts(parts, split, first, second, channels, channel, exists):
    """One program's two rows of ``parts``."""
    row = parts + split.to(tl.int64) * 2 * channels + channel
    tl.store(row, first, mask=exists)
    tl.store(row + channels, second, mask=exists)


@triton.jit
def _merge_kernel(
    parts,
    counts,
    stats,
    channels,
    splits,
    unit,
    total,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Means and variances from those of the programs: Chan, Golub and LeVeque's formula for all at once.

    Without ``counts`` each has ``unit`` elements of ``total``, but perhaps the last.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    first = tl.load(parts + channel, mask=exists, other=0.0).to(tl.float64)
    count = tl.full((SPLITS,), 0.0, tl.float64)
    away = tl.full((SPLITS, CHANNELS), 0.0, tl.float64)
    deviation = tl.full((SPLITS, CHANNELS), 0.0, tl.float64)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        some = split < splits
        if counts is not None:
            n = tl.load(counts + split, mask=some, other=0.0)
        else:
            left = total - split.to(tl.int64) * unit
            n = tl.maximum(tl.minimum(left, unit), 0).to(tl.float64)
        mask = some[:, None] & exists[None, :]
        row = parts + split.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        mean = tl.load(row, mask=mask, other=0.0).to(tl.float64)
        # As a difference to the first, so that nothing is lost where means are large.
        difference = tl.where(mask, mean - first[None, :], 0.0)
        count += n
        away += n[:, None] * difference
        squares = tl.load(row + channels, mask=mask, other=0.0).to(tl.float64)
        deviation += squares + n[:, None] * difference * difference
    elements = tl.sum(count, 0)
    offset = tl.sum(away, 0) / elements
    variance = tl.sum(deviation, 0) / elements - offset * offset
    tl.store(stats + channel, first + offset, mask=exists)
    tl.store(stats + channels + channel, variance, mask=exists)


@triton.jit
def _running_kernel(
    running_mean,
    running_var,
    stats,
    channels,
    mean_step,
    var_step,
    factor: tl.float64,
    momentum: tl.float64,
    CHANNELS: tl.constexpr,
):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    mean = tl.load(stats + channel, mask=exists)
    variance = tl.load(stats + channels + channel, mask=exists) * factor
    _update(running_mean + channel * mean_step, mean, momentum, exists)
    _update(running_var + channel * var_step, variance, momentum, exists)


@triton.jit
def _update(running, batch, momentum, exists):
    """As torch.lerp, and in float64, so that 16 bits are rounded once."""
    before = tl.load(running, mask=exists).to(tl.float64)
    difference = batch - before
    low, high = before + momentum * difference, batch - difference * (1.0 - momentum)
    after = tl.where(tl.abs(momentum + tl.zeros_like(before)) < 0.5, low, high)
    tl.store(running, narrow(after, running.dtype.element_ty), mask=exists)


@triton.jit
def _total_kernel(
    parts,
    sums,
    stats,
    grad_weight,
    grad_bias,
    channels,
    splits,
    eps: tl.float64,
    DOUBLE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The programs' sums added up, and from products with ``x - center`` to products with ``x - mean``."""
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    first = tl.full((SPLITS, CHANNELS), 0.0, tl.float64)
    second = tl.full((SPLITS, CHANNELS), 0.0, tl.float64)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        mask = (split < splits)[:, None] & exists[None, :]
        row = parts + split.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        first += tl.load(row, mask=mask, other=0.0).to(tl.float64)
        second += tl.load(row + channels, mask=mask, other=0.0).to(tl.float64)
    mean = tl.load(stats + channel, mask=exists, other=0.0)
    gradients = tl.sum(first, 0)
    products = tl.sum(second, 0) - (mean - mean.to(acc).to(tl.float64)) * gradients
    tl.store(sums + channel, gradients, mask=exists)
    tl.store(sums + channels + channel, products, mask=exists)
    if grad_bias is not None:
        tl.store(grad_bias + channel, narrow(gradients, grad_bias.dtype.element_ty), mask=exists)
    if grad_weight is not None:
        variance = tl.load(stats + channels + channel, mask=exists, other=1.0)
        slope = products * inverse_root(variance + eps, acc)
        tl.store(grad_weight + channel, narrow(slope, grad_weight.dtype.element_ty), mask=exists)


class Parts:
    """Two numbers for each channel and program, and how they become those of all in a fixed order.

    Args:
        input: what they are of; its channels, dtype and device.
        splits: how many programs share a channel.
        elements: of a channel for each program (the last has what is left), and in all. Without it the
            programs write how many they have into ``counts``, where that is of interest.
        brief: keep those of 16-bit values in float32, since there are many, each of few elements.
    """

    def __init__(
        self, input: Tensor, splits: int, elements: tuple[int, int] | None = None, brief: bool = False
    ):
        self.channels, self.splits = input.shape[1], splits
        self.double = input.dtype == torch.float64
        wide = torch.float32 if brief and input.dtype.itemsize == 2 else torch.float64
        self.sums = input.new_empty(splits * 2 * self.channels, dtype=wide)
        self.counts = input.new_empty(splits, dtype=torch.float64) if elements is None else None
        self.elements = elements or (0, 0)

    def merge(self) -> Tensor:
        """Statistics out of means and sums of squared deviations; zeros where there are none."""
        stats = self._result()
        if self.splits == 0:
            return stats.zero_()
        self._launch(_merge_kernel, self.sums, self.counts, stats, after=self.elements)
        return stats

    def total(
        self, stats: Tensor, eps: float, grad_weight: Tensor | None = None, grad_bias: Tensor | None = None
    ) -> Tensor:
        """Sums out of sums; the gradients of the parameters are made on the way."""
        sums = self._result()
        tensors = self.sums, sums, stats, grad_weight, grad_bias
        self._launch(_total_kernel, *tensors, after=(eps,), DOUBLE=self.double)
        return sums

    def _result(self) -> Tensor:
        return self.sums.new_empty((2, self.channels), dtype=torch.float64)

    def _launch(self, kernel: Any, *tensors: Tensor | None, after: tuple = (), **constants: Any) -> None:
        n = self.channels
        at_once = min(MERGE_SPLITS, triton.next_power_of_2(max(self.splits, 1)))
        width = max(min(MERGE_SUMS // at_once, triton.next_power_of_2(n)), MERGE_CHANNELS)
        constants |= {"CHANNELS": width, "SPLITS": at_once}
        grid = (triton.cdiv(n, width),)
        launch(kernel, grid, *tensors, n, self.splits, *after, num_warps=MERGE_WARPS, **constants)


def vector(values: Tensor | None) -> Tensor | None:
    """A parameter as kernels read it."""
    return None if values is None else values.contiguous()


@triton.jit
def _affine_kernel(stats, weight, bias, coefficients, channels, eps: tl.float64, CHANNELS: tl.constexpr):
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    center, scale, shift, _away, _inverse = affine(
        stats, weight, bias, channels, channel, exists, eps, tl.float32
    )
    tl.store(coefficients + channel, center, mask=exists)
    tl.store(coefficients + channels + channel, scale, mask=exists)
    tl.store(coefficients + 2 * channels + channel, shift, mask=exists)


def affine_of(stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """A batch norm as ``(x - center) * scale + shift``: these three, float32 ``(3, C)``."""
    channels = stats.shape[1]
    coefficients = stats.new_empty((3, channels), dtype=torch.float32)
    tensors = stats.contiguous(), vector(weight), vector(bias), coefficients
    grid = (triton.cdiv(channels, AFFINE_CHANNELS),)
    launch(_affine_kernel, grid, *tensors, channels, eps, CHANNELS=AFFINE_CHANNELS)
    return coefficients


def batch_norm_update_running(
    running_mean: Tensor, running_var: Tensor, stats: Tensor, count: float, momentum: float
) -> None:
    channels = running_mean.numel()
    launch(
        _running_kernel,
        (triton.cdiv(channels, RUNNING_CHANNELS),),
        running_mean,
        running_var,
        stats,
        channels,
        running_mean.stride(0),
        running_var.stride(0),
        float(count / (count - 1)),
        float(momentum),
        CHANNELS=RUNNING_CHANNELS,
    )
