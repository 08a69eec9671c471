"""The ways in which a frozen convolution runs, and which of them a layer takes.

Each says why it does not take a layer, keeps the weight in its own order, and gives the function that a call
of the layer comes to, with all but the tensors given: small models gain by it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.weak import WeakTensorKeyDictionary

from .. import backends
from ..graph.activations import RELU, Activation, kernel_activation
from ..ops import conv_autotune
from ..ops.activations import ACTIVATIONS
from ..ops.conv_choice import (
    Conv,
    depthwise_cannot,
    depthwise_why_not,
    image_cannot,
    image_why_not,
    winograd_cannot,
    winograd_why_not,
)
from ..ops.depthwise_conv import depthwise_conv
from ..ops.image_conv import image_conv
from ..ops.winograd import winograd_conv, winograd_weight

if TYPE_CHECKING:
    from .layers import PackedConv

_mkldnn = torch.ops.mkldnn

#: What oneDNN is told where there is no activation.
NONE = Activation("none")
_IDENTITY = (ACTIVATIONS.index("identity"), 0.0)

Function = Callable[..., Tensor]


class Engine(NamedTuple):
    """A way to run a convolution.

    Attributes:
        name: what reports call it.
        cannot: the reason that a layer cannot run in this way here, or None if it can, fast or not.
        why_not: the reason that a layer does not run in this way, or None if it can, and should.
        pack: the weight that the layer keeps, from its plain one.
        bind: what a call of the layer comes to: a function of the input, and of the residual if there is one.
    """

    name: str
    cannot: Callable[[PackedConv], str | None]
    why_not: Callable[[PackedConv], str | None]
    pack: Callable[[PackedConv], Tensor]
    bind: Callable[[PackedConv], Function]


def choose(layer: PackedConv, chosen: Engine | None = None) -> tuple[Engine, list[tuple[str, str]]]:
    """The first of :data:`ENGINES` that takes a layer; the names of those before it, with their reasons.

    Args:
        chosen: the one that it took before, and takes again.
    """
    rejected = []
    for engine in ENGINES:
        reason = engine.why_not(layer)
        if chosen is not None:
            reason = None if engine is chosen else reason or f"{chosen.name} was chosen when it was frozen"
        if reason is None:
            return engine, rejected
        rejected.append((engine.name, reason))
    raise AssertionError("PyTorch's convolution takes every layer")


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def as_conv(layer: PackedConv) -> Conv | str:
    """The convolution that a layer does at the example's size; a reason why that is none for our kernels."""
    weight, size = layer.weight, layer.input_size
    if layer.output_padding is not None:
        return "it is transposed"
    if weight.dim() not in (4, 5):
        return f"it has {weight.dim() - 2} spatial dimensions, not 2 or 3"
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}"
    channels = weight.shape[1] * layer.groups
    if len(size) != weight.dim() or size[1] != channels or not weight.numel():
        return "the size of its input is not known"
    if backends.forced() not in (None, "cpu"):
        return f"backend {backends.forced()!r} was asked for"
    return Conv(
        size[0],
        channels,
        tuple(size[2:]),
        weight.shape[0],
        tuple(weight.shape[2:]),
        tuple(layer.stride),
        (*layer.padding, *layer.padding),
        tuple(layer.dilation),
        layer.groups,
        weight.dtype,
        True,  # frozen layers run in channels_last
    )


def _kernel_activation(activation: Activation | None) -> tuple[int, float] | None:
    """The index and the slope that our kernels take for an activation; None if they do not have it."""
    if activation is None:
        return _IDENTITY
    found = kernel_activation(activation)
    return None if found is None else (ACTIVATIONS.index(found.name), found.slope)


# --- Winograd ----------------------------------------------------------------------------------------------


def saved_multiplications(conv: Conv) -> int:
    """How many multiplications fewer Winograd's way has than the direct one."""
    return conv.work - conv.winograd_work


def winograd_unfit(layer: PackedConv) -> str | None:
    """Why Winograd's kernels are not for a layer, whatever memory there is."""
    conv = as_conv(layer)
    if isinstance(conv, str):
        return conv
    return winograd_why_not(conv)


def _winograd_cannot(layer: PackedConv) -> str | None:
    conv = as_conv(layer)
    return conv if isinstance(conv, str) else winograd_cannot(conv)


def _winograd_why_not(layer: PackedConv) -> str | None:
    return layer.left_out if layer.left_out is not None else winograd_unfit(layer)


_transformed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_transforming = threading.Lock()


