"""Batch norm with a residual and an activation as a function of its tensors alone, beside PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from batch_norm_cases import arguments, composition
from torch import Tensor

import pooling_ext.functional as F


def norm(input, weight, bias, residual=None, training=True, mean=None, var=None, activation="relu"):
    """batch_norm_act with constant running statistics in eval, which it leaves alone in training."""
    if not training:
        channels = input.shape[1]
        mean = torch.linspace(-1, 1, channels, dtype=weight.dtype)
        var = torch.linspace(0.5, 2, channels, dtype=weight.dtype)
    return F.batch_norm_act(
        input, mean, var, weight, bias, training, residual=residual, activation=activation
    )


def norm_as_torch(input, weight, bias, residual=None, training=True, activation="relu"):
    mean = var = None
    if not training:
        mean = torch.linspace(-1, 1, input.shape[1], dtype=weight.dtype)
        var = torch.linspace(0.5, 2, input.shape[1], dtype=weight.dtype)
    return composition(input, mean, var, weight, bias, training, residual=residual, activation=activation)


def tensors_of(names, shape=(3, 2, 4, 3), dtype=torch.float64, layout="contiguous", requires_grad=True):
    tensors = arguments(shape, dtype, layout, residual=True)
    return tuple(tensors[name].detach().requires_grad_(requires_grad) for name in names)


def with_gradients(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    output = function(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return output.detach(), *torch.autograd.grad(output, leaves, weights)


def close(actual, wanted, scale=1.0):
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-4 * scale, atol=1e-5 * scale, check_stride=False, equal_nan=True
        )
