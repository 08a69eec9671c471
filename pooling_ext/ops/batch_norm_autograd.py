"""The gradients of batch normalization with a residual and an activation, once and again."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from .. import backends
from ..autograd import with_zero_gradient
from .activations import IDENTITY, RELU, Activation
from .batch_norm_operators import (
    batch_norm_act_backward_elemt,
    batch_norm_act_backward_reduce,
    batch_norm_act_elemt,
    batch_norm_act_training_backward,
    batch_norm_relu_mask,
    like,
    normalize_batch,
)
from .batch_norm_statistics import batch_stats, means_of_all, update_running


def _kept(activation: Activation, residual: Tensor | None, output: Tensor) -> Tensor | None:
    """What backward needs beside the input, of which it makes what the activation was given."""
    if residual is None or activation == IDENTITY:
        return None
    return output if activation == RELU else residual


def _makes_mask(input: Tensor, residual: Tensor | None, activation: Activation) -> bool:
    """Whether there are kernels that keep a mask of ReLU's output with a residual in its place."""
    if residual is None or activation != RELU:
        return False
    return backends.REGISTRY.offers(backends.CUDA, "batch_norm_relu_mask", input)


def _unpacked(mask: Tensor, input: Tensor) -> Tensor:
    """One where a mask lets the gradient through, zero elsewhere, in the input's layout."""
    each, together = 16 // input.element_size(), 8
    bits = (mask[:, None] >> torch.arange(each, device=mask.device)) & 1
    result = like(input)
    vectors, others = divmod(input.shape[1], each)
    if vectors and not others and result.stride(1) == 1:  # so many vectors of all pixels, then the next ones
        pixels, whole = mask.numel() // vectors, vectors // together
        first, rest = bits.split((pixels * whole * together, pixels * (vectors - whole * together)))
        first = first.view(whole, pixels, together * each).transpose(0, 1).flatten(1)
        bits = torch.cat((first, rest.view(pixels, (vectors - whole * together) * each)), 1)
    flat = result.as_strided((result.numel(),), (1,))
    flat.copy_(bits.flatten()[: result.numel()])
    return result


class BatchNormAct(Function):
    """With statistics that are given: running ones, or those of the batches of several processes."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        stats: Tensor,
        eps: float,
        activation: Activation,
        count: float | None,
        group: Any,
    ) -> Tensor:
        output = batch_norm_act_elemt(input, stats, weight, bias, residual, eps, *activation.arguments)
        ctx.save_for_backward(input, weight, bias, stats, _kept(activation, residual, output))
        ctx.options = eps, activation, count, group
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, weight, bias, stats, kept = ctx.saved_tensors
        eps, activation, count, group = ctx.options
        (grad,) = grads
        needs_input, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled() and not is_compiling():
            *wanted, inner = differentiable_backward(grad, input, weight, bias, stats, kept, ctx.options)
            return *wanted, inner if needs_residual else None, None, None, None, None, None
        inner = grad  # that of what the activation was given, if it is known
        sums: Any = None
        if kept is not None or count is not None or needs_weight or needs_bias:
            found, sums = batch_norm_act_backward_reduce(
                grad, input, stats, weight, bias, kept, eps, *activation.arguments
            )
            if kept is not None:
                inner, activation = found, IDENTITY
        grad_input = None
        grad_weight = weight_grad(sums, stats, eps, weight) if needs_weight else None
        grad_bias = bias_grad(sums, bias) if needs_bias else None
        if needs_input:
            stats_grad, share = means_of_all(sums, count, group)
            rest = share, eps, *activation.arguments
            grad_input = batch_norm_act_backward_elemt(inner, input, stats, weight, bias, stats_grad, *rest)
        grad_residual = inner if needs_residual else None
        return grad_input, grad_weight, grad_bias, grad_residual, None, None, None, None, None


class BatchNormActTraining(Function):
    """With the statistics of the batch: one operator forward and one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        eps: float,
        activation: Activation,
        known: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
    ) -> Tensor:
        if residual is not None and _makes_mask(input, residual, activation):
            stats = batch_stats(input) if known is None else known
            output, kept = batch_norm_relu_mask(input, stats, weight, bias, residual, eps)
        else:
            output, stats = normalize_batch(input, weight, bias, residual, eps, activation, known)
            kept = _kept(activation, residual, output)
        # Before anything is saved: torch.utils.checkpoint, which runs this twice, may end there.
        update_running(input, stats, running_mean, running_var, momentum)
        ctx.save_for_backward(input, weight, bias, stats, kept)
        ctx.options = eps, activation
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, weight, bias, stats, kept = ctx.saved_tensors
        eps, activation = ctx.options
        (grad,) = grads
        if torch.is_grad_enabled() and not is_compiling():
            options = eps, activation, 1.0, None
            found = differentiable_backward(grad, input, weight, bias, stats, kept, options)
            grad_input, grad_weight, grad_bias, inner = found
        else:
            found = batch_norm_act_training_backward(
                grad, input, stats, weight, bias, kept, eps, *activation.arguments
            )
            grad_input, inner, grad_weight, grad_bias = found
            if kept is None:
                inner = grad  # without an activation, or nobody asks for it
        needs_input, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        return (
            grad_input if needs_input else None,
            grad_weight if needs_weight else None,
            grad_bias if needs_bias else None,
            inner if needs_residual else None,
            *(None,) * 6,
        )