def transformed(weight: Tensor, groups: int, stride: int) -> Tensor:
    """The weight as Winograd's kernels take it, made once as long as anybody keeps ``weight``.

    Nobody changes either. Layers that have the same plain weight, as copies of one do, have one of these for
    each stride.
    """
    with _transforming:
        found: dict[int, Tensor] | None = _transformed.get(weight)
        if found is None:
            found = _transformed[weight] = {}
        if stride not in found:
            found[stride] = winograd_weight(weight, groups, False, stride)
        return found[stride]


def _plain(layer: PackedConv) -> Tensor:
    return layer.weight.contiguous()


def _bind_winograd(layer: PackedConv) -> Function:
    # Another size than the example's runs in this way too. Where it has so few tiles that oneDNN would be
    # faster it is only slower: to choose by the call would take longer than it gains.
    operator, bias = winograd_conv, layer.bias
    weight = transformed(layer.weight, layer.groups, layer.stride[-1])
    dtype, channels_last = layer.weight.dtype, _channels_last(layer.weight)
    geometry = [*layer.padding, *layer.padding], layer.weight.shape[0], layer.groups
    steps = list(layer.stride), list(layer.dilation), list(layer.weight.shape[-2:])
    known = _kernel_activation(layer.activation)
    epilogue = *geometry, *(known or _IDENTITY), *steps
    activation = layer.activation if known is None else None

    def entered(x: Tensor) -> Tensor:
        """In the dtype, and in channels_last, which oneDNN's results are whatever its input is."""
        x = x if x.dtype is dtype else x.to(dtype)
        return (
            x if x.is_contiguous(memory_format=channels_last) else x.contiguous(memory_format=channels_last)
        )

    if layer.residual is None and activation is None:

        def call(x: Tensor) -> Tensor:
            return operator(entered(x), weight, bias, None, *epilogue)

        return call

    if layer.residual is None:

        def call_with_pass(x: Tensor) -> Tensor:
            assert activation is not None
            return activation(operator(entered(x), weight, bias, None, *epilogue), inplace=True)

        return call_with_pass

    def call_with_residual(x: Tensor, residual: Tensor) -> Tensor:
        # It is only read, also where it could be overwritten: tiles of the result are written while others
        # of the residual, which may have another order, are still to be read.
        x = entered(x)
        if not layer.fits(x, residual):
            # It broadcasts, or the result does.
            y = operator(x, weight, bias, None, *geometry, *_IDENTITY, *steps)
            return layer.finish(y, in_dtype(residual, dtype))
        y = operator(x, weight, bias, residual, *epilogue)
        return y if activation is None else activation(y, inplace=True)

    return call_with_residual


# --- depthwise, and images ---------------------------------------------------------------------------------


def _direct_reason(of_conv: Callable[[Conv], str | None], layer: PackedConv) -> str | None:
    conv = as_conv(layer)
    reason = conv if isinstance(conv, str) else of_conv(conv)
    if reason is not None:
        return reason
    if layer.residual is not None:
        return "it adds a residual"
    if _kernel_activation(layer.activation) is None:
        return f"it has no {layer.activation}, and a pass for that would take longer than it gains"
    return None


def _marked_channels_last(layer: PackedConv) -> Tensor:
    """With the strides by which the operator knows channels_last, whatever the input is."""
    weight = layer.weight
    return torch.empty_like(weight, memory_format=torch.channels_last).copy_(weight)


def _bind_direct(operator: Any, layer: PackedConv) -> Function:
    activation = _kernel_activation(layer.activation)
    assert activation is not None
    return bound(operator, layer.weight, (layer.bias, layer.stride, layer.padding, *activation))


def _direct(name: str, cannot: Callable[..., Any], why_not: Callable[..., Any], operator: Any) -> Engine:
    """The engine of an operator that takes bias, stride, padding and activation."""
    reasons = partial(_direct_reason, cannot), partial(_direct_reason, why_not)
    return Engine(name, *reasons, _marked_channels_last, partial(_bind_direct, operator))


# --- oneDNN ------------------------------------------------------------------------------------------------


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has prepacked kernels for ``dtype`` on ``device``."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return _mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return _mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def _onednn_why_not(layer: PackedConv) -> str | None:
    weight = layer.weight
    if layer.output_padding is not None:
        return "it is transposed"
    if weight.dim() not in (4, 5):
        return f"it has {weight.dim() - 2} spatial dimensions, not 2 or 3"
    if not weight.numel():
        return "its weight is empty"
    if not packs(weight.device, weight.dtype):
        return f"oneDNN packs no {str(weight.dtype).removeprefix('torch.')} for {weight.device.type}"
    if layer.residual is not None and layer.activation not in (None, RELU):
        return f"it adds a residual before {layer.activation}"
    return None


