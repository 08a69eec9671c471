"""What torch.jit.script makes of this library: PyTorch's operators, so that scripts run and load without it.

A call of one of our functions is compiled as one of torch.nn.functional's of the same name or, where there is
none, as a function that is written here in what TorchScript knows. Our modules and patched ones are compiled
from the forward that they stand for. What PyTorch's functions do not take (padding in words or per side)
TorchScript refuses by the name of the argument.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._jit_internal import boolean_dispatched, get_closure
from torch.jit._builtins import _find_builtin, _register_builtin

Function = TypeVar("Function", bound=Callable[..., Any])


def compiles_as(ours: Any, theirs: Any) -> None:
    """Let torch.jit.script compile calls of ``ours`` as calls of ``theirs``."""
    builtin = _find_builtin(theirs)
    if builtin is not None:
        _register_builtin(ours, builtin)
        return
    if theirs in boolean_dispatched:  # on return_indices, which is known when a script is compiled
        boolean_dispatched[ours] = boolean_dispatched[theirs]
        theirs = boolean_dispatched[theirs]["if_false"]

    def prepare() -> Any:
        # Compiled here, where names are what they are to ``theirs``, it is found when it is asked for.
        torch.jit.script(theirs)
        return theirs

    ours.__prepare_scriptable__ = prepare


def counterpart(name: str) -> Any:
    """What stands in for our function ``name``: one of this module or of torch.nn.functional, or None."""
    ours = globals().get(name)
    return ours if getattr(ours, "__module__", "") == __name__ else getattr(F, name, None)


def is_beyond(padding: Any, name: str) -> bool:
    """Whether the padding of our function ``name`` is one that PyTorch's does not take."""
    if isinstance(padding, str):
        return True
    rank = int(name[-2]) if name.endswith("d") else 2
    return isinstance(padding, (tuple, list)) and len(padding) == 2 * rank


def compiled_from(theirs: Any) -> Callable[[Function], Function]:
    """Let torch.jit.script compile a method from the source of ``theirs``, with the method's names."""

    def decorate(method: Any) -> Any:
        method.__wrapped__ = theirs
        return method

    return decorate


def with_names_of(theirs: Any, ours: Any) -> Any:
    """A copy of ``ours`` in which names stand for what they do in ``theirs``.

    torch.jit.script compiles a wrapper from the source of what it wraps, but looks up names in the wrapper.

    Args:
        ours: its own names are local to it or to a function around it, or builtins.
    """
    copy = FunctionType(
        ours.__code__, get_closure(inspect.unwrap(theirs)), ours.__name__, None, ours.__closure__
    )
    copy.__dict__.update(ours.__dict__)
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(copy, name, getattr(ours, name))
    return copy


def renamed(function: Any, name: str) -> Any:
    """A copy of a function that torch.jit.script compiles as a method of another name."""
    return FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )


# --- what PyTorch has no function for -----------------------------------------------------------------------


def activated(x: Tensor, residual: Tensor | None, activation: str, negative_slope: float) -> Tensor:
    """What follows a batch norm, as :mod:`pooling_ext.ops.activations` has it."""
    if residual is not None:
        x = x + residual
    if activation == "relu":
        return F.relu(x)
    if activation == "relu6":
        return F.relu6(x)
    if activation == "silu":
        return F.silu(x)
    if activation == "hardswish":
        return F.hardswish(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "hardsigmoid":
        return F.hardsigmoid(x)
    if activation != "identity":
        raise RuntimeError("activation is not one of pooling_ext's")
    return x


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
    negative_slope: float = 0.01,
) -> Tensor:
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return activated(output, residual, activation, negative_slope)


def batch_norm_relu_max_pool(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    kernel_size: int = 3,
    stride: int = 2,
    padding: int = 1,
    dilation: int = 1,
    ceil_mode: bool = False,
) -> Tensor:
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.max_pool2d(F.relu(output), kernel_size, stride, padding, dilation, ceil_mode)


def add_relu_global_avg_pool(input: Tensor, residual: Tensor, keepdim: bool = True) -> Tensor:
    return F.relu(input + residual).mean((-2, -1), keepdim)


def global_avg_pool2d(input: Tensor, keepdim: bool = True) -> Tensor:
    return input.mean((-2, -1), keepdim)


def global_max_pool2d(input: Tensor, keepdim: bool = True) -> Tensor:
    return input.amax((-2, -1), keepdim)


def global_lp_pool2d(
    input: Tensor, norm_type: int | float, keepdim: bool = True, safe: bool = False
) -> Tensor:
    if safe:
        raise RuntimeError("safe=True cannot be compiled by torch.jit.script")
    if norm_type == float("inf"):
        return input.abs().amax((-2, -1), keepdim)
    if norm_type == -float("inf"):
        return input.abs().amin((-2, -1), keepdim)
    # As lp_pool2d has it, without a window whose size is the input's.
    mean = input.pow(norm_type).mean((-2, -1), keepdim)
    return (mean.sign() * mean.abs().relu()).mul(input.size(-2) * input.size(-1)).pow(1.0 / norm_type)
