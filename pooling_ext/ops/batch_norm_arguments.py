"""What the operators of batch norm are given: their checks, and what a module of torch.nn gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import as_bool, as_float
from ..errors import ArgumentError


def check(
    input: Tensor,
    residual: Tensor | None,
    parameters: dict[str, Tensor | None],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: Any,
    eps: Any,
) -> tuple[float, float]:
    """Check the arguments of :func:`batch_norm_act`, and return ``momentum`` and ``eps`` as floats."""
    if type(momentum) is not float:
        momentum = as_float(momentum, "momentum")
    if type(eps) is not float:
        eps = as_float(eps, "eps")
    if training is not True and training is not False:
        as_bool(training, "training")
    if eps < 0 or (training and eps == 0):
        raise ArgumentError(f"eps must be positive, or 0 unless training is true, but got {eps}")
    if input.dim() < 2:
        raise ArgumentError(
            f"input must have a batch and a channel dimension, but got shape {tuple(input.shape)}"
        )
    channels = input.shape[1]
    parameters = {**parameters, "running_mean": running_mean, "running_var": running_var}
    for name, value in parameters.items():
        if value is None:
            continue
        check_tensor(name, value)
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating-point, but got {value.dtype}")
        if value.shape != (channels,):
            raise ArgumentError(
                f"{name} must have shape ({channels},), one value for each of input's channels, but got "
                f"{tuple(value.shape)}"
            )
        check_device(name, value, input)
    if running_mean is None or running_var is None:
        if not training:
            raise ArgumentError("running_mean and running_var must be given unless training is true")
        if running_mean is not running_var:
            missing = "running_mean" if running_mean is None else "running_var"
            raise ArgumentError(f"running_mean and running_var must be given together, but {missing} is None")
    if residual is None:
        return momentum, eps
    check_tensor("residual", residual)
    check_device("residual", residual, input)
    if residual.shape != input.shape:
        raise ArgumentError(
            f"residual must have input's shape {tuple(input.shape)}, but got {tuple(residual.shape)}"
        )
    return momentum, eps


def check_device(name: str, value: Tensor, input: Tensor) -> None:
    if value.device != input.device:
        raise ArgumentError(f"{name} must be on input's device {input.device}, but is on {value.device}")


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, but got {type(value).__name__}")


def alike(input: Tensor, residual: Tensor) -> bool:
    return residual.dtype == input.dtype and residual.device == input.device


def batch_norm_arguments(bn: Any) -> dict[str, Any]:
    """What :func:`batch_norm_act` needs of a torch.nn batch norm module, whose counter it advances."""
    training = bn.training or (bn.running_mean is None and bn.running_var is None)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    if type(momentum) is not float:
        momentum = as_float(momentum, "momentum")
    if bn.training and bn.track_running_stats and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:  # a cumulative average
            momentum = 1.0 / float(bn.num_batches_tracked)
    tracked = not bn.training or bn.track_running_stats
    return {
        "running_mean": bn.running_mean if tracked else None,
        "running_var": bn.running_var if tracked else None,
        "weight": bn.weight,
        "bias": bn.bias,
        "training": training,
        "momentum": momentum,
        "eps": eps_of(bn),
        "process_group": _process_group(bn) if training and bn.training else None,
    }


def eps_of(bn: Any) -> Any:
    """A batch norm module's ``eps``, which may be a number of NumPy's or PyTorch's."""
    eps = bn.eps
    return eps if type(eps) is float else as_float(eps, "eps")


def _process_group(bn: nn.Module) -> Any:
    if not isinstance(bn, nn.SyncBatchNorm) or not torch.distributed.is_initialized():
        return None
    group = bn.process_group or torch.distributed.group.WORLD
    return group if torch.distributed.get_world_size(group) > 1 else None
