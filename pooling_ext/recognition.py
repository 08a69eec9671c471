"""What freezing recognises in a model: layers, functions, and what they compute with."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor, nn

from . import functional as F
from .errors import ArgumentError
from .prepacked import RELU, Activation

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
IDENTITIES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
ADDS = (operator.add, torch.add, "add")

#: Operations in place, and the same out of place.
INPLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    TF.relu_: TF.relu,
}
#: Operations (by name) whose result is new memory, or no tensor at all.
_FRESH_NAMES = """
    add sub mul truediv div matmul bmm neg exp mean sum clamp cat concat stack clone size dim numel
    relu relu6 hardtanh hardswish hardsigmoid silu gelu leaky_relu sigmoid tanh softmax log_softmax
    conv1d conv2d conv3d linear batch_norm layer_norm group_norm interpolate
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_max_pool2d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d global_avg_pool2d
"""
FRESH = frozenset(_FRESH_NAMES.split())


class Normalisation(NamedTuple):
    """Batch normalisation by running statistics."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """In float64: ``x * scale + shift``."""
        scale = (self.var.double() + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.double()
        shift = -self.mean.double() * scale
        return scale, shift if self.bias is None else shift + self.bias.double()


def is_batch_norm(module: nn.Module) -> bool:
    return type(module) in BATCH_NORMS or type(module).__name__ == "FrozenBatchNorm2d"


def normalisation(module: nn.Module, path: str) -> Normalisation:
    """Read a batch norm module.

    Raises:
        ArgumentError: it has no running statistics, so it depends on the batch.
    """
    mean, var = module.running_mean, module.running_var
    if mean is None or var is None:
        raise ArgumentError(
            f"freeze cannot fold {path} ({type(module).__name__}): it has no running statistics "
            "(track_running_stats=False), so its output depends on the whole batch"
        )
    return Normalisation(mean, var, module.weight, module.bias, float(module.eps))  # type: ignore[arg-type]


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


ACTIVATION_MODULES: dict[type, Callable[[Any], Activation]] = {
    nn.ReLU: lambda m: RELU,
    nn.ReLU6: lambda m: Activation("hardtanh", (0.0, 6.0)),
    nn.Hardtanh: lambda m: Activation("hardtanh", (float(m.min_val), float(m.max_val))),
    nn.Hardswish: lambda m: Activation("hardswish"),
    nn.Hardsigmoid: lambda m: Activation("hardsigmoid"),
    nn.SiLU: lambda m: Activation("swish"),
    nn.GELU: lambda m: Activation("gelu", (), m.approximate),
    nn.LeakyReLU: lambda m: Activation("leaky_relu", (float(m.negative_slope),)),
    nn.Sigmoid: lambda m: Activation("sigmoid"),
    nn.Tanh: lambda m: Activation("tanh"),
}
ACTIVATION_FUNCTIONS: dict[Any, Callable[..., Activation]] = {
    TF.relu: lambda inplace=False: RELU,
    torch.relu: lambda: RELU,
    "relu": lambda: RELU,
    TF.relu6: lambda inplace=False: Activation("hardtanh", (0.0, 6.0)),
    TF.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: Activation(
        "hardtanh", (float(min_val), float(max_val))
    ),
    TF.hardswish: lambda inplace=False: Activation("hardswish"),
    TF.hardsigmoid: lambda inplace=False: Activation("hardsigmoid"),
    TF.silu: lambda inplace=False: Activation("swish"),
    TF.gelu: lambda approximate="none": Activation("gelu", (), approximate),
    TF.leaky_relu: lambda negative_slope=0.01, inplace=False: Activation(
        "leaky_relu", (float(negative_slope),)
    ),
    torch.sigmoid: lambda: Activation("sigmoid"),
    TF.sigmoid: lambda: Activation("sigmoid"),
    "sigmoid": lambda: Activation("sigmoid"),
    torch.tanh: lambda: Activation("tanh"),
    "tanh": lambda: Activation("tanh"),
}
POOLS = {
    getattr(TF, name): getattr(F, name)
    for name in F.__all__
    if hasattr(TF, name) and not name.startswith("batch")
}


def padding(module: Any) -> tuple[list[int] | None, Sequence[int]]:
    """What to pad beforehand (in torch.nn.functional.pad's order), and what the convolution pads."""
    if type(module) is nn.Linear:
        return None, ()
    if type(module) in TRANSPOSED:
        return None, module.padding
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return None, module.padding
    before = list(module._reversed_padding_repeated_twice)
    symmetric = all(low == high for low, high in zip(before[::2], before[1::2], strict=True))
    if module.padding_mode == "zeros" and symmetric:
        return None, before[::2][::-1]
    return before, [0] * len(module.kernel_size)


def folded(
    weight: Tensor, bias: Tensor | None, normalisations: list[Normalisation], transposed: Any = None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with the normalisations in them, in float64 if there are any."""
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if not normalisations:
        return weight, bias
    weight = weight.double()
    bias = weight.new_zeros(()) if bias is None else bias.double()
    for norm in normalisations:
        scale, shift = norm.scale_shift()
        bias = bias * scale + shift
        if transposed is None:
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        else:  # (in, out / groups, ...)
            groups = transposed.groups
            per_group = weight.unflatten(0, (groups, -1))
            scale = scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
            weight = (per_group * scale).flatten(0, 1)
    return weight, bias
