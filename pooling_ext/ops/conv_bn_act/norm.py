"""What follows a convolution: a batch norm, addition and activation, in one pass or one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ... import backends
from ...autograd import transformed
from ...errors import ArgumentError
from .. import batch_norm_running
from ..batch_norm_act import batch_norm_act
from ..batch_norm_arguments import alike, batch_norm_arguments, check_device, check_tensor, eps_of
from .call import (
    EVALUATION,
    INFERENCE,
    NO_ACTIVATION,
    TRAINING,
    Call,
    calls_only_forward,
    least_elements,
)

#: The classes of what a batch norm in eval mode may be given beside its input.
_VECTORS = frozenset((Tensor, nn.Parameter, type(None)))


#: The dimensions of what our kernels take from batch norms; features alone, (N, C), are PyTorch's.
_DIMS = {nn.BatchNorm1d: (3,), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,), nn.SyncBatchNorm: (3, 4, 5)}


def _has_dims(bn: Any, dims: int) -> bool:
    return any(isinstance(bn, kind) and dims in known for kind, known in _DIMS.items())


def _why_not_fused(call: Call) -> str | None:
    if call.bn is None:
        return "there is no batch norm"
    if not _has_dims(call.bn, call.input.dim()):
        return f"the input has {call.input.dim()} dimensions"
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
    rest = own["weight"], own["bias"], call.residual, eps_of(bn), *call.activation.arguments
    if call.fresh:
        batch_norm_running.overwrite(input, mean, variance, *rest)
        return input
    return batch_norm_running.normalize(input, mean, variance, *rest)


def fused_why_not(call: Call) -> str | None:
    """Why :func:`batch_norm_act` should not do a call."""
    if (reason := _why_not_fused(call)) is not None:
        return reason
    if isinstance(call.bn, nn.SyncBatchNorm):
        return None  # PyTorch's own is for GPUs, so ours takes it at any size
    if is_compiling() and not call.trains and not call.wants_grad:
        return "a compiled graph is fused by the compiler"
    how = EVALUATION if not call.trains else NO_ACTIVATION if call.act is None else TRAINING
    least = least_elements(how, call.input)
    if call.input.numel() < least:
        return f"{call.input.numel()} elements are fewer than {least}, from which on it pays"
    return None


def run_fused(call: Call, _: None = None) -> Tensor:
    arguments = batch_norm_arguments(call.bn)
    name, slope = call.activation
    rest = {"residual": call.residual, "activation": name, "negative_slope": slope}
    return batch_norm_act(call.input, **arguments, **rest)


def run_eager(call: Call, _: None = None) -> Any:
    """The modules and functions one by one."""
    output: Any = call.input
    if call.bn is not None:
        if call.checked:
            call.bn._check_input_dim(output)
            _check_devices(call.bn, output)
        output = _batch_norm(call.bn, output, call.norm)
    if call.checked and call.residual is not None:
        _check_residual(call.residual, output)
    if call.residual is not None or call.add is not None:
        output = output + call.residual if call.add is None else call.add(output, call.residual)
    return output if call.act is None else call.act(output)


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


def _batch_norm(bn: Any, input: Any, norm: Callable[[Any, Any], Any] | None) -> Any:
    """``bn(input)``, without what takes PyTorch's module longer than the operator takes when small.

    Args:
        norm: see :class:`Call`.
    """
    arguments = None
    if norm is not None:
        # All of torch.nn's have one forward; for other numbers of dimensions it looks at them.
        plain = norm is nn.BatchNorm2d.forward
    else:
        plain = type(bn) is nn.BatchNorm2d and calls_only_forward(bn) and not _has_any_global_hook()
    if plain and isinstance(input, Tensor) and input.dim() == 4:
        arguments = _plain_arguments(bn)
    if arguments is None:
        return bn(input) if norm is None else norm(bn, input)
    if bn.training:
        counter: Any = bn._buffers["num_batches_tracked"]
        counter.add_(1)
    mean, variance, weight, bias, training, momentum, eps = arguments
    # What PyTorch's function raises or hands on, it does itself: one value for each channel has no variance.
    if (
        type(input) is not Tensor
        or type(weight) not in _VECTORS
        or type(bias) not in _VECTORS
        or eps <= 0
        or (training and input.numel() == input.shape[1])
    ):
        return F.batch_norm(input, *arguments)
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(input, weight, bias, mean, variance, training, momentum, eps, cudnn)


def _plain_arguments(bn: Any) -> tuple[Any, ...] | None:
    """What a batch norm gives to the operator after the input; None where its forward has to tell."""
    buffers, parameters = bn._buffers, bn._parameters
    try:
        mean, variance, counter = (
            buffers["running_mean"],
            buffers["running_var"],
            buffers["num_batches_tracked"],
        )
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:  # somebody keeps them elsewhere
        return None
    momentum = bn.momentum
    if mean is None or counter is None or momentum is None or not bn.track_running_stats:
        return None
    return mean, variance, weight, bias, bn.training, momentum, bn.eps
