"""Convolution with 3x3 kernels of stride 1 by Winograd's F(4x4, 3x3), on the CPU.

After Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): 36 multiplications where
the direct way has 144. Sums are float32 (float64 for float64), and the result is the same for any number of
threads. It is not that of the direct way to the last bit: errors are some 1e-5 of the largest element in
float32. An infinity or a NaN in the input reaches every output of the tiles that read it, which are 4x4
pixels, as NaN; so do values within a factor of 100 of the largest float.

Low-level operators, with which a convolution with bias, addition and activation, its gradients, and the
statistics of the batch norm that follows it can be made.
They take any strides, and give results in the input's memory format. Padding is ``(top, left, bottom,
right)``; a negative one crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library
from .conv_activations import ACTIVATIONS as ACTIVATIONS

_POINTS, _PADDED = 36, 16


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weight_fake(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    outs, channels = weight.shape[0] // groups, weight.shape[1]
    into, out = (outs, channels) if transposed else (channels, outs)
    padded = (out + _PADDED - 1) // _PADDED * _PADDED
    return weight.new_empty((groups, _POINTS, into, padded), dtype=_wide(weight.dtype))


def _conv_fake(
    input: Tensor,
    weight: Tensor,
    bias: Any,
    residual: Any,
    padding: Sequence[int],
    out_channels: int,
    *_: Any,
) -> Tensor:
    top, left, bottom, right = padding
    height, width = input.shape[2:]
    channels_last = _library.suggests_channels_last(input)
    return torch.empty(
        (input.shape[0], out_channels, height + top + bottom - 2, width + left + right - 2),
        dtype=input.dtype,
        device=input.device,
        memory_format=_library.memory_format(2, channels_last),
    )


def _stats_fake(
    input: Tensor, weight: Tensor, bias: Any, padding: Sequence[int], out_channels: int, groups: int
) -> tuple[Tensor, Tensor]:
    output = _conv_fake(input, weight, bias, None, padding, out_channels)
    return output, input.new_empty((2, out_channels), dtype=torch.float64)


#: The weight ``(out, in / groups, 3, 3)`` for the operators below, in float32 or float64. Its order is the
#: instruction set's, so it is not to be kept beyond the process. With ``transposed`` it is that of the
#: convolution which makes the gradient of an input.
winograd_weight = _library.define(
    "winograd_weight(Tensor weight, SymInt groups, bool transposed)",
    "Tensor",
    _weight_fake,
    vmap=False,
)

#: ``activation(conv(input, weight) + bias + residual)``, rounded once; without what is not given. ``weight``
#: is a :data:`winograd_weight`, or ``(out, in / groups, 3, 3)`` of the input's dtype, which is then
#: transformed in memory that is used again: faster where a weight is used once, slower where it can be kept.
#: ``activation`` is an index of :data:`ACTIVATIONS`, ``slope`` that of a leaky ReLU.
winograd_conv = _library.define(
    "winograd_conv(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] padding, "
    "SymInt out_channels, SymInt groups, int activation, float slope)",
    "Tensor",
    _conv_fake,
    vmap=False,
)

#: ``conv(input, weight) + bias`` and its statistics, as ``batch_norm_stats`` has them; ``weight`` as above.
winograd_conv_stats = _library.define(
    "winograd_conv_stats(Tensor input, Tensor weight, Tensor? bias, SymInt[] padding, SymInt out_channels, "
    "SymInt groups)",
    "(Tensor, Tensor)",
    _stats_fake,
    vmap=False,
)

#: The gradient of the input from the weight ``(out, in / groups, 3, 3)``; ``padding`` is the convolution's.
winograd_input_grad = _library.define(
    "winograd_input_grad(Tensor grad, Tensor weight, SymInt[] padding, SymInt groups)",
    "Tensor",
    lambda grad, weight, padding, groups: _conv_fake(
        grad, weight, None, None, [2 - side for side in padding], weight.shape[1] * groups
    ),
    vmap=False,
)

#: The gradient of the weight, contiguous and of the input's dtype.
winograd_weight_grad = _library.define(
    "winograd_weight_grad(Tensor input, Tensor grad, SymInt[] padding, SymInt groups)",
    "Tensor",
    lambda input, grad, padding, groups: input.new_empty((grad.shape[1], input.shape[1] // groups, 3, 3)),
    vmap=False,
)
