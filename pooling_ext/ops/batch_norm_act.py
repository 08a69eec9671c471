"""Batch normalization, an optional residual and an activation as one operator.

Ioffe and Szegedy, "Batch Normalization" (2015).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import backends
from ..autograd import distinct, loses_grad, needs_grad, transformed
from ._torch_function import public
from .activations import Activation, activation_of
from .batch_norm_arguments import alike, check
from .batch_norm_autograd import BatchNormAct, BatchNormActTraining
from .batch_norm_operators import batch_norm_act_elemt, normalize_batch
from .batch_norm_running import normalize
from .batch_norm_statistics import batch_count, statistics, update_running


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
        return BatchNormAct.apply(input, weight, bias, residual, stats, eps, act, count, group)
    return batch_norm_act_elemt(input, stats, weight, bias, residual, eps, *act.arguments)


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
        return BatchNormActTraining.apply(input, weight, bias, residual, eps, activation, stats, *running)
    output, stats = normalize_batch(input, weight, bias, residual, eps, activation, stats)
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
