"""Convolution by Winograd's F(4x4, 3x3), F(4x4, 5x5), F(4, 3) and F(4, 7), on the CPU.

After Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): 36 multiplications where the
direct way has 144 for a 3x3 kernel, 64 where it has 400 for 5x5, 6 where it has 12 for 1x3 and 3x1, 10 where
it has 28 for 1x7 and 7x1. Of a dilation the phases of the input are convolutions by themselves. For 3x3
alone, a kernel of stride 2 is four smaller ones on the phases, with 81 multiplications for 144, and one of
several planes ``(D, 3, 3)`` is a sum over them, with their stride and dilation free. Sums are float32
(float64 for float64), and the result is the same for any number of threads. It is not that of the direct way
to the last bit: errors are a few 1e-6 of the largest element in float32. An infinity or a NaN in the input
reaches every output of the tiles that read it, which are 4x4 pixels, as NaN; so do values within a factor of
100 of the largest float.

Low-level operators, with which a convolution with bias, addition and activation, its gradients, and the
statistics of the batch norm that follows it can be made.
They take any strides, and give results in the input's memory format. Padding is ``(top, left, bottom,
right)``, in 3-d ``(front, top, left, back, bottom, right)``; a negative one crops. Stride and dilation have
a number per spatial axis: the last two strides are both 1 or both 2, and then the last two dilations are 1.
``kernel_size`` is (rows, columns) of a transformed weight; another one tells itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library
from .activations import ACTIVATIONS as ACTIVATIONS
from .conv_shape import winograd_points

_PADDED = 16


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weight_fake(weight: Tensor, groups: int, transposed: bool, stride: int = 1) -> Tensor:
    outs, channels = weight.shape[0] // groups, weight.shape[1]
    into, out = (outs, channels) if transposed else (channels, outs)
    padded = (out + _PADDED - 1) // _PADDED * _PADDED
    size = groups, winograd_points(weight.shape), _planes(weight), into, padded
    return weight.new_empty(size, dtype=_wide(weight.dtype))


def _planes(weight: Tensor) -> int:
    """Of a weight, transformed or not."""
    return weight.shape[2] if weight.dim() == 5 else 1


def _like(input: Tensor, size: Sequence[int]) -> Tensor:
    """An uninitialized tensor of ``size`` in the memory format of ``input``."""
    channels_last = _library.suggests_channels_last(input)
    format = _library.memory_format(len(size) - 2, channels_last)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=format)


def _conv_fake(
    input: Tensor,
    weight: Tensor,
    bias: Any,
    residual: Any,
    padding: Sequence[int],
    out_channels: int,
    groups: int,
    activation: int,
    slope: float,
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    kernel_size: Sequence[int] = (3, 3),
) -> Tensor:
    rank = input.dim() - 2
    # Only a transformed weight, which has five dimensions, is not known by its own size.
    kernel = weight.shape[2:] if weight.dim() == 4 else (_planes(weight), *kernel_size)[3 - rank :]
    spatial = [
        (input.shape[2 + i] + padding[i] + padding[rank + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i]
        + 1
        for i in range(rank)
    ]
    return _like(input, (input.shape[0], out_channels, *spatial))


def _stats_fake(
    input: Tensor,
    weight: Tensor,
    bias: Any,
    padding: Sequence[int],
    out_channels: int,
    groups: int,
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    kernel_size: Sequence[int] = (3, 3),
) -> tuple[Tensor, Tensor]:
    common = input, weight, bias, None, padding, out_channels, groups, 0, 0.0
    output = _conv_fake(*common, stride, dilation, kernel_size)
    return output, input.new_empty((2, out_channels), dtype=torch.float64)


def _input_grad_fake(
    grad: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    groups: int,
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    input_size: Sequence[int] = (),
) -> Tensor:
    if not input_size:
        spans = [gap * (size - 1) for gap, size in zip(dilation, weight.shape[2:], strict=True)]
        sides = [span - padding[i] - padding[2 + i] for i, span in enumerate(spans)]
        spatial = [size + side for size, side in zip(grad.shape[2:], sides, strict=True)]
        input_size = (grad.shape[0], weight.shape[1] * groups, *spatial)
    return _like(grad, input_size)


def _weight_grad_fake(
    input: Tensor,
    grad: Tensor,
    padding: Sequence[int],
    groups: int,
    stride: Sequence[int] = (1, 1),
    dilation: Sequence[int] = (1, 1),
    weight_size: Sequence[int] = (),
) -> Tensor:
    return input.new_empty(weight_size or (grad.shape[1], input.shape[1] // groups, 3, 3))


_GEOMETRY = "SymInt[] stride=[1, 1], SymInt[] dilation=[1, 1]"
_KERNEL = "SymInt[] kernel_size=[3, 3]"

#: The weight ``(out, in / groups, [planes,] kH, kW)`` for the operators below, in float32 or float64, and for
#: rows and columns of one stride, 1 or 2. Its order is the instruction set's, so it is not to be kept beyond
#: the process. With ``transposed`` it is that of the convolution which makes the gradient of an input.
winograd_weight = _library.define(
    "winograd_weight(Tensor weight, SymInt groups, bool transposed, SymInt stride=1)",
    "Tensor",
    _weight_fake,
    vmap=False,
)

#: ``activation(conv(input, weight) + bias + residual)``, rounded once; without what is not given. ``weight``
#: is a :data:`winograd_weight`, or ``(out, in / groups, [planes,] kH, kW)`` of the input's dtype, which is
#: then transformed in memory that is used again: faster where a weight is used once, slower where it can be
#: kept. ``activation`` is an index of :data:`ACTIVATIONS`, ``slope`` that of a leaky ReLU.
winograd_conv = _library.define(
    "winograd_conv(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] padding, "
    f"SymInt out_channels, SymInt groups, int activation, float slope, {_GEOMETRY}, {_KERNEL})",
    "Tensor",
    _conv_fake,
    vmap=False,
)

#: ``conv(input, weight) + bias`` and its statistics, as ``batch_norm_stats`` has them; ``weight`` as above.
winograd_conv_stats = _library.define(
    "winograd_conv_stats(Tensor input, Tensor weight, Tensor? bias, SymInt[] padding, SymInt out_channels, "
    f"SymInt groups, {_GEOMETRY}, {_KERNEL})",
    "(Tensor, Tensor)",
    _stats_fake,
    vmap=False,
)

#: The gradient of the input from the weight ``(out, in / groups, [planes,] kH, kW)``; ``padding`` is the
#: convolution's. With stride 2 padding before rows and columns has to be odd, and planes have stride 1.
#: ``input_size`` may be left out where all strides are 1 and there are no planes.
winograd_input_grad = _library.define(
    f"winograd_input_grad(Tensor grad, Tensor weight, SymInt[] padding, SymInt groups, {_GEOMETRY}, "
    "SymInt[] input_size=[])",
    "Tensor",
    _input_grad_fake,
    vmap=False,
)

#: The gradient of the weight, contiguous and of the input's dtype. ``weight_size`` may be left out where it
#: is ``(out, in / groups, 3, 3)``.
winograd_weight_grad = _library.define(
    f"winograd_weight_grad(Tensor input, Tensor grad, SymInt[] padding, SymInt groups, {_GEOMETRY}, "
    "SymInt[] weight_size=[])",
    "Tensor",
    _weight_grad_fake,
    vmap=False,
)
