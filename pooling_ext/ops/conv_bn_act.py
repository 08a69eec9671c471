"""Convolution, batch normalisation, an optional residual and ReLU, from the modules that hold them.

In training the convolution is PyTorch's and the rest is :func:`batch_norm_act`; on a GPU the convolution may
be one of ours, which makes the statistics as it writes. Where they are constants and no gradient is wanted,
one pass over what a CPU's convolution wrote does the rest, in place; or they are folded into the weights
(Jacob et al. 2018, section 3.2), and the bias and ReLU are done while the convolution writes: by oneDNN where
its output is large, or on a GPU, with the addition, in the fastest of several ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import _has_any_global_hook

from .. import backends
from ..errors import ArgumentError
from . import _library, batch_norm_running, tuned_conv
from .batch_norm_act import (
    ACTIVATIONS,
    alike,
    batch_norm_act,
    batch_norm_arguments,
    check_device,
    check_tensor,
    eps_of,
    in_training,
    needs_grad,
    transformed,
    update_running,
)
from .deferred_norm import Deferred

# The dtypes in which oneDNN rectifies as it writes.
_FOLDED = frozenset((torch.float32, torch.bfloat16))
backends.register("conv_bn_act", cpu=_FOLDED)

#: Folding reads and writes the weights once more, which pays where the output is this much larger.
FOLD_RATIO = 32
#: PyTorch makes 1x1 convolutions of fewer images than this matrix products if it has but one thread, which
#: in NCHW beats oneDNN at fewer channels than this.
_PRODUCT_BATCH, _PRODUCT_CHANNELS = 16, 64
#: With fewer multiplications oneDNN takes longer to begin than the product takes.
_PRODUCT_WORK = 1 << 21
#: The classes of what a batch norm in eval mode may be given beside its input.
_VECTORS = frozenset((Tensor, nn.Parameter, type(None)))


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
    if not (type(conv) is nn.Conv2d and type(bn) is nn.BatchNorm2d) and not _are_fusible(conv, bn):
        return _unfused(conv, bn, input, residual, activation)
    tensors = isinstance(input, Tensor) and (residual is None or isinstance(residual, Tensor))
    if tensors and tunes(conv, bn, input, residual):
        return tuned(conv, bn, input, residual, activation)
    if tensors and residual is None and folds(conv, bn, input):
        return folded(conv, bn, input, activation)
    fresh = not bn.training and type(conv) is nn.Conv2d and calls_only_forward(conv)
    if not (fresh and tensors) or _has_any_global_hook():
        output = conv(input)
    else:
        output = convolved(conv, input)
        if residual is None or (residual.shape == output.shape and alike(output, residual)):
            found = evaluated(bn, output, residual, activation == "relu", overwrite=True)
            if found is not None:
                return found
    _check_batch(conv, bn, input, output)
    return batch_norm_act(output, **batch_norm_arguments(bn), residual=residual, activation=activation)


def _are_fusible(conv: Any, bn: Any) -> bool:
    """Whether ``bn`` is a batch norm that does what PyTorch's do.

    Raises:
        TypeError: ``conv`` or ``bn`` is of no kind that can be here.
    """
    if not isinstance(conv, nn.Module):
        raise TypeError(f"conv must be a convolution module, but got {type(conv).__name__}")
    if not isinstance(bn, _BatchNorm):
        raise TypeError(f"bn must be a batch norm module, but got {type(bn).__name__}")
    if isinstance(bn, LazyModuleMixin):  # which is made when it is called
        return False
    return type(bn).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _check_batch(conv: Any, bn: Any, input: Tensor, output: Tensor) -> None:
    """Raise ValueError unless ``output`` is a batch, of as many dimensions as ``bn`` takes."""
    if isinstance(conv, _ConvNd) and output.dim() != len(conv.kernel_size) + 2:
        dims = len(conv.kernel_size) + 2
        raise ArgumentError(f"input must be a batch ({dims}D), but got shape {tuple(input.shape)}")
    bn._check_input_dim(output)


def _unfused(conv: Any, bn: Any, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """:func:`conv_bn_act` with a batch norm that has a forward of its own."""
    output = bn(conv(input))
    if residual is not None:
        check_tensor("residual", residual)
        check_device("residual", residual, output)
        if residual.shape != output.shape:
            raise ArgumentError(
                f"residual must have the output's shape {tuple(output.shape)}, but got "
                f"{tuple(residual.shape)}"
            )
        output = output + residual
    return torch.relu(output) if activation == "relu" else output


def calls_only_forward(module: Any) -> bool:
    """Whether calling ``module`` does nothing but its class's forward, global hooks aside."""
    return (
        not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and module._compiled_call_impl is None
        and "forward" not in module.__dict__
    )


