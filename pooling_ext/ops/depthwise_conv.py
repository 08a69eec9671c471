"""Depthwise convolution: each channel has a kernel of its own.

Low-level operators. Kernels are 3x3, 5x5 or 7x7, strides 1 or 2, the padding any; sums are made in float32,
or float64 for float64. Results have the memory format that PyTorch's convolution would give them.
"""

from __future__ import annotations

from . import _library
from .activations import ACTIVATIONS as ACTIVATIONS
from .direct_conv import define_forward, empty

depthwise_conv, depthwise_conv_stats = define_forward("depthwise_conv")

depthwise_conv_input_grad = _library.define(
    "depthwise_conv_input_grad(Tensor grad, Tensor weight, SymInt[] input_size, SymInt[] stride, "
    "SymInt[] padding, bool channels_last)",
    "Tensor",
    lambda grad, weight, input_size, stride, padding, channels_last: empty(grad, input_size, channels_last),
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
