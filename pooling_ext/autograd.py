"""What the operators' autograd Functions share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling

from .exporting import is_exporting

_transforms_are_active = torch._C._are_functorch_transforms_active  # looked up once


def needs_autograd(input: torch.Tensor) -> bool:
    """Whether a call on ``input`` must go through an autograd Function.

    When it need not, the operator is called directly and pays for no autograd machinery.
    """
    if input.requires_grad and torch.is_grad_enabled():
        return True
    return transformed()


def transformed() -> bool:
    """Whether torch.func or forward mode is at work."""
    return forward_ad._current_level >= 0 or _transforms_are_active()


def needs_grad(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def loses_grad(*inputs: Tensor | None) -> bool:
    """Whether gradients are wanted of an exported program, which has an autograd Function's forward alone."""
    return is_exporting() and needs_grad(*inputs)


def distinct(*tensors: Any) -> list[Any]:
    """``tensors``, with views in place of repetitions, which torch.compile gives to no Function."""
    return [
        x if x is None or all(x is not y for y in tensors[:i]) else x.view_as(x)
        for i, x in enumerate(tensors)
    ]


def refuse_empty(grad: torch.Tensor) -> None:
    """Raise RuntimeError for an adaptive operator's empty gradient, as PyTorch's backward does.

    Only a batch may be empty.
    """
    if 0 in grad.shape[1:]:
        raise RuntimeError(
            "Expected grad to have non-zero size for non-batch dimensions, but got grad of size "
            f"{list(grad.shape)}: output_size or input is empty"
        )


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
    """An autograd Function with its forward-mode rule, in the three guises its callers need.

    torch.compile cannot trace a Function that defines ``jvp``, and torch.func needs the separate
    ``setup_context`` that costs every eager call ten times what the rest does.
    """

    def __init__(self, function: type[Function], jvp: Callable[..., Any]):
        def forward(ctx: Any, *args: Any) -> Any:
            output = function.forward(*args)
            function.setup_context(ctx, args, output)
            return output

        name, rules = function.__name__, {"jvp": staticmethod(jvp)}
        self.traced = function
        self.transformed = type(name, (function,), rules)
        rules |= {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
        self.eager = type(name, (Function,), rules)

    def __call__(self, *args: Any) -> Any:
        if is_compiling():
            return self.traced.apply(*args)
        if _transforms_are_active():
            return self.transformed.apply(*(_Leaf(a) if isinstance(a, tuple) else a for a in args))
        if not needs_autograd(args[0]):  # a backward pass that no one differentiates
            return self.traced.forward(*args)
        return self.eager.apply(*args)


class _WithZeroGradient(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(source)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (source,) = ctx.saved_tensors
        return grads[0], torch.zeros_like(source) if ctx.needs_input_grad[1] else None


def with_zero_gradient(value: Tensor, source: Tensor | None) -> Tensor:
    """``value``, on which ``source`` has no influence: its gradient is zeros, where it would be None."""
    if source is None or not needs_grad(source):
        return value
    return _WithZeroGradient.apply(value, source)  # type: ignore[return-value]
