"""Convolution, batch normalisation, an optional residual and ReLU, from the modules that hold them.

In training the convolution is PyTorch's and the rest is :func:`batch_norm_act`. Where the statistics are
constants and no gradient is wanted, they are folded into the weights (Jacob et al. 2018, section
3.2), and the bias, the addition and ReLU are done by oneDNN while it writes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import backends
from ..errors import ArgumentError
from . import _library
from .batch_norm_act import ACTIVATIONS, batch_norm_act, batch_norm_arguments, needs_grad, transformed

# The dtypes in which oneDNN adds and rectifies as it writes.
backends.register("conv_bn_act", cpu=frozenset((torch.float32, torch.bfloat16)))

#: Folding reads and writes the weights once more, which pays where the output is this much larger.
FOLD_RATIO = 4


def conv_bn_act(
    conv: nn.Module,
    bn: nn.Module,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """``activation(bn(conv(input)) + residual)``.

    Args:
        conv: a :class:`torch.nn.Conv2d`.
        bn: the :class:`torch.nn.BatchNorm2d` or :class:`torch.nn.SyncBatchNorm` after it, whose running
            statistics are updated in training.
        input: ``(N, C_in, H, W)``, what ``conv`` takes.
        residual: added before the activation; the output's shape and dtype.
        activation: "relu" or "identity".

    Returns:
        ``(N, C_out, H_out, W_out)``.

    Raises:
        ArgumentError: an argument does not go with the others.
        RuntimeError: the input does not go with ``conv``.
    """
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"activation must be one of {ACTIVATIONS}, but got {activation!r}")
    tensors = isinstance(input, Tensor) and (residual is None or isinstance(residual, Tensor))
    if tensors and folds(conv, bn, input, residual):
        return _folded(conv, bn, input, residual, activation)
    return batch_norm_act(conv(input), **batch_norm_arguments(bn), residual=residual, activation=activation)


def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def folds(conv: Any, bn: Any, input: Tensor, residual: Tensor | None, least: int = 0) -> bool:
    """Whether :func:`conv_bn_act` folds the statistics into the weights: they are constant, and it pays.

    ``least`` is how many elements the output must have.
    """
    if bn.training or bn.running_mean is None or is_compiling() or transformed():
        return False
    if bn.running_mean.shape != conv.weight.shape[:1]:
        return False
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if conv._forward_hooks or conv._forward_pre_hooks or not torch.backends.mkldnn.is_available():
        return False
    if needs_grad(input, residual, conv.weight, conv.bias, bn.weight, bn.bias):
        return False
    if input.dim() != 4 or input.shape[1] != conv.in_channels or input.numel() == 0:
        return False
    autocast = _autocast_dtype()
    dtype = autocast or input.dtype
    if autocast is None and conv.weight.dtype != dtype:
        return False
    if dtype not in (torch.float32, torch.bfloat16) or backends.choose("conv_bn_act", input) is backends.ATEN:
        return False
    size = [input.shape[0], conv.out_channels]
    for extent, kernel, stride, pad, dilation in zip(
        input.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation, strict=True
    ):
        size.append((extent + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1)
    if residual is not None:
        if list(residual.shape) != size or residual.dtype != dtype:
            return False
        # Elsewhere PyTorch adds and rectifies apart, which it cannot in bfloat16.
        channels_last = residual.is_contiguous(memory_format=torch.channels_last)
        if not channels_last or not _library.suggests_channels_last(input) or conv.groups > 1:
            return False
    elements = size[0] * size[1] * size[2] * size[3]
    return elements >= max(least, FOLD_RATIO * conv.weight.numel())


def _folded(conv: Any, bn: Any, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    dtype = _autocast_dtype() or input.dtype
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        scale = torch.rsqrt(bn.running_var.float() + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight
        bias = -bn.running_mean if conv.bias is None else conv.bias - bn.running_mean
        bias = bias * scale if bn.bias is None else torch.addcmul(bn.bias.float(), bias.float(), scale)
        weight = (conv.weight * scale.view(-1, 1, 1, 1)).to(dtype)
        geometry = conv.padding, conv.stride, conv.dilation, conv.groups
        run = torch.ops.mkldnn._convolution_pointwise
        relu = activation == "relu"
        if residual is None:
            unary = "relu" if relu else "none"
            return run(input.to(dtype), weight, bias.to(dtype), *geometry, unary, [], "")
        unary = "relu" if relu else None
        return run.binary(
            input.to(dtype), residual, weight, bias.to(dtype), *geometry, "add", 1.0, unary, [], ""
        )
