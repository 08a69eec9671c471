"""What the kernels that multiply matrices share: the order of tiles, the prologue and the epilogues.

A convolution is the product of a matrix with a row for each pixel of the output and a column for each
element of a window, which is gathered tile by tile and never stored, and the weights' (implicit GEMM:
Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", 2014). A tile of the product is in
registers when it is complete: what comes next in the network is done to it there, for no memory traffic
(epilogue), as what comes before is done to a tile of the input on its way to the product (prologue).

A batch norm comes to the kernels as ``affine``, float32 of shape (3, C): y = (x - center) * scale + shift.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...backends.triton_library import interpreted
from ..norm.batch_norm import relu_backward, store_parts

#: The most columns of a tile that an epilogue works on at a time, so that what it reads besides finds room
#: in registers.
_PART = tl.constexpr(64)
#: The interpreter holds bfloat16 as integers, and multiplies those.
_WIDEN = tl.constexpr(interpreted())


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """The position of a program's tile: down the rows of a group of tiles first, then to the next column.

    So programs that run at the same time share rows of both matrices in the L2 cache.
    """
    group = tile // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile - group * (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def pixels(first, BLOCK_M: tl.constexpr, height, width):
    """Image (64-bit), row and column of BLOCK_M pixels from the 64-bit number ``first``."""
    image = first // (height * width)
    pixel = (first - image * (height * width)).to(tl.int32) + tl.arange(0, BLOCK_M)
    within = pixel // (height * width)
    pixel -= within * (height * width)
    row = pixel // width
    return image + within, row, pixel - row * width


@triton.jit
def product(a, b, sums, PRECISION: tl.constexpr):
    """``sums + a @ b`` in float32."""
    if _WIDEN and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def normalized(x, affine, channel, channel_ok, C, RELU: tl.constexpr):
    """The batch norm and ReLU of a tile, rounded as if it had been stored. NaN stays NaN."""
    center, scale, shift = coefficients(affine, channel, channel_ok, C)
    return normalized_by(x, center, scale, shift, RELU)


@triton.jit
def coefficients(affine, channel, channel_ok, C):
    """Center, scale and shift of channels."""
    center = tl.load(affine + channel, mask=channel_ok, other=0.0)
    scale = tl.load(affine + C + channel, mask=channel_ok, other=0.0)
    shift = tl.load(affine + 2 * C + channel, mask=channel_ok, other=0.0)
    return center, scale, shift


@triton.jit
def normalized_by(x, center, scale, shift, RELU: tl.constexpr):
    """:func:`normalized` by :func:`coefficients`."""
    y = tl.fma(x.to(tl.float32) - center[None, :], scale[None, :], shift[None, :])
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)
    return y.to(x.dtype)


@triton.jit
def _halves(sums):
    """The left and the right half of a tile's columns."""
    rows: tl.constexpr = sums.shape[0]
    columns: tl.constexpr = sums.shape[1]
    return tl.split(tl.permute(tl.reshape(sums, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def finish_output(
    sums, output, offset, row_ok, first, N, bias, residual, partials, tile, rows, RELU: tl.constexpr
):
    """Add ``bias`` and ``residual``, apply ReLU, store, and take means and deviations of what is stored.

    Args:
        sums: float32 tile of the product.
        offset: of each of its rows in the output, 64-bit.
        first: the number of the tile's first column, of N.
        partials: None, or for each tile the columns' means and sums of squared deviations.
        tile, rows: the number of the tile, and how many rows of it there are.
    """
    width: tl.constexpr = sums.shape[1]
    if width > _PART:
        left, right = _halves(sums)
        finish_output(left, output, offset, row_ok, first, N, bias, residual, partials, tile, rows, RELU)
        first += width // 2
        finish_output(right, output, offset, row_ok, first, N, bias, residual, partials, tile, rows, RELU)
    else:
        column = first + tl.arange(0, width)
        column_ok = column < N
        if bias is not None:
            sums += tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)[None, :]
        mask = row_ok[:, None] & column_ok[None, :]
        at = offset[:, None] + column[None, :]
        if residual is not None:
            sums += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            sums = tl.where(sums < 0.0, 0.0, sums)
        y = sums.to(output.dtype.element_ty)
        tl.store(output + at, y, mask=mask)
        if partials is not None:
            wide: tl.constexpr = partials.dtype.element_ty
            count = rows.to(tl.float32)
            y = y.to(tl.float32)
            # Deviations from a mean that is rounded, and then corrected for that.
            mean = tl.sum(tl.where(row_ok[:, None], y, 0.0), 0) / count
            deviation = tl.where(row_ok[:, None], y - mean[None, :], 0.0)
            total = tl.sum(deviation, 0)
            squares = tl.sum(deviation * deviation, 0) - total * (total / count)
            mean = mean.to(wide) + (total / count).to(wide)
            store_parts(partials, tile, mean, squares, N, column, column_ok)


@triton.jit
def finish_grad(sums, output, offset, row_ok, first, N, x, affine, partials, tile, RELU: tl.constexpr):
    """Store a gradient, where ``x`` is given that of what its batch norm's ReLU was given, with its sums.

    The sums, over the tile's rows, are of what is stored and of its products with ``x - center``; for the
    arguments see :func:`finish_output`.
    """
    width: tl.constexpr = sums.shape[1]
    if width > _PART:
        left, right = _halves(sums)
        finish_grad(left, output, offset, row_ok, first, N, x, affine, partials, tile, RELU)
        first += width // 2
        finish_grad(right, output, offset, row_ok, first, N, x, affine, partials, tile, RELU)
    else:
        column = first + tl.arange(0, width)
        column_ok = column < N
        mask = row_ok[:, None] & column_ok[None, :]
        at = offset[:, None] + column[None, :]
        if x is None:
            tl.store(output + at, sums.to(output.dtype.element_ty), mask=mask)
        else:
            center = tl.load(affine + column, mask=column_ok, other=0.0)
            deviation = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - center[None, :]
            if RELU:
                scale = tl.load(affine + N + column, mask=column_ok, other=0.0)
                shift = tl.load(affine + 2 * N + column, mask=column_ok, other=0.0)
                z = tl.fma(deviation, scale[None, :], shift[None, :])
                sums = relu_backward(z, sums)
            grad = sums.to(output.dtype.element_ty)
            tl.store(output + at, grad, mask=mask)
            grad = tl.where(row_ok[:, None], grad.to(tl.float32), 0.0)
            total, products = tl.sum(grad, 0), tl.sum(grad * deviation, 0)
            store_parts(partials, tile, total, products, N, column, column_ok)