def _autocast_dtype(device: str = "cpu") -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def tunes(conv: Any, bn: Any, input: Tensor, residual: Tensor | None) -> bool:
    """Whether :func:`conv_bn_act` goes one of a GPU's ways."""
    if input.is_cpu and backends.forced() not in ("cuda", "triton"):
        return False
    if type(conv) is not nn.Conv2d or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
        return False
    if conv._forward_hooks or conv._forward_pre_hooks or transformed() or input.dim() != 4:
        return False
    if input.numel() == 0 or input.shape[1] != conv.in_channels or not _library.suggests_channels_last(input):
        return False
    dtype = _autocast_dtype(input.device.type) or input.dtype
    if conv.weight.dtype != dtype and not torch.is_autocast_enabled(input.device.type):
        return False
    if residual is not None and (residual.dtype != dtype or residual.device != input.device):
        return False
    arguments = conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var
    if any(x is not None and x.device != input.device for x in arguments):
        return False
    trains = bn.training or bn.running_mean is None
    if trains and isinstance(bn, nn.SyncBatchNorm):
        return False  # its statistics are those of all processes
    if not trains and needs_grad(input, residual, conv.weight, conv.bias, bn.weight, bn.bias):
        return False
    return tuned_conv.takes(input, dtype)


def tuned(
    conv: Any,
    bn: Any,
    input: Tensor | Deferred,
    residual: Tensor | None,
    activation: str,
    following: nn.Module | None = None,
) -> Any:
    """:func:`conv_bn_act` where :func:`tunes` holds.

    Args:
        input: a tensor, or one that is yet to be computed.
        following: the convolution into which alone the result goes, if there is one.

    Returns:
        A tensor; or with ``following``, where that is faster, a :class:`Deferred`.
    """
    trains = bn.training or bn.running_mean is None
    if isinstance(input, Deferred) and (not trains or conv.groups != 1):
        input = input.computed()
    first = input.output if isinstance(input, Deferred) else input
    device, relu = first.device.type, activation == "relu"
    dtype = _autocast_dtype(device) or first.dtype
    geometry = tuned_conv.Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)
    with torch.autocast(device, enabled=False):
        if not trains:
            with torch.no_grad():
                weight, bias = _fold(conv, bn)
                weight = weight.to(dtype, memory_format=torch.channels_last)
                x = first.to(dtype)
                return tuned_conv.conv_bias_act(x, weight, bias.to(dtype), residual, geometry, relu)
        weight = conv.weight.to(dtype)
        bias = None if conv.bias is None else conv.bias.to(dtype)
        if isinstance(input, Deferred):
            output, stats = input.convolved(weight, bias, geometry)
        else:
            output, stats = tuned_conv.conv_stats_with_grad(input.to(dtype), weight, bias, geometry)
        if residual is not None and residual.shape != output.shape:
            raise ArgumentError(
                f"residual must have the output's shape {tuple(output.shape)}, but got "
                f"{tuple(residual.shape)}"
            )
        arguments = batch_norm_arguments(bn)
        running = arguments["running_mean"], arguments["running_var"]
        momentum, eps = arguments["momentum"], arguments["eps"]
        if following is not None and residual is None:
            norm = Deferred(output, stats, bn.weight, bn.bias, eps, relu)
            if norm.pays(following):
                update_running(output, stats, *running, momentum)
                return norm
        return in_training(output, *running, bn.weight, bn.bias, momentum, eps, residual, relu, stats)


def outputs(conv: Any, input: Tensor) -> int:
    """About how many elements ``conv(input)`` has: just so many for the usual padding and even sizes."""
    stride = conv.stride
    return input.numel() * conv.out_channels // (conv.in_channels * stride[0] * stride[1])


def folds(conv: Any, bn: Any, input: Tensor) -> bool:
    """Whether to fold the statistics into the weights: they are constant, and it pays.

    Not where a residual is added: oneDNN, which reads it while it writes, is slower than a pass of its own.
    """
    # What mostly decides comes first, and without nn.Module.__getattr__'s search.
    if bn.training or type(conv) is not nn.Conv2d or isinstance(conv.padding, str) or input.dim() != 4:
        return False
    if is_compiling() or transformed():
        return False
    weight = conv._parameters.get("weight")
    mean, variance = bn._buffers.get("running_mean"), bn._buffers.get("running_var")
    if weight is None or mean is None or variance is None or mean.shape[0] != weight.shape[0]:
        return False
    if torch.is_grad_enabled() and needs_grad(input, weight, conv.bias, bn.weight, bn.bias):
        return False
    if conv.padding_mode != "zeros" or conv._forward_hooks or conv._forward_pre_hooks:
        return False
    channels, elements = input.shape[1], input.numel()
    if channels != conv.in_channels or elements == 0:
        return False
    autocast = _autocast_dtype()
    dtype = autocast or input.dtype
    if autocast is None and weight.dtype != dtype:
        return False
    if dtype not in _FOLDED or outputs(conv, input) < FOLD_RATIO * weight.numel():
        return False
    if backends.choose("conv_bn_act", input) is backends.ATEN or not torch.backends.mkldnn.is_available():
        return False
    if any(x is not None and not x.is_cpu for x in (input, weight, mean, variance, bn.weight, bn.bias)):
        return False  # batch_norm_act says which
    return not (_is_product(conv, input) and _is_faster_product(conv, input))


