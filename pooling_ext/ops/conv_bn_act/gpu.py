"""A convolution, batch norm, addition and activation in the fastest of a GPU's ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ... import backends
from ...autograd import transformed
from .. import _library, conv_autotune
from ..activations import IDENTITY, RELU
from ..batch_norm_act import in_training
from ..batch_norm_arguments import batch_norm_arguments
from ..batch_norm_statistics import update_running
from ..prologue_norm import PrologueNorm
from .call import NO_CONVOLUTION, Call, autocast_dtype


def why_not(call: Call) -> str | None:
    conv, bn, input, residual = call.conv, call.bn, call.input, call.residual
    if conv is None:
        return NO_CONVOLUTION
    if input.is_cpu and backends.forced() not in ("cuda", "triton"):
        return "the input is on the CPU"
    if bn is None:
        return "there is no batch norm"
    if isinstance(conv.padding, str):
        return f"the padding is {conv.padding!r}"
    if transformed():
        return "torch.func or forward mode is at work"
    if input.dim() != 4 or input.numel() == 0 or input.shape[1] != conv.in_channels:
        return f"the input's shape is {tuple(input.shape)}"
    if not _library.suggests_channels_last(input):
        return "the input is not in channels_last"
    dtype = call.dtype
    if conv.weight.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
        return f"the weight is {conv.weight.dtype}, the input {dtype}"
    if residual is not None and not call.residual_fits():
        return "the residual is not like the output"
    arguments = conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var
    if any(x is not None and x.device != input.device for x in arguments):
        return "the input and the parameters are on different devices"
    if call.trains and isinstance(bn, nn.SyncBatchNorm):
        return "the statistics are those of all processes"
    if not call.trains and call.wants_grad:
        return "gradients are wanted through constant statistics"
    if not conv_autotune.can_autotune(input, dtype):
        return f"there are no kernels for {dtype} on {input.device}"
    return None


def run(call: Call, prologue: PrologueNorm | None) -> Any:
    """Do the call.

    Args:
        prologue: what the input is yet to be computed from, in the input's place.

    Returns:
        A tensor; or where another convolution follows, and that is faster, a :class:`PrologueNorm`.
    """
    conv, bn, residual, trains = call.conv, call.bn, call.residual, call.trains
    input: Any = call.input if prologue is None else prologue
    if prologue is not None and (not trains or conv.groups != 1):
        input = prologue.computed()
    first = input.output if isinstance(input, PrologueNorm) else input
    device, relu = first.device.type, call.activation == RELU
    dtype = autocast_dtype(device) or first.dtype
    geometry = conv_autotune.ConvParams(conv.stride, conv.padding, conv.dilation, conv.groups)
    with torch.autocast(device, enabled=False):
        if not trains:
            with torch.no_grad():
                weight, bias = _fold(conv, bn)
                weight = weight.to(dtype, memory_format=torch.channels_last)
                x = first.to(dtype)
                output = conv_autotune.conv_bias_act(x, weight, bias.to(dtype), residual, geometry, relu)
                return output if relu else call.activation(output)
        weight = conv.weight.to(dtype)
        bias = None if conv.bias is None else conv.bias.to(dtype)
        if isinstance(input, PrologueNorm):
            output, stats = input.convolved(weight, bias, geometry)
        else:
            output, stats = conv_autotune.conv_stats_with_grad(input.to(dtype), weight, bias, geometry)
        arguments = batch_norm_arguments(bn)
        running = arguments["running_mean"], arguments["running_var"]
        momentum, eps = arguments["momentum"], arguments["eps"]
        if call.following is not None and residual is None and call.activation in (RELU, IDENTITY):
            norm = PrologueNorm(output, stats, bn.weight, bn.bias, eps, relu)
            if norm.should_fuse_into(call.following):
                update_running(output, stats, *running, momentum)
                return norm
        rest = momentum, eps, residual, call.activation, stats
        return in_training(output, *running, bn.weight, bn.bias, *rest)


def _fold(conv: Any, bn: Any) -> tuple[Tensor, Tensor]:
    """The weight and bias of one convolution that does both."""
    buffers, parameters = bn._buffers, bn._parameters
    mean, variance = buffers["running_mean"], buffers["running_var"]
    scale = torch.rsqrt(_float32(variance) + bn.eps)
    if parameters["weight"] is not None:
        scale = scale * parameters["weight"]
    own, shift = conv._parameters["bias"], parameters["bias"]
    offset = -_float32(mean) if own is None else own - _float32(mean)
    bias = offset * scale if shift is None else torch.addcmul(_float32(shift), offset, scale)
    return conv._parameters["weight"] * scale.view(-1, 1, 1, 1), bias


def _float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float32 else value.float()
