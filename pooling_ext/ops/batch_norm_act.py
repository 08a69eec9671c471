"""Batch normalization, an optional residual and an activation as one operator.

Ioffe and Szegedy, "Batch Normalization" (2015). The statistics are one ``(2, C)`` float64 tensor: means and
biased variances.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from .. import backends
from ..autograd import distinct, loses_grad, needs_grad, transformed, with_zero_gradient
from . import _library
from ._torch_function import public
from .activations import IDENTITY, RELU, Activation, activation_of
from .batch_norm_arguments import alike, check
from .batch_norm_running import normalize
from .batch_norm_statistics import (
    batch_count,
    batch_stats,
    channel_sums,
    means_of_all,
    statistics,
    update_running,
)

FLOATS = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
#: The last arguments of the operators, :attr:`Activation.arguments`.
_ACTIVATION = "int activation, float negative_slope"
backends.register(
    "batch_norm_act",
    cpu=FLOATS,
    cuda=FLOATS,
    triton=FLOATS,
    kernels=(
        "batch_norm_stats",
        "batch_norm_act_elemt",
        "batch_norm_act_backward_reduce",
        "batch_norm_act_backward_elemt",
        "batch_norm_act_training",
        "batch_norm_act_training_backward",
        "batch_norm_update_running",
    ),
    triton_module="pooling_ext.triton.norm.batch_norm_act",
)
# CUDA's alone: ReLU's mask in place of its output.
backends.register("batch_norm_relu_mask", cuda=FLOATS - {torch.float64})


def like(input: Tensor) -> Tensor:
    return _library.empty(input, input.shape[2:])


def vector_like(input: Tensor, vector: Tensor | None) -> Tensor:
    if vector is None:
        return input.new_empty(0, dtype=torch.float64)
    return input.new_empty(vector.shape, dtype=vector.dtype)


_forward = _library.define(
    "batch_norm_act_elemt(Tensor input, Tensor stats, Tensor? weight, Tensor? bias, Tensor? residual, "
    f"float eps, {_ACTIVATION})",
    "Tensor",
    lambda input, *_: like(input),
    vmap=False,
)

# The gradient of what the activation was given (of no size unless something is kept), and its sums over
# each channel: of itself, and of its products with `input - mean`. `kept` is given where a residual went
# into the output: for ReLU the output or its mask, for the other activations the residual.
batch_norm_act_backward_reduce = _library.define(
    "batch_norm_act_backward_reduce(Tensor grad, Tensor input, Tensor stats, Tensor? weight, Tensor? bias, "
    f"Tensor? kept, float eps, {_ACTIVATION})",
    "(Tensor, Tensor)",
    lambda grad, input, stats, weight, bias, kept, *_: (
        like(input) if kept is not None else input.new_empty(0),
        channel_sums(input),
    ),
    vmap=False,
)

# Without `sums` the statistics are constants.
_input_grad = _library.define(
    "batch_norm_act_backward_elemt(Tensor grad, Tensor input, Tensor stats, Tensor? weight, Tensor? bias, "
    f"Tensor? sums, float count, float eps, {_ACTIVATION})",
    "Tensor",
    lambda grad, input, *_: like(input),
    vmap=False,
)

# The output and the input's own statistics: batch_norm_stats and batch_norm_act_elemt.
_training = _library.define(
    "batch_norm_act_training(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
    f"{_ACTIVATION})",
    "(Tensor, Tensor)",
    lambda input, *_: (like(input), channel_sums(input)),
    vmap=False,
)

# ReLU's output with a residual, and its mask: a bit for each element, and a byte for each 16 bytes of them,
# in the order that MaskOrder says (csrc/kernels/cuda/norm/batch_norm.cuh).
_masked = _library.define(
    "batch_norm_relu_mask(Tensor input, Tensor stats, Tensor? weight, Tensor? bias, Tensor residual, "
    "float eps)",
    "(Tensor, Tensor)",
    lambda input, *_: (
        like(input),
        input.new_empty(-(-input.numel() // (16 // input.element_size())), dtype=torch.uint8),
    ),
    vmap=False,
)

# The gradients of input, residual, weight and bias: batch_norm_act_backward_reduce and
# batch_norm_act_backward_elemt. Gradients of what there is not have no size.
_training_backward = _library.define(
    "batch_norm_act_training_backward(Tensor grad, Tensor input, Tensor stats, Tensor? weight, Tensor? bias, "
    f"Tensor? kept, float eps, {_ACTIVATION})",
    "(Tensor, Tensor, Tensor, Tensor)",
    lambda grad, input, stats, weight, bias, kept, *_: (
        like(input),
        like(input) if kept is not None else input.new_empty(0),
        vector_like(input, weight),
        vector_like(input, bias),
    ),
    vmap=False,
)


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


class _BatchNormAct(Function):
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
        output = _forward(input, stats, weight, bias, residual, eps, *activation.arguments)
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
            *wanted, inner = _differentiable_backward(grad, input, weight, bias, stats, kept, ctx.options)
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
            grad_input = _input_grad(inner, input, stats, weight, bias, stats_grad, *rest)
        grad_residual = inner if needs_residual else None
        return grad_input, grad_weight, grad_bias, grad_residual, None, None, None, None, None


class _BatchNormActTraining(Function):
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
            output, kept = _masked(input, stats, weight, bias, residual, eps)
        else:
            output, stats = _normalize(input, weight, bias, residual, eps, activation, known)
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
            found = _differentiable_backward(grad, input, weight, bias, stats, kept, options)
            grad_input, grad_weight, grad_bias, inner = found
        else:
            found = _training_backward(grad, input, stats, weight, bias, kept, eps, *activation.arguments)
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


def _normalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Activation,
    stats: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output, and the input's statistics, which may be known already."""
    if stats is None:
        return _training(input, weight, bias, residual, eps, *activation.arguments)
    return _forward(input, stats, weight, bias, residual, eps, *activation.arguments), stats


