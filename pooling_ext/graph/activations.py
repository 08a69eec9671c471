"""Activations: as modules and functions of PyTorch, and under the names that oneDNN's post-ops take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import Tensor, fx, nn

from ..ops import activations as kernels


class Activation(NamedTuple):
    """An elementwise function, under the name and with the arguments that oneDNN's post-ops take."""

    name: str
    scalars: tuple[float, ...] = ()
    algorithm: str = ""

    def __call__(self, x: Tensor, inplace: bool = False) -> Tensor:
        function = _FUNCTIONS[self.name]
        if self.name == "gelu":
            return TF.gelu(x, approximate=self.algorithm)
        if self.name in ("sigmoid", "tanh"):
            return getattr(x, self.name + "_" * inplace)()
        return function(x, *self.scalars, inplace=inplace)

    def __str__(self) -> str:
        return self.name


_FUNCTIONS: dict[str, Any] = {
    "relu": TF.relu,
    "hardtanh": TF.hardtanh,
    "hardswish": TF.hardswish,
    "hardsigmoid": TF.hardsigmoid,
    "swish": TF.silu,
    "leaky_relu": TF.leaky_relu,
    "gelu": TF.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

RELU = Activation("relu")

#: Activations under the names that our kernels have for them.
_KERNELS = {
    Activation(*one.post_op): one for one in kernels.PLAIN.values() if one is not kernels.PLAIN["identity"]
}


def kernel_activation(activation: Activation) -> kernels.Activation | None:
    """What our kernels know ``activation`` as, or None if they do not have it."""
    if activation.name == "leaky_relu":
        return kernels.Activation("leaky_relu", activation.scalars[0])
    return _KERNELS.get(activation)


def _relu(inplace: bool = False) -> Activation:
    return RELU


def _plain(name: str) -> Callable[..., Activation]:
    return lambda inplace=False: Activation(name)


def _relu6(inplace: bool = False) -> Activation:
    return Activation("hardtanh", (0.0, 6.0))


def _hardtanh(min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Activation:
    return Activation("hardtanh", (float(min_val), float(max_val)))


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    return Activation("leaky_relu", (float(negative_slope),))


def _gelu(approximate: str = "none") -> Activation:
    return Activation("gelu", (), approximate)


#: The activation that a module of torch.nn applies.
MODULES: dict[type, Callable[[Any], Activation]] = {
    nn.ReLU: lambda m: RELU,
    nn.ReLU6: lambda m: _relu6(),
    nn.Hardtanh: lambda m: _hardtanh(m.min_val, m.max_val),
    nn.Hardswish: lambda m: Activation("hardswish"),
    nn.Hardsigmoid: lambda m: Activation("hardsigmoid"),
    nn.SiLU: lambda m: Activation("swish"),
    nn.GELU: lambda m: _gelu(m.approximate),
    nn.LeakyReLU: lambda m: _leaky_relu(m.negative_slope),
    nn.Sigmoid: lambda m: Activation("sigmoid"),
    nn.Tanh: lambda m: Activation("tanh"),
}
#: The activation that a function applies, or a method by its name, from the arguments after the input. The
#: form in place, by name, is the same activation.
FUNCTIONS: dict[Any, Callable[..., Activation]] = {
    TF.relu: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    "relu": _relu,
    "relu_": _relu,
    TF.relu6: _relu6,
    TF.hardtanh: _hardtanh,
    TF.hardtanh_: _hardtanh,
    TF.hardswish: _plain("hardswish"),
    TF.hardsigmoid: _plain("hardsigmoid"),
    TF.silu: _plain("swish"),
    TF.gelu: _gelu,
    TF.leaky_relu: _leaky_relu,
    TF.leaky_relu_: _leaky_relu,
    torch.sigmoid: _plain("sigmoid"),
    torch.sigmoid_: _plain("sigmoid"),
    TF.sigmoid: _plain("sigmoid"),
    "sigmoid": _plain("sigmoid"),
    "sigmoid_": _plain("sigmoid"),
    torch.tanh: _plain("tanh"),
    torch.tanh_: _plain("tanh"),
    TF.tanh: _plain("tanh"),
    "tanh": _plain("tanh"),
    "tanh_": _plain("tanh"),
}


def function_activation(node: fx.Node) -> Activation | None:
    """The activation that ``node``, a call of a function or method, applies to its only tensor."""
    if node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1 or not node.args:
        return None
    make = FUNCTIONS.get(node.target)
    if make is None or not isinstance(node.args[0], fx.Node):
        return None
    try:
        return make(*node.args[1:], **node.kwargs)
    except (TypeError, ValueError):  # arguments that we do not know
        return None
