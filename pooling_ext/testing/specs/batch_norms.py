"""Batch norm with a residual and an activation, the ResNet stem and its tail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

import pooling_ext.functional as F

from ...ops.activations import RELU, Activation, activation_of
from ...windows import fixed_windows
from .. import reference
from ..opspec import ONE_ROUNDING, LowLevelCall, OpSpec, Tensors, levels

#: Relative to the tolerance of one rounding: sums over a batch, and the terms of its gradient.
SUMS = 16.0


def norm_arguments(residual: bool) -> Callable[[Sequence[int], torch.dtype], Tensors]:
    """Of a batch norm; parameters of 16-bit activations are float32."""

    def tensors(shape: Sequence[int], dtype: torch.dtype) -> Tensors:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        ramp = torch.linspace(-1, 1, shape[1], dtype=wide)
        made = {
            "input": levels(shape, dtype),
            "weight": torch.where(ramp < 0, ramp - 0.5, ramp + 0.5),
            "bias": ramp / 4 + 0.1,
            "running_mean": ramp / 2,
            "running_var": ramp**2 + 1,
        }
        return made | ({"residual": levels(shape, dtype).flip(0) / 2} if residual else {})

    return tensors


def tail_arguments(shape: Sequence[int], dtype: torch.dtype) -> Tensors:
    # Sums of the two are never 0, where ReLU has no derivative.
    return {"input": levels(shape, dtype), "residual": levels(shape, dtype) + 1 / 64}


def batch_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    activation: str = "relu",
) -> Tensor:
    """PyTorch's operators in turn; the formula where there are no buffers to update."""
    act = activation_of(activation, 0.01)
    if running_mean is None or not training:
        return reference.batch_norm_act(
            input, running_mean, running_var, weight, bias, training, 1e-5, residual, act
        )
    output = TF.batch_norm(input, running_mean, running_var, weight, bias, training)
    return act(output if residual is None else output + residual)


def stem(input: Tensor, **arguments: Any) -> Tensor:
    """Batch norm, ReLU and the max pool of ResNet."""
    return TF.max_pool2d(batch_norm_act(input, **arguments), 3, 2, 1)


