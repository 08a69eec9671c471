"""Convolution of images, which have few channels each: the first layer of most networks.

Low-level operators. Kernels, strides and paddings are any; there are no groups and no dilation. Sums are made
in float32, or float64 for float64. Results have the memory format that PyTorch's convolution would give them.
"""

from __future__ import annotations

from . import _library
from .activations import ACTIVATIONS as ACTIVATIONS
from .direct_conv import define_forward

image_conv, image_conv_stats = define_forward("image_conv")

image_conv_weight_grad = _library.define(
    "image_conv_weight_grad(Tensor grad, Tensor input, SymInt[] weight_size, SymInt[] stride, "
    "SymInt[] padding)",
    "Tensor",
    lambda grad, input, weight_size, stride, padding: input.new_empty(weight_size),
    vmap=False,
)