def weight_grad(sums: Tensor, stats: Tensor, eps: float, weight: Tensor) -> Tensor:
    return (sums[1] * (stats[1] + eps).rsqrt()).to(weight.dtype)


def bias_grad(sums: Tensor, bias: Tensor) -> Tensor:
    return sums[0].to(bias.dtype, copy=True)  # not a view of what may be needed whole


def differentiable_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    kept: Tensor | None,
    options: tuple[float, Activation, float | None, Any],
) -> tuple[Tensor | None, ...]:
    """The gradients out of operators that PyTorch can differentiate again."""
    eps, activation, count, group = options
    if group is not None:
        raise RuntimeError("batch_norm_act(): there is no double backward across processes")
    wide = parameter_dtype(input)
    mean, var = stats.to(wide).unbind()
    wide_weight = None if weight is None else weight.to(wide)
    if activation == RELU:
        if kept is None:
            kept = batch_norm_act_elemt(input.detach(), stats, weight, bias, None, eps, *RELU.arguments)
            grad = with_zero_gradient(grad, bias)
        elif kept.dtype == torch.uint8:
            kept = _unpacked(kept, input)
        # That of what decides here is zeros, as PyTorch has it, and not none.
        grad = torch.ops.aten.threshold_backward(grad, kept, 0)
    elif activation != IDENTITY:
        grad = _activation_backward(grad, input, wide_weight, bias, (mean, var), kept, eps, activation, count)
    masks = [True, weight is not None, bias is not None]
    grad_input, *gradients = torch.ops.aten.native_batch_norm_backward(
        grad, input, wide_weight, mean, var, mean, (var + eps).rsqrt(), count is not None, eps, masks
    )
    for_weight, for_bias = (
        None if x is None else gradient.to(x.dtype)
        for x, gradient in zip((weight, bias), gradients, strict=True)
    )
    return grad_input, for_weight, for_bias, grad


def _activation_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: tuple[Tensor, Tensor],
    residual: Tensor | None,
    eps: float,
    activation: Activation,
    count: float | None,
) -> Tensor:
    """The gradient of what a curved activation was given, as a function of all that it depends on."""
    wide_bias = None if bias is None else bias.to(moments[0].dtype)
    # With the batch's statistics the input's own part in them counts, too.
    z = F.batch_norm(
        input,
        *((None, None) if count is not None else moments),
        weight,
        wide_bias,
        count is not None,
        0.0,
        eps,
    )
    z = z.to(input.dtype)
    if residual is not None:
        z = z + residual
    (inner,) = torch.autograd.grad(activation(z), z, grad, create_graph=True)
    return inner


def parameter_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32
