"""The activations that the CPU's convolutions, Winograd's and depthwise ones, apply as they write."""

from __future__ import annotations

#: In the order of csrc/kernels/cpu/conv/activation_kind.h: the operators take an activation by its index.
ACTIVATIONS = (
    "identity",
    "relu",
    "relu6",
    "silu",
    "hardswish",
    "leaky_relu",
    "gelu",
    "gelu_tanh",
    "hardsigmoid",
)
