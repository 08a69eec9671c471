"""What direct convolutions on the CPU share: their outputs, and the definitions of their forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _library


def empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    format = _library.memory_format(2, channels_last)
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=format)


def _output(input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """In the memory format that PyTorch's convolution would give it."""
    spatial = [
        (size + 2 * pad - kernel) // step + 1
        for size, kernel, step, pad in zip(input.shape[2:], weight.shape[2:], stride, padding, strict=True)
    ]
    channels_last = _library.suggests_channels_last(input) or _library.suggests_channels_last(weight)
    return empty(input, (input.shape[0], weight.shape[0], *spatial), channels_last)


def define_forward(name: str) -> tuple[Any, Any]:
    """Define the operators of a forward pass.

    Returns:
        ``name``: ``activation(conv(input, weight) + bias)``, where ``activation`` is an index of
        :data:`~pooling_ext.ops.activations.ACTIVATIONS` and ``slope`` that of leaky_relu; and ``name_stats``:
        ``conv(input, weight) + bias`` and its statistics, as batch_norm_stats has them.
    """
    tensors = "Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding"
    alone = _library.define(
        f"{name}({tensors}, int activation, float slope)",
        "Tensor",
        lambda input, weight, bias, stride, padding, *_: _output(input, weight, stride, padding),
        vmap=False,
    )
    with_stats = _library.define(
        f"{name}_stats({tensors})",
        "(Tensor, Tensor)",
        lambda input, weight, bias, stride, padding: (
            _output(input, weight, stride, padding),
            input.new_empty((2, weight.shape[0]), dtype=torch.float64),
        ),
        vmap=False,
    )
    return alone, with_stats
