"""A convolution with what follows it on the CPU: by our kernels, or by oneDNN with the batch norm folded."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ... import backends
from ...autograd import transformed
from .. import batch_norm_running, winograd_weights
from .._library import suggests_channels_last
from ..activations import Activation
from ..batch_norm_act import in_training
from ..batch_norm_arguments import batch_norm_arguments, eps_of
from ..conv_choice import (
    DEPTHWISE,
    FORWARD,
    IMAGE,
    MOST_IMAGE_CHANNELS,
    PHASES,
    POINTWISE,
    WINOGRAD,
    Conv,
    call_why_not,
)
from ..conv_kernels import Plan, convolve, convolve_with_stats, in_format, plan
from ..conv_shape import WINOGRAD_KERNELS
from ..depthwise_conv import depthwise_conv
from ..image_conv import image_conv
from ..winograd import winograd_conv
from ..winograd_weights import Norm
from .call import FOLDED, NO_CONVOLUTION, Call, autocast_dtype, least_elements

# The dtypes in which oneDNN applies an activation as it writes.
_FOLDED = frozenset((torch.float32, torch.bfloat16))
backends.register("conv_bn_act", cpu=_FOLDED)

#: Folding reads and writes the weights once more, which pays where the output is this much larger.
FOLD_RATIO = 32
#: PyTorch makes 1x1 convolutions of fewer images than this matrix products if it has but one thread, which
#: in NCHW beats oneDNN at fewer channels than this.
_PRODUCT_BATCH, _PRODUCT_CHANNELS = 16, 64
#: With fewer multiplications oneDNN takes longer to begin than the product takes.
_PRODUCT_WORK = 1 << 21


def outputs(conv: Any, input: Tensor) -> int:
    """About how many elements ``conv(input)`` has: just so many for the usual padding and even sizes."""
    stride = conv.stride
    return input.numel() * conv.out_channels // (conv.in_channels * stride[0] * stride[1])


def _why_not_here(call: Call) -> str | None:
    """Why no kernels of the CPU can do a convolution with constants folded into it."""
    conv, bn, input = call.conv, call.bn, call.input
    if transformed():
        return "torch.func or forward mode is at work"
    if input.dim() != 4 or input.shape[1] != conv.in_channels or input.numel() == 0:
        return "the input is no batch of images that the convolution takes"
    weight, bias = conv._parameters["weight"], conv._parameters.get("bias")
    vectors: list[Any] = [weight, bias]
    if bn is not None:
        running, own = bn._buffers, bn._parameters
        try:
            vectors += [running["running_mean"], running["running_var"], own["weight"], own["bias"]]
        except KeyError:
            return "somebody keeps the parameters elsewhere"
        if not call.trains and running["running_mean"].shape[0] != weight.shape[0]:
            return "the statistics do not go with the convolution"
    if not input.is_cpu or any(x is not None and not x.is_cpu for x in vectors):
        return "something is not on the CPU"
    if weight.dtype != call.dtype and (autocast_dtype() is None or weight.dtype == torch.float64):
        return "the weight's dtype is not the input's"
    return None


# --- our kernels ------------------------------------------------------------------------------------------


def winograd_why_not(call: Call) -> str | None:
    conv = call.conv
    if conv is None:
        return NO_CONVOLUTION
    if conv.kernel_size not in WINOGRAD_KERNELS:
        return "the kernel is not 3x3, 5x5 or a row of 3 or 7"
    if call.exact:
        return "exact results are asked for"
    return _own_why_not(call, WINOGRAD)


def depthwise_why_not(call: Call) -> str | None:
    conv = call.conv
    if conv is None:
        return NO_CONVOLUTION
    if conv.groups == 1:
        return "the convolution is not depthwise"
    if call.residual is not None and not (call.trains or call.wants_grad):
        return "it adds no residual"
    return _own_why_not(call, DEPTHWISE)


def image_why_not(call: Call) -> str | None:
    conv = call.conv
    if conv is None:
        return NO_CONVOLUTION
    if conv.in_channels > MOST_IMAGE_CHANNELS:
        return "the input has more channels than an image"
    if call.residual is not None and not (call.trains or call.wants_grad):
        return "it adds no residual"
    return _own_why_not(call, IMAGE)


def pointwise_why_not(call: Call) -> str | None:
    conv = call.conv
    if conv is None:
        return NO_CONVOLUTION
    if conv.kernel_size != (1, 1):
        return "the kernel is not 1x1"
    if call.bn is not None and not (call.trains or call.wants_grad) and suggests_channels_last(call.input):
        return "in channels_last oneDNN folds the batch norm in"
    return _own_why_not(call, POINTWISE)


def _own_why_not(call: Call, kernels: str) -> str | None:
    if backends.forced() not in (None, "cpu"):
        return f"backend {backends.forced()!r} was asked for"
    if type(call.input) not in backends.PLAIN_TENSORS:
        return "the input is a tensor subclass"
    if (reason := _why_not_here(call)) is not None:
        return reason
    if is_compiling() and not call.wants_grad:
        return "a compiled graph would transform the weight at every call"
    geometry = call.geometry()
    assert geometry is not None
    if call.residual is not None and not call.residual_fits():
        return "the residual is not like the output"
    return call_why_not(kernels, geometry, PHASES if call.wants_grad else (FORWARD,))


class Prepared(NamedTuple):
    """What calls of our kernels have in common: the convolution, and with gradients how it is done."""

    geometry: Conv
    plan: Plan | None


def prepare(kernels: str, call: Call) -> Prepared:
    geometry = call.geometry()
    assert geometry is not None
    grads = call.trains or call.wants_grad
    return Prepared(geometry, plan(kernels, geometry) if grads else None)


def prepare_pointwise(call: Call) -> Plan:
    geometry = call.geometry()
    assert geometry is not None
    return plan(POINTWISE, geometry)


def run_pointwise(call: Call, plan: Plan) -> Any:
    return _run_planned(call, plan)


def run_winograd(call: Call, prepared: Prepared) -> Any:
    conv, geometry = call.conv, prepared.geometry
    weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    if prepared.plan is not None:
        if not is_compiling():
            winograd_weights.forget(weight)
        return _run_planned(call, prepared.plan)
    constants, (step, _) = _constants(call), geometry.stride
    transformed_weight, shift = winograd_weights.transformed(weight, bias, constants, conv.groups, step)
    return winograd_conv(
        in_format(call.input.to(geometry.dtype), geometry.channels_last),
        transformed_weight,
        shift,
        call.residual,
        geometry.padding,
        geometry.features,
        geometry.groups,
        *call.activation.arguments,
        geometry.stride,
        geometry.dilation,
        geometry.kernel,
    )


def run_depthwise(call: Call, prepared: Prepared) -> Any:
    return _run_direct(call, prepared, depthwise_conv)


def run_image(call: Call, prepared: Prepared) -> Any:
    return _run_direct(call, prepared, image_conv)


def _run_direct(call: Call, prepared: Prepared, operator: Any) -> Any:
    """With the batch norm folded into the weight, which is small, at each call."""
    if prepared.plan is not None:
        return _run_planned(call, prepared.plan)
    own, norm, dtype = call.conv._parameters, _constants(call), prepared.geometry.dtype
    with torch.no_grad():
        weight, bias = own["weight"], own["bias"]
        if norm is None:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        else:
            weight, bias = batch_norm_running.fold(weight, bias, *norm, dtype)
        padding, after = prepared.geometry.padding[:2], call.activation.arguments
        return operator(call.input.to(dtype), weight, bias, call.conv.stride, padding, *after)


def _constants(call: Call) -> Norm | None:
    """The batch norm to fold in."""
    bn = call.bn
    if bn is None:
        return None
    running, own = bn._buffers, bn._parameters
    return Norm(running["running_mean"], running["running_var"], own["weight"], own["bias"], eps_of(bn))


def _run_planned(call: Call, plan: Plan) -> Any:
    """The convolution with its gradients, and in training with the statistics that the batch norm takes.

    Where the statistics are not the batch's own, or the kernels make none, the convolution alone is done.
    """
    own, bn, dtype = call.conv._parameters, call.bn, call.dtype
    weight, bias = own["weight"], own["bias"]
    alone = not call.trains or plan.kernels == POINTWISE or isinstance(bn, nn.SyncBatchNorm)
    with torch.autocast("cpu", enabled=False):
        x, weight, bias = call.input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        if alone:
            output = convolve(x, weight, bias, plan)
        else:
            output, stats = convolve_with_stats(x, weight, bias, plan)
    if alone:
        call.continue_with(output)
        return call
    arguments = batch_norm_arguments(bn)
    running = arguments["running_mean"], arguments["running_var"]
    rest = arguments["momentum"], arguments["eps"], call.residual, call.activation, stats
    return in_training(output, *running, bn.weight, bn.bias, *rest)


# --- oneDNN's, with the batch norm folded in --------------------------------------------------------------


@cache
def _has_bfloat16() -> bool:
    """Whether oneDNN's convolutions take it, for which they need more than AVX2; they raise otherwise."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def folded_why_not(call: Call) -> str | None:
    """Why not to fold the statistics into the weights for oneDNN.

    Not where a residual is added: oneDNN, which reads it while it writes, is slower than a pass of its own.
    """
    # What mostly decides comes first.
    conv, bn, input = call.conv, call.bn, call.input
    if conv is None:
        return NO_CONVOLUTION
    if bn is None:
        return "there is no batch norm"
    if call.trains:
        return "the statistics are the batch's"
    if call.residual is not None or call.add is not None:
        return "a residual is added, which is slower folded"
    if call.wants_grad:
        return "gradients are wanted"
    if isinstance(conv.padding, str):
        return "the padding is in words"
    if is_compiling():
        return "a compiled graph is fused by the compiler"
    if (reason := _why_not_here(call)) is not None:
        return reason
    if call.dtype not in _FOLDED:
        return f"oneDNN applies no activation to {call.dtype}"
    if call.dtype == torch.bfloat16 and not _has_bfloat16():
        return "oneDNN has no bfloat16 on this processor"
    made, weights = outputs(conv, input), conv._parameters["weight"].numel()
    if made < FOLD_RATIO * weights:
        return f"the output is not {FOLD_RATIO} times as large as the weight, which is folded at each call"
    if made < least_elements(FOLDED, input):
        return f"{made} elements are fewer than {least_elements(FOLDED, input)}"
    if backends.choose("conv_bn_act", input) is backends.ATEN or not torch.backends.mkldnn.is_available():
        return "oneDNN is not to be had"
    if _is_product(conv, input) and _is_faster_product(conv, input):
        return "PyTorch makes a matrix product of it, which is faster"
    return None


