"""What the operators' autograd Functions share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling


def needs_autograd(input: torch.Tensor) -> bool:
    """Whether a call on ``input`` must go through an autograd Function.

    When it need not, the operator is called directly and pays for no autograd machinery.
    """
    if input.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


class _Leaf:
    """A tuple that pytree sees as one leaf.

    torch.func pairs the tangents of a Function with its arguments, of which a nested tuple would be many.
    """

    def __init__(self, value: tuple[Any, ...]):
        self.value = value

    def __iter__(self) -> Iterator[Any]:
        return iter(self.value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value, name)


class Differentiable:
    """An autograd Function with its forward-mode rule.

    torch.compile cannot trace a Function that defines ``jvp``, and has no use for it; everyone else
    gets the subclass that does.
    """

    def __init__(self, function: type[Function], jvp: Callable[..., Any]):
        self.plain = function
        self.with_jvp = type(function.__name__, (function,), {"jvp": staticmethod(jvp)})

    def __call__(self, *args: Any) -> Any:
        if is_compiling():
            return self.plain.apply(*args)
        if torch._C._are_functorch_transforms_active():
            return self.with_jvp.apply(*(_Leaf(a) if isinstance(a, tuple) else a for a in args))
        # Function.apply would first bind the arguments to forward's signature, at ten times the
        # cost of the rest; ours are complete and in order.
        return super(Function, self.with_jvp).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]
