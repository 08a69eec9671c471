"""Normalization by constants, and its folding into the layer before it (Jacob et al. 2018, section 3.2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError


class Normalization(NamedTuple):
    """Batch normalization by running statistics."""

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


class Affine(NamedTuple):
    """A factor and a summand for each channel; None for none."""

    scale: Tensor | None
    shift: Tensor | None

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """In float64: ``x * scale + shift``."""
        known: Any = self.scale if self.scale is not None else self.shift
        scale = torch.ones_like(known) if self.scale is None else self.scale
        shift = torch.zeros_like(known) if self.shift is None else self.shift
        return scale.double(), shift.double()


def normalization(module: Any, path: str) -> Normalization:
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
    return Normalization(mean, var, module.weight, module.bias, float(module.eps))


def folded(
    weight: Tensor,
    bias: Tensor | None,
    normalizations: list[Normalization | Affine],
    transposed: nn.Module | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with the normalizations in them, in float64 if there are any.

    Args:
        transposed: the transposed convolution that they belong to, if it is one.
    """
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if not normalizations:
        return weight, bias
    weight = weight.double()
    bias = weight.new_zeros(()) if bias is None else bias.double()
    for norm in normalizations:
        scale, shift = norm.scale_shift()
        bias = bias * scale + shift
        if transposed is None:
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
        else:  # (in, out / groups, ...)
            groups: Any = transposed.groups
            per_group = weight.unflatten(0, (groups, -1))
            scale = scale.view(groups, 1, -1, *[1] * (weight.dim() - 2))
            weight = (per_group * scale).flatten(0, 1)
    return weight, bias
