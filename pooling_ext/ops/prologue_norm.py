"""A batch norm and ReLU left to the convolution that follows them, in training on a GPU.

Where a convolution makes the statistics of its output as it writes, what comes after batch norm and ReLU need
not be written at all: the next convolution normalizes what it reads. Backward its input's gradient is masked
and summed up for the batch norm as it is written; the weights' gradient normalizes what it reads too.
So the batch norm costs one pass over memory less each way, at the price of our convolutions in place of
cuDNN's: whether that pays is measured, forward and backward together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..autograd import needs_grad
from .activations import IDENTITY, RELU, Activation
from .batch_norm_act import in_training
from .batch_norm_autograd import bias_grad, differentiable_backward, weight_grad
from .batch_norm_operators import (
    batch_norm_act_backward_elemt,
    batch_norm_act_elemt,
    batch_norm_act_training_backward,
)
from .conv_autotune import (
    Candidate,
    ConvParams,
    choose,
    conv_backward,
    conv_input_grad,
    conv_stats,
    conv_weight_grad,
)
from .conv_choice import stands_for_conv2d


class PrologueNorm(NamedTuple):
    """``relu(batch_norm(output))``, or without ReLU, that is yet to be computed.

    Attributes:
        output: a convolution's, ``(N, C, H, W)``.
        stats: its statistics, as batch_norm_stats has them.
        weight, bias, eps: the batch norm's; its running statistics are updated already.
        relu: whether ReLU follows.
    """

    output: Tensor
    stats: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    relu: bool

    @property
    def activation(self) -> Activation:
        return RELU if self.relu else IDENTITY

    def computed(self) -> Tensor:
        running = None, None
        return in_training(
            self.output, *running, self.weight, self.bias, 0.0, self.eps, None, self.activation, self.stats
        )

    def normalized(self) -> Tensor:
        """:meth:`computed` without gradients."""
        rest = None, self.eps, *self.activation.arguments
        return batch_norm_act_elemt(self.output, self.stats, self.weight, self.bias, *rest)

    def convolved(self, weight: Tensor, bias: Tensor | None, geometry: ConvParams) -> tuple[Tensor, Tensor]:
        """The convolution of :meth:`computed`, whose dtype ``weight`` has, and its statistics."""
        if needs_grad(self.output, self.weight, self.bias, weight, bias):
            return _NormConvStats.apply(*self, weight, bias, geometry)
        return conv_stats(self.output, weight, bias, geometry, *self[1:])

    def should_fuse_into(self, conv: Any) -> bool:
        """Whether ``conv``, which comes next, is faster with this than with :meth:`computed`."""
        if not stands_for_conv2d(conv) or isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            return False
        if conv.groups != 1 or conv.in_channels != self.output.shape[1]:
            return False
        geometry = ConvParams(conv.stride, conv.padding, conv.dilation, conv.groups)
        chosen = choose("batch_norm_act and conv_stats", _candidates, *self, conv.weight, conv.bias, geometry)
        return chosen is _deferred


class _NormConvStats(Function):
    """:meth:`PrologueNorm.convolved`; the statistics pass no gradients on."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        stats: Tensor,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        eps: float,
        relu: bool,
        weight: Tensor,
        bias: Tensor | None,
        geometry: ConvParams,
    ) -> tuple[Tensor, Tensor]:
        norm = stats, bn_weight, bn_bias, eps, relu
        output, output_stats = conv_stats(input, weight, bias, geometry, *norm)
        ctx.save_for_backward(input, stats, bn_weight, bn_bias, weight)
        ctx.options = eps, relu, geometry
        ctx.mark_non_differentiable(output_stats)
        return output, output_stats

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, stats, bn_weight, bn_bias, weight = ctx.saved_tensors
        eps, relu, geometry = ctx.options
        needs_input, _, *needs_norm, _, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        function = _differentiable if torch.is_grad_enabled() else _backward
        of_norm, of_conv = function(
            grads[0],
            PrologueNorm(input, stats, bn_weight, bn_bias, eps, relu),
            weight,
            geometry,
            (needs_input, *needs_norm),
            (needs_weight, needs_bias),
        )
        grad_input, *of_affine = of_norm
        return grad_input, None, *of_affine, None, None, *of_conv, None


