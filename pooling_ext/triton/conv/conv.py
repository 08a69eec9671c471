"""Convolution as a matrix product whose left matrix is gathered as it is multiplied (implicit GEMM; see
gemm.py).

Tensors are in channels_last, so that a row of a tile is a run of a pixel's channels. The product steps
through the window's taps and, within each, through the channels; where there are few channels a step
takes several taps. 1x1 windows are matmul.py's.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ...ops.conv import (
    ConvGeometry,
    channels_last,
    check_conv,
    check_like,
    check_norm,
    empty,
)
from ..launching import launch
from ..norm.batch_norm import Parts, affine_of
from .conv_configs import Config, card, default, forward_problem, should_fold
from .gemm import finish_output, grouped_tile, normalized, pixels, product
from .matmul import matmul_kernel


@triton.jit
def conv_kernel(
    x,
    weight,
    output,
    bias,
    residual,
    affine,
    partials,
    M,
    N,
    C,
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
    FOLDED: tl.constexpr,
    RELU: tl.constexpr,
    PROLOGUE_RELU: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Write M pixels of N channels; ``weight`` is (N, KERNEL_H, KERNEL_W, C).

    Args:
        affine: the batch norm that ``x`` is yet to pass, with PROLOGUE_RELU, or None.
        FOLDED: C, where a step takes several taps of a window; else 0.
        EVEN_K: no step goes past the channels' end, or where it is folded the window's.
    """
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    first = tile_m.to(tl.int64) * BLOCK_M
    rows = tl.minimum(M - first, BLOCK_M).to(tl.int32)
    row_ok = tl.arange(0, BLOCK_M) < rows
    image, row, column = pixels(first, BLOCK_M, out_height, out_width)
    row = row * STRIDE_H - PADDING_H
    column = column * STRIDE_W - PADDING_W
    x_rows = x + ((image * height + row) * width + column) * C
    row = tl.where(row_ok, row, -(2**30))  # outside the image at every tap of the window
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N
    weight_columns = weight + n.to(tl.int64) * (KERNEL_H * KERNEL_W * C)

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    blocks = tl.cdiv(KERNEL_H * KERNEL_W * FOLDED, BLOCK_K) if FOLDED else tl.cdiv(C, BLOCK_K)
    for step in range(0, blocks if FOLDED else KERNEL_H * KERNEL_W * blocks):
        if FOLDED:
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            k_ok = k < KERNEL_H * KERNEL_W * FOLDED
            tap = k // FOLDED
            channel = k % FOLDED
            down = (tap // KERNEL_W) * DILATION_H
            along = (tap % KERNEL_W) * DILATION_W
            y, z = row[:, None] + down[None, :], column[:, None] + along[None, :]
            inside = (y >= 0) & (y < height) & (z >= 0) & (z < width)
            x_at = x_rows[:, None] + ((down * width + along) * FOLDED + channel)[None, :]
            weight_at = weight_columns[None, :] + k[:, None]
        else:
            tap = step // blocks
            channel = (step - tap * blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
            k_ok = channel < C
            down = (tap // KERNEL_W) * DILATION_H
            along = (tap % KERNEL_W) * DILATION_W
            y, z = row + down, column + along
            inside = ((y >= 0) & (y < height) & (z >= 0) & (z < width))[:, None]
            x_at = (x_rows + (down.to(tl.int64) * width + along) * C)[:, None] + channel[None, :]
            weight_at = weight_columns[None, :] + (tap * C + channel)[:, None]
        weight_mask = n_ok[None, :]
        if not EVEN_K:
            inside, weight_mask = inside & k_ok[None, :], weight_mask & k_ok[:, None]
        tile = tl.load(x_at, mask=inside, other=0.0)
        weights = tl.load(weight_at, mask=weight_mask, other=0.0)
        if affine is not None:
            tile = normalized(tile, affine, channel, k_ok, C, PROLOGUE_RELU)
            tile = tl.where(inside, tile, 0.0)  # the padding is of what is normalized
        sums = product(tile, weights, sums, PRECISION)

    offset = (first + tl.arange(0, BLOCK_M)) * N
    finish_output(
        sums,
        output,
        offset,
        row_ok,
        tile_n * BLOCK_N,
        N,
        bias,
        residual,
        partials,
        tile_m,
        rows,
        RELU,
    )


def _forward(
    geometry: ConvGeometry,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    affine: Tensor | None,
    relu: bool,
    statistics: bool,
    config: Config | None,
) -> tuple[Tensor, Tensor | None]:
    problem = forward_problem(geometry, input.dtype)
    config = config or default(problem, card(input.device))
    input, weight = channels_last(input), channels_last(weight)
    residual = None if residual is None else channels_last(residual)
    bias = None if bias is None else bias.contiguous()
    output = empty(input, geometry.output_shape)
    m, n = problem.m, problem.n
    tiles = triton.cdiv(m, config.block_m)
    parts = Parts(output, tiles, (config.block_m, m), brief=True) if statistics else None
    partials = None if parts is None else parts.sums
    grid = (tiles * triton.cdiv(n, config.block_n), 1, 1)
    strides = {"STRIDE_H": geometry.stride[0], "STRIDE_W": geometry.stride[1]}
    common = {
        "RELU": relu and affine is None,
        "PROLOGUE_RELU": relu and affine is not None,
        "EVEN_K": problem.k % config.block_k == 0,
        "PRECISION": problem.precision,
    }
    if geometry.pointwise:
        launch(
            matmul_kernel,
            grid,
            *(input, weight, output, bias, residual, affine, None, partials),
            *(m, n, geometry.channels, geometry.channels, 1, *geometry.size, *geometry.output_size),
            GRAD=False,
            **strides,
            **common,
            **config.options,
        )
    else:
        launch(
            conv_kernel,
            grid,
            *(input, weight, output, bias, residual, affine, partials),
            *(m, n, geometry.channels, *geometry.size, *geometry.output_size),
            FOLDED=geometry.channels if should_fold(geometry) else 0,
            **strides,
            **geometry.window,
            **common,
            **config.options,
        )
    return output, None if parts is None else parts.merge()


def conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
    config: Config | None = None,
) -> Tensor:
    """``relu(conv(input, weight) + bias + residual)``, without what is None or false, rounded once.

    Args:
        input: ``(N, C, H, W)``, float32, bfloat16 or float16; any strides, but channels_last is not copied.
        weight: ``(O, C, KH, KW)`` of its dtype; likewise.
        bias: ``(O,)`` of any floating-point dtype.
        residual: of the output's shape and the input's dtype; likewise.
        stride: for height and width, as ``padding`` and ``dilation``.
        config: the tiles to work in, instead of the guess at what is best.

    Returns:
        ``(N, O, H_out, W_out)`` in channels_last.

    Raises:
        ArgumentError: an argument does not go with the others.
    """
    found = check_conv(input, weight, bias, stride, padding, dilation)
    if residual is not None:
        check_like("residual", residual, found.output_shape, "input", input)
    return _forward(found, input, weight, bias, residual, None, relu, False, config)[0]


def conv_stats(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """``conv(input, weight) + bias`` and its statistics.

    With ``stats`` it is the convolution of
    ``batch_norm_act_elemt(input, stats, bn_weight, bn_bias, None, eps, relu)``, which is not stored.

    Args:
        input, weight, bias, stride, padding, dilation, config: as for :func:`conv_bias_act`.
        stats: ``(2, C)`` float64: means and variances with which the input is to be normalized.
        bn_weight, bn_bias: ``(C,)`` or None for ones and zeros.

    Returns:
        ``(N, O, H_out, W_out)`` in channels_last; and float64 ``(2, O)``: means and biased variances of what
        is stored there (zeros for an empty batch).

    Raises:
        ArgumentError: an argument does not go with the others.
    """
    found = check_conv(input, weight, bias, stride, padding, dilation)
    affine = None
    if stats is not None:
        check_norm(stats, bn_weight, bn_bias, found.channels)
        affine = affine_of(stats, bn_weight, bn_bias, eps)
    output, output_stats = _forward(
        found, input, weight, bias, None, affine, relu and affine is not None, True, config
    )
    assert output_stats is not None
    return output, output_stats
