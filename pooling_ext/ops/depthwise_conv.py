"""Depthwise convolution: each channel has a kernel of its own.

Four low-level operators, and :func:`depthwise_conv2d`, which is differentiable. Kernels are 3x3, 5x5 or 7x7,
strides 1 or 2, the padding any; sums are made in float32, or float64 for float64. Results have the memory
format that PyTorch's convolution would give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from .. import backends
from . import _library
from ._dispatch import public
from .batch_norm_act import FLOATS, needs_grad, transformed
from .conv_activations import ACTIVATIONS as ACTIVATIONS

KERNEL_SIZES = (3, 5, 7)
STRIDES = (1, 2)

backends.register("depthwise_conv", cpu=FLOATS)


def in_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's convolution of these gives its results in channels_last."""
    return _library.suggests_channels_last(input) or _library.suggests_channels_last(weight)


def _output(input: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    spatial = [
        (size + 2 * pad - kernel) // step + 1
        for size, kernel, step, pad in zip(input.shape[2:], weight.shape[2:], stride, padding, strict=True)
    ]
    return _empty(input, (*input.shape[:2], *spatial), in_channels_last(input, weight))


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    format = _library.memory_format(2, channels_last)
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=format)


#: ``activation(conv(input, weight) + bias)``; ``activation`` is an index of
#: :data:`ACTIVATIONS`, ``slope`` that of leaky_relu.
depthwise_conv = _library.define(
    "depthwise_conv(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, "
    "int activation, float slope)",
    "Tensor",
    lambda input, weight, bias, stride, padding, *_: _output(input, weight, stride, padding),
    vmap=False,
)

#: ``conv(input, weight) + bias`` and its statistics, as batch_norm_stats has them.
depthwise_conv_stats = _library.define(
    "depthwise_conv_stats(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding)",
    "(Tensor, Tensor)",
    lambda input, weight, bias, stride, padding: (
        _output(input, weight, stride, padding),
        input.new_empty((2, input.shape[1]), dtype=torch.float64),
    ),
    vmap=False,
)

depthwise_conv_input_grad = _library.define(
    "depthwise_conv_input_grad(Tensor grad, Tensor weight, SymInt[] input_size, SymInt[] stride, "
    "SymInt[] padding, bool channels_last)",
    "Tensor",
    lambda grad, weight, input_size, stride, padding, channels_last: _empty(grad, input_size, channels_last),
    vmap=False,
)

#: The gradients of the weight and, if ``bias`` is true, of the bias; else that has no size.
depthwise_conv_weight_grad = _library.define(
    "depthwise_conv_weight_grad(Tensor grad, Tensor input, SymInt[] weight_size, SymInt[] stride, "
    "SymInt[] padding, bool channels_last, bool bias)",
    "(Tensor, Tensor)",
    lambda grad, input, weight_size, stride, padding, channels_last, bias: (
        input.new_empty(weight_size),
        input.new_empty(input.shape[1] if bias else 0),
    ),
    vmap=False,
)


def why_not(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int | None = None,
) -> str | None:
    """The reason why the kernels cannot do a convolution of these arguments, or None if they can.

    Args:
        input: ``(N, C, H, W)``.
        weight: ``(C, 1, K, K)``.
        groups: None for a group per channel of the input.
    """
    if backends.choose("depthwise_conv", input) is not backends.CPU:
        call = backends.Call("depthwise_conv", input.device, input.dtype, input.layout, type(input))
        return backends.CPU.why_not(call) or f"backend {backends.forced()!r} was asked for"
    if input.dim() != 4 or weight.dim() != 4:
        return f"the input has {input.dim()} dimensions, not 4"
    channels = input.shape[1]
    if groups not in (None, channels) or weight.shape[1] != 1:
        return "a group of it is more than one channel"
    if weight.shape[0] != channels:
        return f"it makes {weight.shape[0]} channels of {channels}"
    kernel = weight.shape[2]
    if kernel != weight.shape[3] or kernel not in KERNEL_SIZES:
        return f"its kernel is {kernel}x{weight.shape[3]}, not 3x3, 5x5 or 7x7"
    if isinstance(padding, str):
        return f"its padding is {padding!r}, not in numbers"
    strides, paddings = _pair(stride), _pair(padding)
    if len(strides) != 2 or any(step not in STRIDES for step in strides):
        return f"its stride is {strides}, not 1 or 2"
    if _pair(dilation) != (1, 1):
        return f"its dilation is {_pair(dilation)}, not 1"
    if len(paddings) != 2 or min(paddings) < 0:
        return f"its padding is {paddings}, not two numbers of at least 0"
    if any(size + 2 * pad < kernel for size, pad in zip(input.shape[2:], paddings, strict=True)):
        return "its kernel does not fit the input"
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and (value.dtype != input.dtype or value.device != input.device):
            return f"{name} is {value.dtype} on {value.device}, the input {input.dtype} on {input.device}"
    if bias is not None and bias.shape != (channels,):
        return f"bias has shape {tuple(bias.shape)}, not ({channels},)"
    return None


#: What a convolution is in training: each is decided for itself.
FORWARD, INPUT_GRAD, WEIGHT_GRAD = PHASES = ("forward", "input gradient", "weight gradient")