def _is_product(conv: Any, input: Tensor) -> bool:
    """Whether PyTorch makes a matrix product of the convolution."""
    return (
        conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and input.shape[0] < _PRODUCT_BATCH
        and input.dtype == torch.float32
        and torch.get_num_threads() == 1
    )


def _is_faster_product(conv: Any, input: Tensor) -> bool:
    """Whether it is right to do so."""
    if input.numel() * conv.out_channels < _PRODUCT_WORK:
        return True
    channels = min(conv.in_channels, conv.out_channels)
    return channels < _PRODUCT_CHANNELS and not input.is_contiguous(memory_format=torch.channels_last)


def convolved(conv: Any, input: Tensor) -> Tensor:
    """``conv(input)`` for a :class:`torch.nn.Conv2d` of which calling does nothing but its forward."""
    parameters = conv._parameters
    weight = parameters.get("weight")
    if weight is None or conv.padding_mode != "zeros" or is_compiling():
        return conv(input)
    bias, padding = parameters["bias"], conv.padding
    if (
        input.dim() == 4
        and _is_product(conv, input)
        and conv.groups == 1
        and not isinstance(padding, str)
        and type(input) is Tensor
        and input.is_cpu
        and weight.is_cpu
        and weight.dtype == torch.float32
        and input.shape[1] == conv.in_channels
        and not torch.is_grad_enabled()
        and _autocast_dtype() is None
        and torch._C._get_mkldnn_enabled()
        and torch.backends.mkldnn.is_available()
        and not transformed()
        and input.numel() > 0
        and not _is_faster_product(conv, input)
    ):
        return torch.mkldnn_convolution(input, weight, bias, padding, conv.stride, conv.dilation, 1)
    return torch.conv2d(input, weight, bias, conv.stride, padding, conv.dilation, conv.groups)


def evaluated(bn: Any, input: Tensor, residual: Tensor | None, relu: bool, overwrite: bool) -> Tensor | None:
    """A batch norm in eval mode, addition and ReLU in one operator of the CPU; None where it cannot.

    Args:
        overwrite: whether the result may be the input, which then nobody else has.
    """
    if type(input) is not Tensor or not input.is_cpu or input.dim() != 4 or is_compiling() or transformed():
        return None
    running, own = bn._buffers, bn._parameters
    try:
        mean, variance = running["running_mean"], running["running_var"]
        weight, bias = own["weight"], own["bias"]
    except KeyError:  # somebody keeps them elsewhere
        return None
    if not type(mean) is type(variance) is Tensor or mean.numel() != input.shape[1]:  # there may be none
        return None
    if type(weight) not in _VECTORS or type(bias) not in _VECTORS or type(residual) not in _VECTORS:
        return None
    if not (
        mean.is_cpu
        and variance.is_cpu
        and (weight is None or weight.is_cpu)
        and (bias is None or bias.is_cpu)
    ):
        return None  # batch_norm_act says which
    if torch.is_grad_enabled() and needs_grad(input, residual, weight, bias):
        return None
    if backends.choose("batch_norm_act", input) is not backends.CPU:
        return None
    eps = eps_of(bn)
    if overwrite:
        batch_norm_running.overwrite(input, mean, variance, weight, bias, residual, eps, relu)
        return input
    return batch_norm_running.normalise(input, mean, variance, weight, bias, residual, eps, relu)


def folded(conv: Any, bn: Any, input: Tensor, activation: str) -> Tensor:
    """:func:`conv_bn_act` where :func:`folds` holds."""
    autocast = _autocast_dtype()
    if autocast is not None:
        with torch.autocast("cpu", enabled=False):
            return _fold_and_run(conv, bn, input, activation, autocast)
    return _fold_and_run(conv, bn, input, activation, input.dtype)


@torch.no_grad()
def _fold_and_run(conv: Any, bn: Any, input: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    own, norm, running = conv._parameters, bn._parameters, bn._buffers
    weight, bias = batch_norm_running.fold(
        own["weight"],
        own["bias"],
        running["running_mean"],
        running["running_var"],
        norm["weight"],
        norm["bias"],
        eps_of(bn),
        dtype,
    )
    if input.dtype != dtype:
        input = input.to(dtype)
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    after = "relu" if activation == "relu" else "none"
    return torch.ops.mkldnn._convolution_pointwise.default(input, weight, bias, *geometry, after, [], "")


def _fold(conv: Any, bn: Any) -> tuple[Tensor, Tensor]:
    """The weight and bias of one convolution that does both, on a GPU."""
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
