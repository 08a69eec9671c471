"""Convolution of images, which have few channels each: the first layer of most networks.

Low-level operators. Kernels, strides and paddings are any; there are no groups and no dilation. Sums are made
in float32, or float64 for float64. Results have the memory format that PyTorch's convolution would give them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library
from .activations import ACTIVATIONS as ACTIVATIONS
from .depthwise_conv import in_channels_last


def _output(input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    spatial = [
        (size + 2 * pad - kernel) // step + 1
        for size, kernel, step, pad in zip(input.shape[2:], weight.shape[2:], stride, padding, strict=True)
    ]
    format = _library.memory_format(2, in_channels_last(input, weight))
    shape = input.shape[0], weight.shape[0], *spatial
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=format)


#: ``activation(conv(input, weight) + bias)``; ``activation`` is an index of
#: :data:`ACTIVATIONS`, ``slope`` that of leaky_relu.
image_conv = _library.define(
    "image_conv(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
    "int activation, float slope)",
    "Tensor",
    lambda input, weight, bias, stride, padding, *_: _output(input, weight, stride, padding),
    vmap=False,
)

#: ``conv(input, weight) + bias`` and its statistics, as batch_norm_stats has them.
image_conv_stats = _library.define(
    "image_conv_stats(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding)",
    "(Tensor, Tensor)",
    lambda input, weight, bias, stride, padding: (
        _output(input, weight, stride, padding),
        input.new_empty((2, weight.shape[0]), dtype=torch.float64),
    ),
    vmap=False,
)

image_conv_weight_grad = _library.define(
    "image_conv_weight_grad(Tensor grad, Tensor input, SymInt[] weight_size, SymInt[] stride, "
    "SymInt[] padding)",
    "Tensor",
    lambda grad, input, weight_size, stride, padding: input.new_empty(weight_size),
    vmap=False,
)
