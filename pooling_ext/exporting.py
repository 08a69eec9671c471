"""Whether a program is made of what is called: by torch.export, torch.jit.trace or torch.onnx.export."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.compiler import is_compiling, is_dynamo_compiling

Function = TypeVar("Function", bound=Callable[..., Any])
_SINCE_2_14 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


if _SINCE_2_14:
    from torch.compiler import is_exporting
else:

    def is_exporting() -> bool:
        """False: 2.11 says that it exports whenever it compiles, which it should not."""
        return False


#: None unless torch.jit traces; the fastest way to ask, and one that torch.compile knows.
tracing_state = torch._C._get_tracing_state


def leaves_us() -> bool:
    """Whether the program is to run without this library, so that PyTorch's operators stand in for ours."""
    return tracing_state() is not None or (is_compiling() and torch.onnx.is_in_onnx_export())


def is_recording() -> bool:
    """Whether operators are recorded as Python runs, by torch.jit.trace or torch.export, unless strict."""
    return tracing_state() is not None or (is_compiling() and not is_dynamo_compiling())


def least(a: Any, b: Any) -> Any:
    """``min(a, b)``, in a compiler's trace also of symbols; 2.11 takes torch.sym_min of no numbers there."""
    return torch.sym_min(a, b) if _SINCE_2_14 and is_compiling() else min(a, b)


def most(a: Any, b: Any) -> Any:
    """``max(a, b)``, as :func:`least`."""
    return torch.sym_max(a, b) if _SINCE_2_14 and is_compiling() else max(a, b)


def are_known(sizes: Iterable[Any]) -> bool:
    """Whether sizes are numbers, and not the symbols of a compiler's trace that is for any size."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # which takes a second to import

    return all(map(has_static_value, sizes))


def constant_in_graphs(function: Function) -> Function:
    """Let torch.compile call ``function`` as it traces, and keep the result.

    As torch.compiler.assume_constant_result, which imports the compiler: that takes two seconds.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function


__all__ = [
    "are_known",
    "constant_in_graphs",
    "is_exporting",
    "is_recording",
    "least",
    "leaves_us",
    "most",
    "tracing_state",
]
