"""Convolutions of the CPU by other ways than PyTorch's, with gradients: those that conv_choice names.

Each phase, forward and both gradients, is made by the kernels or by PyTorch's convolution, as a plan says.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from ..autograd import needs_grad
from . import depthwise_conv as depthwise
from . import image_conv as image
from . import pointwise_conv as pointwise
from . import winograd
from ._library import memory_format, suggests_channels_last
from .conv_choice import DEPTHWISE, IMAGE, PHASES, POINTWISE, WINOGRAD, Conv, phase_why_not


class Plan(NamedTuple):
    """What a convolution is told besides its tensors.

    Attributes:
        kernels: of conv_choice.WHY_NOT.
        stride, padding, dilation: for each spatial axis.
        groups: how many.
        channels_last: whether the output is.
        ours: which of conv_choice.PHASES the kernels do.
    """

    kernels: str
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channels_last: bool
    ours: tuple[bool, bool, bool]

    @property
    def sides(self) -> list[int]:
        return [*self.padding, *self.padding]


def plan(kernels: str, conv: Conv) -> Plan:
    """The plan in which our kernels do the phases that they should."""
    forward, input_grad, weight_grad = (phase_why_not(kernels, conv, phase) is None for phase in PHASES)
    assert conv.is_symmetric
    padding, ours = conv.padding[: conv.rank], (forward, input_grad, weight_grad)
    return Plan(kernels, conv.stride, padding, conv.dilation, conv.groups, conv.channels_last, ours)


def in_format(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` in the format that the output is to have, where the operators follow their input's."""
    if channels_last and not suggests_channels_last(x):
        return x.contiguous(memory_format=memory_format(x.dim() - 2, True))
    return x


def convolve(input: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
    """``conv(input, weight) + bias``, differentiable any number of times.

    Args:
        input: ``(N, C, [D,] H, W)``, of the weight's dtype.
        weight: ``(O, C / groups, [KD,] KH, KW)``.
        bias: ``(O,)``.
    """
    return convolve_with_stats(input, weight, bias, plan, False)[0]


def convolve_with_stats(
    input: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, stats: bool = True
) -> tuple[Tensor, Tensor | None]:
    """:func:`convolve`, and the output's statistics as ``batch_norm_stats`` has them, if they come with it.

    The statistics pass no gradients on.
    """
    if needs_grad(input, weight, bias):
        return _Convolution.apply(input, weight, bias, plan, stats)  # type: ignore[return-value]
    return _forward(input, weight, bias, plan, stats)


#: Operators of the same arguments, without and with statistics.
_DIRECT = {
    DEPTHWISE: (depthwise.depthwise_conv, depthwise.depthwise_conv_stats),
    IMAGE: (image.image_conv, image.image_conv_stats),
}


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, stats: bool
    ) -> tuple[Tensor, Tensor | None]:
        output, found = _forward(input, weight, bias, plan, stats)
        ctx.save_for_backward(input, weight)
        ctx.plan = plan
        if found is not None:
            ctx.mark_non_differentiable(found)
        # Of what is a view of a product here autograd lets nobody write in place, as an activation may.
        return output.detach() if plan.kernels == POINTWISE else output, found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, weight = ctx.saved_tensors
        grad, wanted = grads[0], tuple(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled() and not is_compiling():
            # Out of operators that PyTorch can differentiate again.
            found = _aten_gradients(grad, input, weight, ctx.plan, wanted)
        else:
            found = _gradients(grad, input, weight, ctx.plan, wanted)
        return *(x if want else None for x, want in zip(found, wanted, strict=True)), None, None


def _forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, stats: bool
) -> tuple[Tensor, Tensor | None]:
    stride, padding = plan.stride, plan.padding
    if not plan.ours[0]:
        rest = plan.dilation, False, [0] * len(stride), plan.groups
        return torch.convolution(input, weight, bias, stride, padding, *rest), None
    if plan.kernels == POINTWISE:
        return pointwise.pointwise_conv(input, weight, bias, plan.channels_last), None
    if plan.kernels in _DIRECT:
        alone, with_stats = _DIRECT[plan.kernels]
        if stats:
            return with_stats(input, weight, bias, stride, padding)
        return alone(input, weight, bias, stride, padding, 0, 0.0), None
    x = in_format(input, plan.channels_last)
    common, steps = (plan.sides, weight.shape[0], plan.groups), (stride, plan.dilation)
    if stats:
        return winograd.winograd_conv_stats(x, weight, bias, *common, *steps)
    return winograd.winograd_conv(x, weight, bias, None, *common, 0, 0.0, *steps), None


def _aten_gradients(
    grad: Tensor, input: Tensor, weight: Tensor, plan: Plan, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    none = [0] * len(plan.stride)
    geometry = plan.stride, plan.padding, plan.dilation, False, none, plan.groups
    return torch.ops.aten.convolution_backward(grad, input, weight, [weight.shape[0]], *geometry, wanted)


def _gradients(
    grad: Tensor, input: Tensor, weight: Tensor, plan: Plan, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Those of input, weight and bias, of which None is made where it is not wanted."""
    for_input, for_weight, for_bias = wanted
    _, input_is_ours, weight_is_ours = plan.ours
    own_input, own_weight = for_input and input_is_ours, for_weight and weight_is_ours
    makes_bias = own_weight and plan.kernels == DEPTHWISE
    theirs = for_input and not own_input, for_weight and not own_weight, for_bias and not makes_bias
    found: list[Tensor | None] = [None, None, None]
    if theirs == (False, False, True):
        found[2] = grad.sum((0, *range(2, grad.dim())))
    elif any(theirs):
        found = list(_aten_gradients(grad, input, weight, plan, theirs))
    if plan.kernels == WINOGRAD:
        common = plan.sides, plan.groups, plan.stride, plan.dilation
        if own_input:
            found[0] = winograd.winograd_input_grad(grad, weight, *common, input.shape)
        if own_weight:
            found[1] = winograd.winograd_weight_grad(input, grad, *common, weight.shape)
        return tuple(found)
    stride, padding, last = plan.stride, plan.padding, plan.channels_last
    if plan.kernels == POINTWISE:
        if own_input:
            found[0] = pointwise.pointwise_conv_input_grad(grad, weight, last)
        if own_weight:
            found[1] = pointwise.pointwise_conv_weight_grad(grad, input, weight.shape, last)
        return tuple(found)
    if plan.kernels == IMAGE:
        if own_weight:
            found[1] = image.image_conv_weight_grad(grad, input, weight.shape, stride, padding)
        return tuple(found)
    if own_input:
        found[0] = depthwise.depthwise_conv_input_grad(grad, weight, input.shape, stride, padding, last)
    if own_weight:
        found[1:] = depthwise.depthwise_conv_weight_grad(
            grad, input, weight.shape, stride, padding, last, for_bias
        )
    return tuple(found)