def ours(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of batch norm whose running statistics may be left out."""

    def call(input: Tensor, running_mean: Any = None, running_var: Any = None, **arguments: Any) -> Tensor:
        return function(input, running_mean, running_var, **arguments)

    return call


def _norm(label: str, options: dict[str, Any], shape: tuple[int, ...], residual: bool) -> OpSpec:
    every = {f"{label}-{how}": options | {"training": how == "training"} for how in ("training", "eval")}
    small = (3, 2, *(4, 3, 2)[: len(shape) - 2])
    arguments = norm_arguments(residual)
    function, calls = ours(F.batch_norm_act), _norm_calls if label == "relu" else tuple
    return OpSpec(
        "batch_norm_act",
        function,
        batch_norm_act,
        arguments,
        shape,
        small,
        every,
        gradient_scale=SUMS,
        # With a residual, its gradient is what the input's is made of.
        off=ONE_ROUNDING if residual and "activation" in options else {},
        low_level=calls,
    )


def _norm_calls() -> Iterator[LowLevelCall]:
    ops, x = torch.ops.pooling_ext, torch.rand(2, 3, 7, 8)
    stats, weight, bias = ops.batch_norm_stats(x), torch.rand(3), torch.rand(3)
    affine = (x, stats, weight, bias)
    yield "batch_norm_stats", ops.batch_norm_stats, (x,)
    for residual, activation in product((None, torch.rand_like(x)), (RELU, Activation("leaky_relu", 0.2))):
        label = f"{activation.name}-{'plain' if residual is None else 'residual'}"
        act = 1e-5, *activation.arguments
        output = ops.batch_norm_act_elemt(*affine, residual, *act)
        kept = None if residual is None else output if activation == RELU else residual
        _, sums = ops.batch_norm_act_backward_reduce(x, *affine, kept, *act)
        yield f"batch_norm_act_elemt-{label}", ops.batch_norm_act_elemt, (*affine, residual, *act)
        yield (
            f"batch_norm_act_backward_reduce-{label}",
            ops.batch_norm_act_backward_reduce,
            (x, *affine, kept, *act),
        )
        passed = None if residual is None else sums
        back = (x, *affine, passed, 112.0, *act)
        yield f"batch_norm_act_backward_elemt-{label}", ops.batch_norm_act_backward_elemt, back
        forward = (x, weight, bias, residual, *act)
        yield f"batch_norm_act_training-{label}", ops.batch_norm_act_training, forward
        back = (x, x, stats, weight, None, kept, *act)
        yield f"batch_norm_act_training_backward-{label}", ops.batch_norm_act_training_backward, back
    running = torch.zeros(3), torch.ones(3, dtype=torch.bfloat16)
    yield "batch_norm_update_running", ops.batch_norm_update_running, (*running, stats, 112.0, 0.1)
    evaluation = (x, *running, weight, None, torch.rand_like(x), 1e-5, *RELU.arguments)
    yield "batch_norm_act_running", ops.batch_norm_act_running, evaluation
    yield "batch_norm_act_running_", ops.batch_norm_act_running_, evaluation
    folding = (torch.rand(3, 2, 3, 3), None, *running, weight, None, 1e-5, torch.bfloat16)
    yield "fold_batch_norm", ops.fold_batch_norm, folding


def _stem_calls() -> Iterator[LowLevelCall]:
    ops, x = torch.ops.pooling_ext, torch.rand(2, 3, 7, 8)
    affine = (x, ops.batch_norm_stats(x), torch.rand(3), torch.rand(3))
    windows = fixed_windows(2, x.shape, 3, 2, 1, 1, False)
    pooled, offsets = ops.batch_norm_relu_max_pool_with_offsets(*affine, 1e-5, *windows)
    back = (pooled, offsets, *affine)
    sums = ops.batch_norm_relu_max_pool_backward_reduce(*back, 1e-5, *windows)
    yield "stem", ops.batch_norm_relu_max_pool, (*affine, 1e-5, *windows)
    yield "stem-offsets", ops.batch_norm_relu_max_pool_with_offsets, (*affine, 1e-5, *windows)
    yield "stem-sums", ops.batch_norm_relu_max_pool_backward_reduce, (*back, 1e-5, *windows)
    yield "stem-backward", ops.batch_norm_relu_max_pool_backward_elemt, (*back, sums, 112.0, 1e-5, *windows)


def _tail_calls() -> Iterator[LowLevelCall]:
    ops, x = torch.ops.pooling_ext, torch.rand(2, 3, 7, 8)
    yield "tail", ops.add_relu_global_avg_pool, (x, torch.rand_like(x))
    back = (torch.rand(2, 3, 1, 1), x, torch.rand_like(x))
    yield "tail-backward", ops.add_relu_global_avg_pool_backward, back


SPECS: tuple[OpSpec, ...] = (
    _norm("relu", {}, (2, 37, 5, 38), False),
    _norm("relu-residual", {}, (2, 37, 5, 38), True),
    _norm("silu", {"activation": "silu"}, (2, 37, 5, 38), False),
    _norm("silu-residual", {"activation": "silu"}, (2, 37, 5, 38), True),
    _norm("identity-residual", {"activation": "identity"}, (2, 37, 5, 38), True),
    _norm("relu-1d", {}, (2, 37, 75), False),
    _norm("relu-3d-residual", {}, (2, 37, 3, 4, 21), True),
    OpSpec(
        "batch_norm_relu_max_pool",
        ours(F.batch_norm_relu_max_pool),
        stem,
        norm_arguments(False),
        (2, 37, 7, 38),
        (3, 2, 4, 3),
        {"training": {"training": True}, "eval": {"training": False}},
        gradient_scale=SUMS,
        low_level=_stem_calls,
    ),
    OpSpec(
        "add_relu_global_avg_pool",
        F.add_relu_global_avg_pool,
        lambda input, residual: TF.relu(input + residual).mean((2, 3), keepdim=True),
        tail_arguments,
        (2, 37, 5, 38),
        (3, 2, 4, 3),
        low_level=_tail_calls,
    ),
)
