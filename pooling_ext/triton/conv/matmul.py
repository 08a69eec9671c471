"""The 1x1 convolution: the product of the matrix of its input's pixels, in channels_last, and the weights.

With a stride it takes every so many pixels, by their addresses. The gradient of its input, with stride 1,
is the product of the output's gradient and the weights transposed, which is the same kernel with another
epilogue.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gemm import finish_grad, finish_output, grouped_tile, normalized, pixels, product


@triton.jit
def matmul_kernel(
    a,
    b,
    output,
    bias,
    beside,
    a_affine,
    beside_affine,
    partials,
    M,
    N,
    K,
    b_step_n,
    b_step_k,
    height,
    width,
    out_height,
    out_width,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    GRAD: tl.constexpr,
    RELU: tl.constexpr,
    PROLOGUE_RELU: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``output[m, n] = finish(sum over k of a[pixel(m), k] * b[n, k])``.

    Args:
        a: pixels of K channels: (images, height, width, K), of which a stride leaves M.
        b: element (n, k) is at ``n * b_step_n + k * b_step_k``.
        beside: of the output's shape, or None: the residual, or with GRAD the input of the batch norm before.
        a_affine: the batch norm that ``a`` is yet to pass, with PROLOGUE_RELU, or None.
        beside_affine: with GRAD that of ``beside``.
    """
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    first = tile_m.to(tl.int64) * BLOCK_M
    rows = tl.minimum(M - first, BLOCK_M).to(tl.int32)
    row_ok = tl.arange(0, BLOCK_M) < rows
    number = first + tl.arange(0, BLOCK_M)
    pixel = number
    if STRIDE_H > 1 or STRIDE_W > 1:
        image, row, column = pixels(first, BLOCK_M, out_height, out_width)
        pixel = (image * height + row * STRIDE_H) * width + column * STRIDE_W
    a_rows = a + pixel * K
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N
    b_columns = b + n.to(tl.int64) * b_step_n

    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a_mask, b_mask = row_ok[:, None], n_ok[None, :]
        if not EVEN_K:
            a_mask, b_mask = a_mask & (k < K)[None, :], b_mask & (k < K)[:, None]
        a_tile = tl.load(a_rows[:, None] + k[None, :], mask=a_mask, other=0.0)
        b_tile = tl.load(b_columns[None, :] + (k.to(tl.int64) * b_step_k)[:, None], mask=b_mask, other=0.0)
        if a_affine is not None:
            a_tile = normalized(a_tile, a_affine, k, k < K, K, PROLOGUE_RELU)
        sums = product(a_tile, b_tile, sums, PRECISION)

    if GRAD:
        finish_grad(
            sums,
            output,
            number * N,
            row_ok,
            tile_n * BLOCK_N,
            N,
            beside,
            beside_affine,
            partials,
            tile_m,
            RELU,
        )
    else:
        finish_output(
            sums,
            output,
            number * N,
            row_ok,
            tile_n * BLOCK_N,
            N,
            bias,
            beside,
            partials,
            tile_m,
            rows,
            RELU,
        )
