"""The gradient of a convolution's weights: the product of the output's gradient, transposed, and the input.

Its rows are features, its columns the channels at one tap of the windows, and it sums over pixels, of which
there are many more than of either. So programs share the pixels of a tile (split K), each writes its sums,
and a second kernel adds these up in a fixed order. What is read lies in channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.conv import channels_last, check_dtypes, check_like, check_norm, empty, geometry
from ..launching import launch
from ..norm.batch_norm import affine_of
from .conv_configs import Card, Config, Problem, card, configurations, weight_grad_problem
from .gemm import coefficients, normalized_by, pixels, product

#: Programs for each multiprocessor, if there is as much to do, and the pixels that each sums over at least:
#: a program writes the sums of its tile, which costs as much as reading a few hundred pixels.
PROGRAMS, LEAST_PIXELS = 2, 1024
#: Of the second stage: sums that a program adds up, and how many of them lie side by side at least.
SUMS, ADJACENT = 1024, 32


@triton.jit
def conv_weight_grad_kernel(
    grad,
    x,
    output,
    affine,
    M,
    N,
    K,
    split_steps,
    height,
    width,
    out_height,
    out_width,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write (M, KERNEL_H, KERNEL_W, N) for each split: sums over the split's pixels, of K in all.

    Programs of one split are neighbors, so that they find its pixels in the L2 cache.

    Args:
        grad: (K, M), where K are images of (out_height, out_width).
        x: images of (height, width, N).
        affine: the batch norm that ``x`` is yet to pass, with RELU, or None.
        split_steps: how often BLOCK_K pixels a split has; the last may have fewer.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * (KERNEL_H * KERNEL_W) * tiles_n
    split = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    tap = tile // tiles_n % (KERNEL_H * KERNEL_W)
    m = tile // (tiles_n * KERNEL_H * KERNEL_W) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_ok, n_ok = m < M, n < N
    if affine is not None:
        center, scale, shift = coefficients(affine, n, n_ok, N)

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(split * split_steps, tl.minimum((split + 1) * split_steps, tl.cdiv(K, BLOCK_K))):
        first = tl.cast(step, tl.int64) * BLOCK_K
        pixel = first + tl.arange(0, BLOCK_K)
        ok = tl.arange(0, BLOCK_K) < tl.minimum(K - first, BLOCK_K).to(tl.int32)
        grad_tile = tl.load(
            (grad + pixel * M)[:, None] + m[None, :], mask=ok[:, None] & m_ok[None, :], other=0.0
        )
        # Each pixel of the output is made of the one at its own position.
        if KERNEL_H * KERNEL_W * STRIDE_H * STRIDE_W == 1 and PADDING_H + PADDING_W == 0:
            x_rows = x + pixel * N
        else:
            image, row, column = pixels(first, BLOCK_K, out_height, out_width)
            row = row * STRIDE_H - PADDING_H + tap // KERNEL_W * DILATION_H
            column = column * STRIDE_W - PADDING_W + tap % KERNEL_W * DILATION_W
            ok = ok & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            x_rows = x + ((image * height + row) * width + column) * N
        x_tile = tl.load(x_rows[:, None] + n[None, :], mask=ok[:, None] & n_ok[None, :], other=0.0)
        if affine is not None:
            x_tile = normalized_by(x_tile, center, scale, shift, RELU)
            x_tile = tl.where(ok[:, None], x_tile, 0.0)  # the padding is of what is normalized
        sums = product(tl.trans(grad_tile), x_tile, sums, PRECISION)

    row = (split.to(tl.int64) * M + m) * (KERNEL_H * KERNEL_W) + tap
    at = (row * N)[:, None] + n[None, :]
    tl.store(output + at, sums.to(output.dtype.element_ty), mask=m_ok[:, None] & n_ok[None, :])


@triton.jit
def _add_splits_kernel(parts, output, count, splits, SPLITS: tl.constexpr, COUNT: tl.constexpr):
    """The sums of all splits, each of ``count`` numbers."""
    at = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    exists = at < count
    sums = tl.zeros((SPLITS, COUNT), tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        row = parts + split.to(tl.int64)[:, None] * count + at[None, :]
        sums += tl.load(row, mask=(split < splits)[:, None] & exists[None, :], other=0.0)
    tl.store(output + at, tl.sum(sums, 0).to(output.dtype.element_ty), mask=exists)


def splits_of(problem: Problem, taps: int, config: Config, card: Card) -> tuple[int, int]:
    """How many programs share the pixels of a tile, and how many steps of block_k pixels each takes."""
    tiles = triton.cdiv(problem.m, config.block_m) * triton.cdiv(problem.n, config.block_n) * taps
    steps = triton.cdiv(problem.k, config.block_k)
    least = triton.cdiv(LEAST_PIXELS, config.block_k)
    most = max(PROGRAMS * card.processors // tiles, 1)
    split_steps = max(triton.cdiv(steps, most), least)
    return max(triton.cdiv(steps, split_steps), 1), split_steps


def _default(suited: Sequence[Config]) -> Config:
    """The largest tile, since splits keep all multiprocessors busy; steps of 64 pixels spill on sm_80."""
    return next((config for config in suited if config.block_k <= 32), suited[0])


def conv_weight_grad(
    grad: Tensor,
    input: Tensor,
    weight_size: Sequence[int],
    stats: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    config: Config | None = None,
) -> Tensor:
    """The gradient of a convolution's weights.

    With ``stats`` the convolution was of
    ``batch_norm_act_elemt(input, stats, bn_weight, bn_bias, None, eps, relu)``, which is made as ``input`` is
    read.

    Args:
        grad: ``(N, O, H_out, W_out)``, the gradient of the output, of the input's dtype.
        input: ``(N, C, H, W)``, float32, bfloat16 or float16; any strides, but channels_last is not copied.
        weight_size: ``(O, C, KH, KW)``.
        stats, bn_weight, bn_bias, stride, padding, dilation, config: as for :func:`conv_stats`.

    Returns:
        ``weight_size`` in channels_last, in the input's dtype; sums are in float32.

    Raises:
        ArgumentError: an argument does not go with the others.
    """
    found = geometry(input.shape, weight_size, stride, padding, dilation)
    check_dtypes("input", input, input)
    check_like("grad", grad, found.output_shape, "input", input)
    affine = None
    if stats is not None:
        check_norm(stats, bn_weight, bn_bias, found.channels)
        affine = affine_of(stats, bn_weight, bn_bias, eps)

    problem = weight_grad_problem(found, input.dtype)
    available = card(input.device)
    config = config or _default(configurations(problem, available))
    taps = found.kernel_size[0] * found.kernel_size[1]
    splits, split_steps = splits_of(problem, taps, config, available)
    output = empty(input, weight_size)
    parts = output
    if splits > 1:
        parts = input.new_empty((splits, output.numel()), dtype=torch.float32)
    tiles = triton.cdiv(problem.m, config.block_m) * triton.cdiv(problem.n, config.block_n) * taps
    options: dict[str, Any] = config.options
    options.pop("GROUP")
    launch(
        conv_weight_grad_kernel,
        (splits * tiles, 1, 1),
        *(channels_last(grad), channels_last(input), parts, affine, problem.m, problem.n, problem.k),
        *(split_steps, *found.size, *found.output_size),
        STRIDE_H=found.stride[0],
        STRIDE_W=found.stride[1],
        **found.window,
        RELU=relu,
        PRECISION=problem.precision,
        **options,
    )
    if splits > 1:
        at_once = min(SUMS // ADJACENT, triton.next_power_of_2(splits))
        count, wide = output.numel(), SUMS // at_once
        grid = (triton.cdiv(count, wide),)
        launch(_add_splits_kernel, grid, parts, output, count, splits, SPLITS=at_once, COUNT=wide)
    return output
