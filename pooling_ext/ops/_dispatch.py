"""The entry that every public operator passes through."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

F = TypeVar("F", bound=Callable[..., Any])


def public(function: F) -> F:
    """Give ``function(input, ...)`` the manners of torch.nn.functional.

    Tensor-likes with ``__torch_function__`` (fx proxies among them) see the call first, and anything
    that is not a tensor is refused.
    """

    @wraps(function)
    def entry(input: Any, *args: Any, **kwargs: Any) -> Any:
        if type(input) is Tensor:  # nearly always, so first
            return function(input, *args, **kwargs)
        if has_torch_function_unary(input):
            return handle_torch_function(entry, (input,), input, *args, **kwargs)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"{function.__name__}(): input must be a torch.Tensor, but got {type(input).__name__}"
            )
        return function(input, *args, **kwargs)

    return cast(F, entry)