def _onednn_weight(layer: PackedConv) -> Tensor:
    geometry = layer.padding, layer.stride, layer.dilation, layer.groups
    return _mkldnn._reorder_convolution_weight(layer.weight.contiguous(), *geometry, layer.input_size)


def _bind_onednn(layer: PackedConv) -> Function:
    weight, bias = layer.weight, layer.bias
    geometry = layer.padding, layer.stride, layer.dilation, layer.groups
    pointwise = _mkldnn._convolution_pointwise.default
    if layer.residual is None:
        name, scalars, algorithm = layer.activation or NONE
        return bound(pointwise, weight, (bias, *geometry, name, list(scalars), algorithm))
    unary = None if layer.activation is None else layer.activation.name
    epilogue = weight, bias, *geometry, "add", 1.0, unary, [], ""
    add, overwrite = _mkldnn._convolution_pointwise.binary, _mkldnn._convolution_pointwise_.binary
    in_place, dtype = layer.residual == "overwrite", weight.dtype

    def call(x: Tensor, residual: Tensor) -> Tensor:
        x = in_dtype(x, dtype)
        if not layer.fits(x, residual):
            y = pointwise(x, weight, bias, *geometry, "none", [], "")
            return layer.finish(y, in_dtype(residual, y.dtype))
        if is_compiling():  # which knows no other of these operators
            y = pointwise(x, weight, bias, *geometry, "none", [], "") + residual
            return y if layer.activation is None else layer.activation(y)
        if in_place and residual.is_contiguous(memory_format=_channels_last(x)):
            return overwrite(residual, x, *epilogue)
        return add(x, residual, *epilogue)

    return call


def bound(operator: Any, weight: Tensor, epilogue: tuple) -> Function:
    """``operator(x, weight, *epilogue)`` as a function of ``x``."""
    dtype = weight.dtype

    def call(x: Tensor) -> Tensor:
        return operator(x if x.dtype is dtype else x.to(dtype), weight, *epilogue)

    return call


def _channels_last(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


# --- what is left ------------------------------------------------------------------------------------------


def _untunable(layer: PackedConv) -> str | None:
    weight = layer.weight
    if layer.output_padding is not None:
        return "it is transposed"
    if weight.dim() != 4:
        return f"it has {weight.dim() - 2} spatial dimensions, not 2"
    if layer.activation not in (None, RELU):
        return f"its activation is {layer.activation}"
    return None


def _tuned_why_not(layer: PackedConv) -> str | None:
    weight, reason = layer.weight, _untunable(layer)
    if (
        reason is None
        and weight.device.type == "cpu"
        and not conv_autotune.can_autotune(weight, weight.dtype)
    ):
        return "it is on the CPU"
    return reason


def _bind_tuned(layer: PackedConv) -> Function:
    weight, bias, relu = layer.weight, layer.bias, layer.activation == RELU
    geometry = conv_autotune.ConvParams(
        tuple(layer.stride), tuple(layer.padding), tuple(layer.dilation), layer.groups
    )

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = in_dtype(x, weight.dtype)
        if conv_autotune.can_autotune(x, x.dtype) and (residual is None or layer.fits(x, residual)):
            return conv_autotune.conv_bias_act(x, weight, bias, residual, geometry, relu)
        return layer.finish(layer.convolution(x), residual)

    return call


def _bind_aten(layer: PackedConv) -> Function:
    if _untunable(layer) is None:
        return _bind_tuned(layer)  # a call may be made under another backend
    return lambda x, residual=None: layer.finish(layer.convolution(x), residual)


def _in_channels_last(layer: PackedConv) -> Tensor:
    weight = layer.weight
    if weight.dim() != 4 or layer.output_padding is not None:
        return weight
    return weight.contiguous(memory_format=torch.channels_last)


WINOGRAD = Engine("Winograd", _winograd_cannot, _winograd_why_not, _plain, _bind_winograd)
DEPTHWISE = _direct("depthwise", depthwise_cannot, depthwise_why_not, depthwise_conv)
IMAGE = _direct("image", image_cannot, image_why_not, image_conv)
ONEDNN = Engine("prepacked", _onednn_why_not, _onednn_why_not, _onednn_weight, _bind_onednn)
TUNED = Engine("autotuned", _tuned_why_not, _tuned_why_not, _in_channels_last, _bind_tuned)
ATEN = Engine("PyTorch", lambda layer: None, lambda layer: None, _in_channels_last, _bind_aten)
#: In the order in which they are tried.
ENGINES = (WINOGRAD, DEPTHWISE, IMAGE, ONEDNN, TUNED, ATEN)
