"""The entry that every public operator passes through."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import scripting
from ..errors import ArgumentError
from ..exporting import leaves_us, tracing_state

F = TypeVar("F", bound=Callable[..., Any])


def public(function: F) -> F:
    """Give ``function(input, ...)`` the manners of torch.nn.functional.

    Tensor-likes with ``__torch_function__`` (fx proxies among them) see the call first, and anything
    that is not a tensor is refused. Where a program is made that is to run without us, PyTorch's operators
    stand in.
    """
    stand_in = _stand_in(function)

    @wraps(function)
    def entry(input: Any, *args: Any, **kwargs: Any) -> Any:
        if type(input) is Tensor and tracing_state() is None:  # nearly always, so first
            return function(input, *args, **kwargs)
        if has_torch_function_unary(input):
            return handle_torch_function(entry, (input,), input, *args, **kwargs)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"{function.__name__}(): input must be a torch.Tensor, but got {type(input).__name__}"
            )
        return (stand_in if leaves_us() else function)(input, *args, **kwargs)

    return cast(F, entry)


def _stand_in(function: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's operators for arguments of ``function`` that they can have; ``function`` for the others.

    Our windows are numbers for one size of the input, and PyTorch's arguments are for any.
    """
    theirs = scripting.counterpart(function.__name__)
    if theirs is None or "conv" in function.__name__:  # which look for themselves
        return function
    parameters = inspect.signature(function)
    named = [p for p in parameters.parameters.values() if p.kind is p.KEYWORD_ONLY]
    known = {p.name for p in named if p.name in getattr(theirs, "__annotations__", ())}
    beyond = [p for p in named if p.name not in known]

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        if arguments.get("divisor_override") is not None and tracing_state() is None:
            return function(*args, **kwargs)  # torch.onnx.export forgets it
        if "output_size" in arguments and tracing_state() is None:
            _check_adaptive(arguments["input"], arguments["output_size"], function.__name__)
        if scripting.is_beyond(arguments.get("padding"), function.__name__) or any(
            arguments[p.name] != p.default for p in beyond
        ):
            return function(*args, **kwargs)
        if "stride" in arguments and arguments["stride"] is None:
            arguments["stride"] = arguments["kernel_size"]
        return theirs(*bound.args, **{name: arguments[name] for name in known})

    return stand_in


def _check_adaptive(input: Tensor, output_size: Any, name: str) -> None:
    """Refuse windows whose size torch.onnx.export would silently take from the example."""
    rank = int(name[-2])
    wanted = output_size if isinstance(output_size, (tuple, list)) else (output_size,) * rank
    for size, count in zip(input.shape[-rank:], wanted, strict=False):
        if isinstance(size, torch.SymInt) and count not in (1, None):
            raise ArgumentError(
                f"{name}(): output_size {output_size!r} of an input of dynamic size has no ONNX operator; "
                "export it for one size"
            )
