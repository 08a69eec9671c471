"""1x1 convolutions of the CPU as matrix products.

Of a contiguous tensor each image is a matrix, channels by pixels, which a product takes as it lies; oneDNN's
convolution first brings it into a format of its own. Of a tensor in channels_last the whole batch is one
matrix, pixels by channels. The products are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pointwise_conv(input: Tensor, weight: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
    """A convolution of stride 1 without padding.

    Args:
        input: ``(N, C, [D,] H, W)``.
        weight: ``(O, C, [1,] 1, 1)``, of the input's dtype.
        bias: ``(O,)``.
        channels_last: the memory format of the result.

    Returns:
        ``(N, O, [D,] H, W)``.
    """
    matrix = weight.flatten(1)
    batch, _, *size = input.shape
    if channels_last:
        rows, turned = _pixels(input), matrix.t()
        output = torch.mm(rows, turned) if bias is None else torch.addmm(bias, rows, turned)
        return _images(output, batch, size)
    matrices, planes = matrix.expand(batch, -1, -1), input.flatten(2)
    if bias is None:
        return torch.bmm(matrices, planes).view(batch, -1, *size)
    return torch.baddbmm(bias[:, None], matrices, planes).view(batch, -1, *size)


def pointwise_conv_input_grad(grad: Tensor, weight: Tensor, channels_last: bool) -> Tensor:
    """The gradient of :func:`pointwise_conv` for its input."""
    matrix = weight.flatten(1)
    batch, _, *size = grad.shape
    if channels_last:
        return _images(torch.mm(_pixels(grad), matrix), batch, size)
    return torch.bmm(matrix.t().expand(batch, -1, -1), grad.flatten(2)).view(batch, -1, *size)


def pointwise_conv_weight_grad(
    grad: Tensor, input: Tensor, shape: Sequence[int], channels_last: bool
) -> Tensor:
    """The gradient of :func:`pointwise_conv` for its weight, which has ``shape``."""
    if channels_last:
        return torch.mm(_pixels(grad).t(), _pixels(input)).view(shape)
    unused = grad.new_empty(shape[:2])
    return torch.addbmm(unused, grad.flatten(2), input.flatten(2).transpose(1, 2), beta=0).view(shape)


def _pixels(x: Tensor) -> Tensor:
    """The pixels of all images as rows."""
    return x.movedim(1, -1).flatten(0, -2)


def _images(rows: Tensor, batch: int, size: Sequence[int]) -> Tensor:
    return rows.view(batch, *size, rows.shape[1]).movedim(-1, 1)
