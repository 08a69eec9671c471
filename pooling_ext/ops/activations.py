"""The activations that our kernels apply as they write, and whose gradients those of batch norm take."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError

#: In the order of csrc/common/activation_kind.h: the operators take an activation by its index.
ACTIVATIONS = (
    "identity",
    "relu",
    "relu6",
    "silu",
    "hardswish",
    "leaky_relu",
    "gelu",
    "gelu_tanh",
    "hardsigmoid",
)


class Activation(NamedTuple):
    """One of :data:`ACTIVATIONS`; ``slope`` is that of leaky_relu for negative numbers."""

    name: str
    slope: float = 0.0

    @property
    def arguments(self) -> tuple[int, float]:
        """What the operators take: the index and the slope."""
        return _INDICES[self.name], self.slope

    @property
    def post_op(self) -> tuple[str, tuple[float, ...], str]:
        """What oneDNN's post-ops take: a name, scalars and an algorithm."""
        if self.name == "leaky_relu":
            return "leaky_relu", (self.slope,), ""
        return _POST_OPS[self.name]

    def __call__(self, x: Tensor) -> Tensor:
        """By PyTorch's function."""
        if self.name == "leaky_relu":
            return F.leaky_relu(x, self.slope)
        return _FUNCTIONS[self.name](x)


_INDICES = {name: index for index, name in enumerate(ACTIVATIONS)}
#: Of activations without a parameter.
_POST_OPS: dict[str, tuple[str, tuple[float, ...], str]] = {
    "identity": ("none", (), ""),
    "relu": ("relu", (), ""),
    "relu6": ("hardtanh", (0.0, 6.0), ""),
    "silu": ("swish", (), ""),
    "hardswish": ("hardswish", (), ""),
    "gelu": ("gelu", (), "none"),
    "gelu_tanh": ("gelu", (), "tanh"),
    "hardsigmoid": ("hardsigmoid", (), ""),
}
_FUNCTIONS: dict[str, Any] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardsigmoid": F.hardsigmoid,
}

IDENTITY = Activation("identity")
RELU = Activation("relu")
#: Those without a slope, by their names.
PLAIN = {name: Activation(name) for name in _POST_OPS}


def activation_of(name: str, negative_slope: float) -> Activation:
    """The activation that arguments name.

    Raises:
        ArgumentError: there is none of this name.
    """
    if name not in ACTIVATIONS:
        raise ArgumentError(f"activation must be one of {ACTIVATIONS}, but got {name!r}")
    return Activation(name, float(negative_slope)) if name == "leaky_relu" else PLAIN[name]
