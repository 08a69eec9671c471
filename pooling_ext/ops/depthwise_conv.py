"""Depthwise convolution: each channel has a kernel of its own.

Low-level operators. Kernels are 3x3, 5x5 or 7x7, strides 1 or 2, the padding any; sums are made in float32,
or float64 for float64. Results have the memory format that PyTorch's convolution would give them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library
from .activations import ACTIVATIONS as ACTIVATIONS


def in_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's convolution of these gives its results in channels_last."""
    return _library.suggests_channels_last(input) or _library.suggests_channels_last(weight)


def _output(input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    spatial = [
        (size + 2 * pad - kernel) // step + 1
        for size, kernel, step, pad in zip(input.shape[2:], weight.shape[2:], stride, padding, strict=True)
    ]
    return _empty(input, (*input.shape[:2], *spatial), in_channels_last(input, weight))


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    format = _library.memory_format(2, channels_last)
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=format)


#: ``activation(conv(input, weight) + bias)``; ``activation`` is an index of
#: :data:`ACTIVATIONS`, ``slope`` that of leaky_relu.
depthwise_conv = _library.define(
    "depthwise_conv(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
    "int activation, float slope)",
    "Tensor",
    lambda input, weight, bias, stride, padding, *_: _output(input, weight, stride, padding),
    vmap=False,
)

#: ``conv(input, weight) + bias`` and its statistics, as batch_norm_stats has them.
depthwise_conv_stats = _library.define(
    "depthwise_conv_stats(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding)",
    "(Tensor, Tensor)",
    lambda input, weight, bias, stride, padding: (
        _output(input, weight, stride, padding),
        input.new_empty((2, input.shape[1]), dtype=torch.float64),
    ),
    vmap=False,
)

depthwise_conv_input_grad = _library.define(
    "depthwise_conv_input_grad(Tensor grad, Tensor weight, SymInt[] input_size, SymInt[] stride, "
    "SymInt[] padding, bool channels_last)",
    "Tensor",
    lambda grad, weight, input_size, stride, padding, channels_last: _empty(grad, input_size, channels_last),
    vmap=False,
)

#: The gradients of the weight and, if ``bias`` is true, of the bias; else that has no size.
depthwise_conv_weight_grad = _library.define(
    "depthwise_conv_weight_grad(Tensor grad, Tensor input, SymInt[] weight_size, SymInt[] stride, "
    "SymInt[] padding, bool channels_last, bool bias)",
    "(Tensor, Tensor)",
    lambda grad, input, weight_size, stride, padding, channels_last, bias: (
        input.new_empty(weight_size),
        input.new_empty(input.shape[1] if bias else 0),
    ),
    vmap=False,
)
