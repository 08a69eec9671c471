"""The gradient of a convolution's input: the product of the output's gradient and the weights, as in conv.py.

Every pixel of the input gathers from the windows that it is in, so that nothing is added up in memory. With
a stride pixels are in windows at different taps (Dumoulin and Visin, "A guide to convolution arithmetic
for deep learning", 2016, section 4); those at the same ones are made together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import ArgumentError
from ...ops.conv import channels_last, check_dtypes, check_like, check_norm, empty, geometry
from ..launching import launch
from ..norm.batch_norm import Parts, affine_of
from .conv_configs import Config, card, default, input_grad_problem
from .gemm import finish_grad, grouped_tile, pixels, product
from .matmul import matmul_kernel


@triton.jit
def _first_tap(at, KERNEL: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, STEP: tl.constexpr):
    """The first tap with which ``at - tap * DILATION`` is a multiple of STRIDE, or KERNEL."""
    tap = KERNEL
    for candidate in tl.static_range(STEP - 1, -1, -1):  # pyright: ignore[reportGeneralTypeIssues]
        if candidate < KERNEL:
            fits = (at + candidate * DILATION * (STRIDE - 1)) % STRIDE == 0
            tap = tl.where(fits, candidate, tap)
    return tap


@triton.jit
def conv_input_grad_kernel(
    grad,
    weight,
    output,
    x,
    affine,
    partials,
    images,
    tiles,
    N,
    K,
    height,
    width,
    out_height,
    out_width,
    weight_step_k,
    weight_step_tap,
    weight_step_n,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    RELU: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write the gradient of ``images`` of (height, width, N), from ``grad``, (out_height, out_width, K) each.

    A tile is of pixels whose rows, and whose columns, leave the same remainder with the stride: they are in
    windows at the same taps, every STEP-th from a first one, so that no product with zero is made.

    Args:
        tiles: of pixels, of all kinds; as many of each as the one with the most pixels needs.
        weight: the element of channel k of ``grad``, tap (row by row) and n has these steps.
        x, affine: None, or the input of the batch norm and ReLU before, and that.
    """
    tile_m, tile_n = grouped_tile(tl.program_id(0), tiles, tl.cdiv(N, BLOCK_N), GROUP)
    remainder = tile_m % (STRIDE_H * STRIDE_W)
    over_h, over_w = remainder // STRIDE_W, remainder % STRIDE_W
    # How many rows and columns of an image there are of this kind.
    high = tl.maximum(tl.cdiv(height - over_h, STRIDE_H), 0)
    wide = tl.maximum(tl.cdiv(width - over_w, STRIDE_W), 0)
    first = (tile_m // (STRIDE_H * STRIDE_W)).to(tl.int64) * BLOCK_M
    row_ok = tl.arange(0, BLOCK_M) < images * high.to(tl.int64) * wide - first
    image, row, column = pixels(first, BLOCK_M, tl.maximum(high, 1), tl.maximum(wide, 1))
    row = row * STRIDE_H + over_h
    column = column * STRIDE_W + over_w
    offset = ((image * height + row) * width + column) * N

    first_h = _first_tap(over_h + PADDING_H, KERNEL_H, STRIDE_H, DILATION_H, STEP_H)
    first_w = _first_tap(over_w + PADDING_W, KERNEL_W, STRIDE_W, DILATION_W, STEP_W)
    taps_h, taps_w = tl.cdiv(KERNEL_H - first_h, STEP_H), tl.cdiv(KERNEL_W - first_w, STEP_W)
    # The output's pixel of which the window has this one at its first tap, which may be outside.
    down = row + PADDING_H - first_h * DILATION_H
    along = column + PADDING_W - first_w * DILATION_W
    down, along = down // STRIDE_H, along // STRIDE_W
    grad_rows = grad + ((image * out_height + down) * out_width + along) * K
    down = tl.where(row_ok, down, -(2**30))
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    blocks = tl.cdiv(K, BLOCK_K)
    for step in range(0, taps_h * taps_w * blocks):
        tap = step // blocks
        k = (step - tap * blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
        tap_h, tap_w = tap // taps_w, tap % taps_w
        back_h = tap_h * (STEP_H * DILATION_H // STRIDE_H)
        back_w = tap_w * (STEP_W * DILATION_W // STRIDE_W)
        y, z = down - back_h, along - back_w
        mask = ((y >= 0) & (y < out_height) & (z >= 0) & (z < out_width))[:, None]
        weight_mask = n_ok[None, :]
        if not EVEN_K:
            mask, weight_mask = mask & (k < K)[None, :], weight_mask & (k < K)[:, None]
        grad_at = (grad_rows - (back_h.to(tl.int64) * out_width + back_w) * K)[:, None] + k[None, :]
        tap = (first_h + tap_h * STEP_H) * KERNEL_W + first_w + tap_w * STEP_W
        weight_at = (weight + tap * weight_step_tap) + (k.to(tl.int64) * weight_step_k)[:, None]
        weight_at += (n.to(tl.int64) * weight_step_n)[None, :]
        tile = tl.load(grad_at, mask=mask, other=0.0)
        weights = tl.load(weight_at, mask=weight_mask, other=0.0)
        sums = product(tile, weights, sums, PRECISION)

    finish_grad(sums, output, offset, row_ok, tile_n * BLOCK_N, N, x, affine, partials, tile_m, RELU)


def _laid_out(weight: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The weights, and their steps in memory along the first axis, a window's taps and the second."""
    features, channels, *kernel_size = weight.shape
    taps = math.prod(kernel_size)
    if weight.dtype != torch.float32:
        return channels_last(weight), (taps * channels, channels, 1)
    # Matrix instructions take the second operand either way only in 16 bits.
    return weight.permute(1, 2, 3, 0).contiguous(), (1, features, taps * features)


def conv_input_grad(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    input: Tensor | None,
    stats: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of a convolution's input, back to before the batch norm's ReLU if there was one.

    Args:
        grad: ``(N, O, H_out, W_out)``, the gradient of the output.
        weight, stride, padding, dilation, config: as for :func:`conv_bias_act`.
        input_size: ``(N, C, H, W)``.
        input: where the convolution's input was
            ``batch_norm_act_elemt(input, stats, bn_weight, bn_bias, None, eps, relu)``, of ``input_size``.
        stats: with ``input``, as for :func:`conv_stats`, as ``bn_weight`` and ``bn_bias``.

    Returns:
        ``input_size`` in channels_last; and float64 ``(2, C)``: its sums over each channel, and those of its
        products with ``input - mean``, or nothing (of no size) without ``input``.

    Raises:
        ArgumentError: an argument does not go with the others.
    """
    found = geometry(input_size, weight.shape, stride, padding, dilation, "input_size")
    check_dtypes("grad", grad, weight)
    check_like("grad", grad, found.output_shape, "weight", weight)
    if (input is None) != (stats is None):
        raise ArgumentError("input and stats must be given together")
    affine = None
    if input is not None and stats is not None:
        check_like("input", input, found.input_shape, "grad", grad)
        check_norm(stats, bn_weight, bn_bias, found.channels)
        affine = affine_of(stats, bn_weight, bn_bias, eps)
        input = channels_last(input)

    problem = input_grad_problem(found, grad.dtype)
    config = config or default(problem, card(grad.device))
    grad, (weight, steps) = channels_last(grad), _laid_out(weight)
    output = empty(grad, found.input_shape)
    tiles = triton.cdiv(problem.m, config.block_m) * found.stride[0] * found.stride[1]
    parts = None if affine is None else Parts(output, tiles, brief=True)
    partials = None if parts is None else parts.sums
    grid = (tiles * triton.cdiv(problem.n, config.block_n), 1, 1)
    strides = {"STRIDE_H": found.stride[0], "STRIDE_W": found.stride[1]}
    common = {
        "RELU": relu and affine is not None,
        "EVEN_K": problem.k % config.block_k == 0,
        "PRECISION": problem.precision,
    }
    if found.pointwise and found.stride == (1, 1):
        launch(
            matmul_kernel,
            grid,
            *(grad, weight, output, None, input, None, affine, partials),
            *(problem.m, problem.n, problem.k, steps[2], steps[0], *found.output_size, *found.size),
            GRAD=True,
            PROLOGUE_RELU=False,
            **strides,
            **common,
            **config.options,
        )
    else:
        every = [step // math.gcd(step, d) for step, d in zip(found.stride, found.dilation, strict=True)]
        launch(
            conv_input_grad_kernel,
            grid,
            *(grad, weight, output, input, affine, partials, found.batch, tiles),
            *(problem.n, problem.k, *found.size, *found.output_size, *steps),
            STEP_H=every[0],
            STEP_W=every[1],
            **strides,
            **found.window,
            **common,
            **config.options,
        )
    if parts is None or stats is None:
        return output, grad.new_empty(0, dtype=torch.float64)
    return output, parts.total(stats.contiguous(), eps)