def weight_grad(sums: Tensor, stats: Tensor, eps: float, weight: Tensor) -> Tensor:
    return (sums[1] * (stats[1] + eps).rsqrt()).to(weight.dtype)


def bias_grad(sums: Tensor, bias: Tensor) -> Tensor:
    return sums[0].to(bias.dtype, copy=True)  # not a view of what may be needed whole


def _differentiable_backward(
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
            kept = _forward(input.detach(), stats, weight, bias, None, eps, *RELU.arguments)
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


@public
def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    activation: str = "relu",
    *,
    negative_slope: float = 0.01,
    process_group: Any = None,
) -> Tensor:
    """``activation(batch_norm(input) + residual)`` in one pass after the statistics.

    As :func:`torch.nn.functional.batch_norm`, :func:`torch.add` and, say, :func:`torch.nn.functional.relu`
    in turn, with statistics and arithmetic in float32 or better, rounded once.

    Args:
        input: a tensor, see Shape; float32, float64, bfloat16 or float16, contiguous or channels_last.
        running_mean: updated in place in training. None where there is none.
        running_var: as ``running_mean``.
        weight: multiplies the normalized input; None for ones.
        bias: added to it; None for zeros.
        training: normalize with the batch's own statistics instead of the running ones.
        momentum: the weight of the batch in the running statistics.
        eps: added to the variance.
        residual: added before the activation; the input's shape and dtype.
        activation: "relu", "identity", "relu6", "silu", "hardswish", "leaky_relu", "gelu", "gelu_tanh" (the
            approximation) or "hardsigmoid".
        negative_slope: the slope of leaky_relu for negative numbers.
        process_group: a torch.distributed group over which the statistics of training are taken, as
            :class:`torch.nn.SyncBatchNorm` does.

    Shape:
        input: ``(N, C, *)`` of any rank from 2.
        running_mean, running_var, weight, bias: ``(C,)``.
        residual: the input's shape.
        output: the input's shape.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        TypeError: an argument has the wrong type.
        ArgumentError: an argument does not go with the input's shape, or is out of range.

    Example:
        >>> x = torch.tensor([[[[-1.0, 3.0]]]])
        >>> F.batch_norm_act(x, None, None, training=True)
        tensor([[[[0.0000, 1.0000]]]])
        >>> F.batch_norm_act(x, None, None, training=True, residual=x, activation="identity")
        tensor([[[[-2.0000,  4.0000]]]])
    """
    parameters = {"weight": weight, "bias": bias}
    act = activation_of(activation, negative_slope)
    momentum, eps = check(input, residual, parameters, running_mean, running_var, training, momentum, eps)
    backend = backends.choose("batch_norm_act", input)
    if (
        backend is backends.ATEN
        or transformed()
        or (residual is not None and not alike(input, residual))
        or loses_grad(input, weight, bias, residual)
    ):
        return _aten_batch_norm_act(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual,
            act,
            process_group,
        )
    if training and process_group is None:
        return in_training(input, running_mean, running_var, weight, bias, momentum, eps, residual, act, None)
    if is_compiling():
        input, weight, bias, residual = distinct(input, weight, bias, residual)
    wanted = needs_grad(input, weight, bias, residual)
    if backend is backends.CPU and not training and not wanted:
        return normalize(input, running_mean, running_var, weight, bias, residual, eps, *act.arguments)
    stats, count = statistics(input, running_mean, running_var, training, momentum, process_group)
    if wanted:
        group = process_group if training else None
        return _BatchNormAct.apply(input, weight, bias, residual, stats, eps, act, count, group)
    return _forward(input, stats, weight, bias, residual, eps, *act.arguments)


def in_training(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: Activation,
    stats: Tensor | None,
) -> Tensor:
    """:func:`batch_norm_act` in training, without checks; ``stats`` are the input's if they are known."""
    batch_count(input)  # one value is an error, which must come first
    if is_compiling():
        input, weight, bias, residual = distinct(input, weight, bias, residual)
    if needs_grad(input, weight, bias, residual):
        running = running_mean, running_var, momentum
        return _BatchNormActTraining.apply(input, weight, bias, residual, eps, activation, stats, *running)
    output, stats = _normalize(input, weight, bias, residual, eps, activation, stats)
    update_running(input, stats, running_mean, running_var, momentum)
    return output


def _aten_batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: Activation,
    group: Any,
) -> Tensor:
    if training and group is not None:
        from torch.nn.modules._functions import SyncBatchNorm

        normalize = SyncBatchNorm.apply
        size = torch.distributed.get_world_size(group)
        output = normalize(input, weight, bias, running_mean, running_var, eps, momentum, group, size)
    else:
        output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        output = output + residual
    return activation(output)