def run_folded(call: Call, _: None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return _fold_and_run(call.conv, _constants(call), call.input, call.activation, call.dtype)


@torch.no_grad()
def _fold_and_run(conv: Any, norm: Any, input: Tensor, act: Activation, dtype: torch.dtype) -> Tensor:
    own = conv._parameters
    weight, bias = batch_norm_running.fold(own["weight"], own["bias"], *norm, dtype)
    if input.dtype != dtype:
        input = input.to(dtype)
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    name, scalars, algorithm = act.post_op
    return torch.ops.mkldnn._convolution_pointwise.default(
        input, weight, bias, *geometry, name, list(scalars), algorithm
    )


# --- PyTorch's --------------------------------------------------------------------------------------------


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


def convolved(call: Call) -> Tensor:
    """``conv(input)``."""
    conv, input = call.conv, call.input
    parameters = conv._parameters
    weight, bias, padding = parameters["weight"], parameters["bias"], conv.padding
    # The first conditions spare small convolutions, around which every look shows, all that follow.
    if (
        not torch.is_grad_enabled()
        and conv.kernel_size == (1, 1)
        and not is_compiling()
        and input.dim() == 4
        and not _is_faster_product(conv, input)
        and _is_product(conv, input)
        and conv.groups == 1
        and not isinstance(padding, str)
        and type(input) is Tensor
        and input.is_cpu
        and weight.is_cpu
        and weight.dtype == torch.float32
        and input.shape[1] == conv.in_channels
        and autocast_dtype() is None
        and torch._C._get_mkldnn_enabled()
        and torch.backends.mkldnn.is_available()
        and not transformed()
        and input.numel() > 0
    ):
        return torch.mkldnn_convolution(input, weight, bias, padding, conv.stride, conv.dilation, 1)
    return torch.conv2d(input, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
