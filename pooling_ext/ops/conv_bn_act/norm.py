"""What follows a convolution: a batch norm, addition and ReLU, in one pass or one by one."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ... import backends
from ...errors import ArgumentError
from .. import batch_norm_running
from ..batch_norm_act import (
    alike,
    batch_norm_act,
    batch_norm_arguments,
    check_device,
    check_tensor,
    eps_of,
    transformed,
)
from .call import (
    EVALUATION,
    INFERENCE,
    NO_RELU,
    TRAINING,
    Call,
    calls_only_forward,
    least_elements,
)

#: The classes of what a batch norm in eval mode may be given beside its input.
_VECTORS = frozenset((Tensor, nn.Parameter, type(None)))


def _why_not_fused(call: Call) -> str | None:
    if call.bn is None:
        return "there is no batch norm"
    if call.input.dim() != 4:
        return f"the input has {call.input.dim()} dimensions, not 4"
    residual = call.residual
    if residual is not None and not (
        isinstance(residual, Tensor) and residual.shape == call.input.shape and alike(call.input, residual)
    ):
        return "the residual is not like what it is added to"
    return None


def running_why_not(call: Call) -> str | None:
    """Why the CPU's operator for constants cannot do a call."""
    input, bn = call.input, call.bn
    if call.trains:
        return "the statistics are the batch's"
    if call.wants_grad:
        return "gradients are wanted"
    if (reason := _why_not_fused(call)) is not None:
        return reason
    if type(input) is not Tensor or not input.is_cpu:
        return "the input is no plain tensor of the CPU"
    if is_compiling() or transformed():
        return "a compiler or a transform is at work"
    running, own = bn._buffers, bn._parameters
    try:
        mean, variance = running["running_mean"], running["running_var"]
        weight, bias = own["weight"], own["bias"]
    except KeyError:
        return "somebody keeps the parameters elsewhere"
    if not type(mean) is type(variance) is Tensor or mean.numel() != input.shape[1]:
        return "the statistics do not go with the input"
    if type(weight) not in _VECTORS or type(bias) not in _VECTORS or type(call.residual) not in _VECTORS:
        return "an argument is no plain tensor"
    if not (
        mean.is_cpu
        and variance.is_cpu
        and (weight is None or weight.is_cpu)
        and (bias is None or bias.is_cpu)
    ):
        return "a parameter is not on the CPU"
    if input.numel() < least_elements(INFERENCE, input):
        return f"{input.numel()} elements are fewer than {least_elements(INFERENCE, input)}"
    if backends.choose("batch_norm_act", input) is not backends.CPU:
        return f"there is no CPU kernel for {input.dtype}"
    return None


def run_running(call: Call, _: None = None) -> Tensor:
    """The call by constants; in the input's memory if nobody else has it."""
    bn, input = call.bn, call.input
    running, own = bn._buffers, bn._parameters
    mean, variance = running["running_mean"], running["running_var"]
    relu, eps = call.relu is not None, eps_of(bn)
    if call.fresh:
        batch_norm_running.overwrite(
            input, mean, variance, own["weight"], own["bias"], call.residual, eps, relu
        )
        return input
    return batch_norm_running.normalise(
        input, mean, variance, own["weight"], own["bias"], call.residual, eps, relu
    )


def fused_why_not(call: Call) -> str | None:
    """Why :func:`batch_norm_act` should not do a call."""
    if (reason := _why_not_fused(call)) is not None:
        return reason
    if isinstance(call.bn, nn.SyncBatchNorm):
        return None  # PyTorch's own is for GPUs, so ours takes it at any size
    how = EVALUATION if not call.trains else NO_RELU if call.relu is None else TRAINING
    least = least_elements(how, call.input)
    if call.input.numel() < least:
        return f"{call.input.numel()} elements are fewer than {least}, from which on it pays"
    return None


def run_fused(call: Call, _: None = None) -> Tensor:
    arguments = batch_norm_arguments(call.bn)
    return batch_norm_act(call.input, **arguments, residual=call.residual, activation=call.activation)


def run_eager(call: Call, _: None = None) -> Any:
    """The modules and functions one by one."""
    output: Any = call.input
    if call.bn is not None:
        if call.checked:
            call.bn._check_input_dim(output)
            _check_devices(call.bn, output)
        output = _batch_norm(call.bn, output)
    if call.checked and call.residual is not None:
        _check_residual(call.residual, output)
    if call.residual is not None or call.add is not None:
        output = output + call.residual if call.add is None else call.add(output, call.residual)
    return output if call.relu is None else call.relu(output)


def _check_devices(bn: Any, output: Tensor) -> None:
    """Require the vectors of a batch norm to be where ``output`` is; PyTorch's error names none of them."""
    for vectors in (bn._buffers, bn._parameters):
        for name in ("running_mean", "running_var", "weight", "bias"):
            value = vectors.get(name)
            if value is not None and value.device != output.device:
                check_device(name, value, output)


def _check_residual(residual: Any, output: Tensor) -> None:
    check_tensor("residual", residual)
    check_device("residual", residual, output)
    if residual.shape != output.shape:
        raise ArgumentError(
            f"residual must have the output's shape {tuple(output.shape)}, but got {tuple(residual.shape)}"
        )


def _batch_norm(bn: Any, input: Any) -> Any:
    """``bn(input)``, without what takes PyTorch's module longer than the operator takes when small."""
    if type(bn) is not nn.BatchNorm2d or not calls_only_forward(bn) or _has_any_global_hook():
        return bn(input)
    buffers, parameters = bn._buffers, bn._parameters
    try:
        mean, variance, counter = (
            buffers["running_mean"],
            buffers["running_var"],
            buffers["num_batches_tracked"],
        )
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:  # somebody keeps them elsewhere
        return bn(input)
    training, momentum = bn.training, bn.momentum
    if mean is None or counter is None or momentum is None or not bn.track_running_stats:
        return bn(input)
    if not isinstance(input, Tensor) or input.dim() != 4:
        return bn(input)
    if training:
        counter.add_(1)
    return F.batch_norm(input, mean, variance, weight, bias, training, momentum, bn.eps)