Gradients = tuple[Tensor | None, ...]


def _backward(
    grad: Tensor,
    norm: PrologueNorm,
    weight: Tensor,
    geometry: ConvParams,
    of_norm: tuple[bool, ...],
    of_conv: tuple[bool, ...],
) -> tuple[Gradients, Gradients]:
    """Gradients of the batch norm's input, weight and bias, and of the convolution's weight and bias.

    Args:
        of_norm, of_conv: which are wanted.
    """
    input, stats, bn_weight, bn_bias, eps, _ = norm
    grad_input = grad_bn_weight = grad_bn_bias = grad_weight = grad_bias = None
    if any(of_norm):
        masked, sums = conv_input_grad(grad, weight, input, geometry, *norm[1:])
        if of_norm[0]:
            count = float(input.numel() // input.shape[1])
            rest = sums, count, eps, *IDENTITY.arguments
            grad_input = batch_norm_act_backward_elemt(masked, input, stats, bn_weight, bn_bias, *rest)
        if of_norm[1]:
            assert bn_weight is not None
            grad_bn_weight = weight_grad(sums, stats, eps, bn_weight)
        if of_norm[2]:
            assert bn_bias is not None
            grad_bn_bias = bias_grad(sums, bn_bias)
    if of_conv[0]:
        grad_weight = conv_weight_grad(grad, input, weight, geometry, *norm[1:])
    if of_conv[1]:
        *_, grad_bias = conv_backward(grad, input, weight, geometry, (False, False, True))
    return (grad_input, grad_bn_weight, grad_bn_bias), (grad_weight, grad_bias)


def _differentiable(
    grad: Tensor,
    norm: PrologueNorm,
    weight: Tensor,
    geometry: ConvParams,
    of_norm: tuple[bool, ...],
    of_conv: tuple[bool, ...],
) -> tuple[Gradients, Gradients]:
    """As :func:`_backward`, out of operators that PyTorch can differentiate again."""
    wanted = (any(of_norm), *of_conv)
    grad_normal, *for_conv = conv_backward(grad, norm.computed(), weight, geometry, wanted)
    if grad_normal is None:
        return (None, None, None), tuple(for_conv)
    options = norm.eps, norm.activation, 1.0, None
    *for_norm, _ = differentiable_backward(
        grad_normal, norm.output, norm.weight, norm.bias, norm.stats, None, options
    )
    return tuple(for_norm), tuple(for_conv)


# --- which is faster: the parts of a step of training that differ, with an output for its gradient --------


def _candidates(*_: Any) -> dict[str, Candidate]:
    return {"apart": _apart, "deferred": _deferred}


@torch.no_grad()
def _apart(*args: Any) -> None:
    norm, weight, bias, geometry = _arguments(*args)
    input, stats, bn_weight, bn_bias, eps, _ = norm
    normalized = norm.normalized()
    output, _ = conv_stats(normalized, weight, bias, geometry)
    grad, *_ = conv_backward(output, normalized, weight, geometry, (True, True, bias is not None))
    rest = None, eps, *norm.activation.arguments
    batch_norm_act_training_backward(grad, input, stats, bn_weight, bn_bias, *rest)


@torch.no_grad()
def _deferred(*args: Any) -> None:
    norm, weight, bias, geometry = _arguments(*args)
    output, _ = norm.convolved(weight, bias, geometry)
    affine = norm.weight is not None, norm.bias is not None
    _backward(output, norm, weight, geometry, (True, *affine), (True, bias is not None))


def _arguments(*args: Any) -> tuple[PrologueNorm, Tensor, Tensor | None, ConvParams]:
    *norm, weight, bias, geometry = args
    dtype = norm[0].dtype
    return PrologueNorm(*norm), weight.to(dtype), None if bias is None else bias.to(dtype), geometry