#: In channels_last, the pixels of an output plane, from and to, for which the kernels were measured to be as
#: fast as PyTorch's or faster (benchmarks/depthwise.py, AVX-512), by phase, dtype, kernel size and stride.
#: What is not listed, in the contiguous format all but float16's forward, is faster at every size.
_FASTER: dict[tuple[str, torch.dtype, int, int], tuple[int, int]] = {
    (FORWARD, torch.float32, 3, 1): (1, 7 * 7),
    (FORWARD, torch.float32, 3, 2): (0, 0),
    (FORWARD, torch.float32, 5, 1): (1, 14 * 14),
    (FORWARD, torch.float32, 5, 2): (0, 0),
    (FORWARD, torch.float32, 7, 1): (1, 28 * 28),
    (FORWARD, torch.float32, 7, 2): (0, 0),
    (FORWARD, torch.bfloat16, 3, 1): (0, 0),
    (FORWARD, torch.bfloat16, 3, 2): (0, 0),
    (FORWARD, torch.bfloat16, 5, 1): (0, 0),
    (FORWARD, torch.bfloat16, 5, 2): (1, 14 * 14),
    (FORWARD, torch.bfloat16, 7, 1): (1, 28 * 28),
    (FORWARD, torch.bfloat16, 7, 2): (0, 0),
    (WEIGHT_GRAD, torch.float32, 3, 1): (28 * 28, 56 * 56),
    (WEIGHT_GRAD, torch.float32, 3, 2): (28 * 28, 56 * 56),
}


def should_run(
    phase: str,
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> bool:
    """Whether the kernels are to do a phase of a convolution that they can do: PyTorch's are not faster.

    Args:
        phase: of :data:`PHASES`.
    """
    if phase == FORWARD and input.dtype == torch.float16:
        return False
    kernel, strides, paddings = weight.shape[2], _pair(stride), _pair(padding)
    limits = _FASTER.get((phase, input.dtype, kernel, max(strides)))
    if limits is None or not in_channels_last(input, weight):
        return True
    sizes = [
        (size + 2 * pad - kernel) // step + 1
        for size, step, pad in zip(input.shape[2:], strides, paddings, strict=True)
    ]
    return limits[0] <= sizes[0] * sizes[1] <= limits[1]


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(value, int):
        return value, value
    return tuple(value) * 2 if len(value) == 1 else tuple(value)


def _aten(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
    return F.conv2d(input, weight, bias, stride, padding, 1, input.shape[-3])


class _Plan(NamedTuple):
    """What a call is told besides its tensors; ``ours``: which of the phases the kernels do."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    channels_last: bool
    ours: tuple[bool, ...]


class _DepthwiseConv(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.plan, ctx.biased = plan, bias is not None
        return _forward(input, weight, bias, plan)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, weight = ctx.saved_tensors
        (grad,) = grads
        wanted = tuple(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() and not is_compiling():
            # Out of operators that PyTorch can differentiate again.
            found = _aten_gradients(grad, input, weight, ctx.plan, wanted)
        else:
            found = _gradients(grad, input, weight, ctx.plan, wanted)
        return *(x if want else None for x, want in zip(found, wanted, strict=True)), None


def _forward(input: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan) -> Tensor:
    if not plan.ours[0]:
        return _aten(input, weight, bias, plan.stride, plan.padding)
    return depthwise_conv(input, weight, bias, plan.stride, plan.padding, 0, 0.0)


def _aten_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, plan: _Plan, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    channels = weight.shape[0]
    return torch.ops.aten.convolution_backward(
        grad, input, weight, [channels], plan.stride, plan.padding, [1, 1], False, [0, 0], channels, wanted
    )


def _gradients(
    grad: Tensor, input: Tensor, weight: Tensor, plan: _Plan, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Those of input, weight and bias, of which None is made where it is not wanted."""
    stride, padding, channels_last, (_, input_is_ours, weight_is_ours) = plan
    for_input, for_weight, for_bias = wanted
    theirs = [
        for_input and not input_is_ours,
        for_weight and not weight_is_ours,
        for_bias and not (for_weight and weight_is_ours),
    ]
    found: list[Tensor | None] = [None, None, None]
    if any(theirs):
        found = list(_aten_gradients(grad, input, weight, plan, theirs))
    if for_input and input_is_ours:
        found[0] = depthwise_conv_input_grad(grad, weight, input.shape, stride, padding, channels_last)
    if for_weight and weight_is_ours:
        found[1:] = depthwise_conv_weight_grad(
            grad, input, weight.shape, stride, padding, channels_last, for_bias
        )
    return tuple(found)


@public
def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with a group for each channel of ``input``.

    Calls that the kernels cannot take (see :func:`why_not`), and phases in which they would be slower (see
    :func:`should_run`), fall back to PyTorch's operator.

    Args:
        input: ``(N, C, H, W)``.
        weight: ``(C, 1, K, K)``, of the input's dtype unless autocast is on.
        bias: ``(C,)`` or None.
        stride: for height and width, or both.
        padding: zeros on each side, for height and width, or both.

    Returns:
        ``(N, C, H_out, W_out)``, in the memory format of PyTorch's result.

    Example:
        >>> depthwise_conv2d(torch.ones(1, 8, 4, 4), torch.ones(8, 1, 3, 3), padding=1)[0, 0, 0]
        tensor([4., 6., 6., 4.])
    """
    x, w, b = _as_autocast(input, weight, bias)
    if transformed() or why_not(x, w, b, stride, padding) is not None:
        return _aten(input, weight, bias, stride, padding)
    assert not isinstance(padding, str)
    ours = tuple(should_run(phase, x, w, stride, padding) for phase in PHASES)
    plan = _Plan(_pair(stride), _pair(padding), in_channels_last(x, w), ours)
    if not needs_grad(x, w, b):
        return _forward(x, w, b, plan)
    if not any(ours):
        return _aten(x, w, b, stride, padding)
    return _DepthwiseConv.apply(x, w, b, plan)


def _as_autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in the dtype that autocast gives a convolution, where it is on."""
    if input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return input, weight, bias
    dtype = torch.get_autocast_dtype("cpu")

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    return cast(input), cast(weight), None if bias is None else cast(bias)
