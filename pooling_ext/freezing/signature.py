"""How a frozen module is called: with the arguments of its example, other tensors in their place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ArgumentError


def call_arguments(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that an example stands for.

    A tuple holds several positional arguments; a dictionary whose keys are parameters of ``model``'s forward
    holds keyword arguments.
    """
    if isinstance(example, tuple) and not hasattr(example, "_fields"):
        return example, {}
    if isinstance(example, Mapping) and example and all(isinstance(key, str) for key in example):
        try:
            inspect.signature(model.forward).bind(**example)
        except (TypeError, ValueError):
            return (example,), {}
        return (), dict(example)
    return (example,), {}


class Signature:
    """The arguments of an example, flattened; calls have to be like it.

    Args:
        forward: whose parameters the arguments are.
        args, kwargs: the example.
    """

    def __init__(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._parameters = [
            inspect.Parameter(p.name, p.kind, default=p.default)  # annotations may not be picklable
            for p in inspect.signature(forward).parameters.values()
        ]
        leaves, self.spec = pytree.tree_flatten(self._bind(args, kwargs))
        #: What has to be the same in each call: None for a tensor.
        self.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self.plain = not kwargs and all(type(a) is Tensor for a in args)
        self.count = len(args)

    @classmethod
    def of(cls, forward: Any, args: tuple, kwargs: dict) -> tuple[Signature, tuple, dict]:
        """The signature, and the arguments as it has them."""
        signature = cls(forward, args, kwargs)
        return signature, *signature._bind(args, kwargs)

    @classmethod
    def restored(
        cls, parameters: list[inspect.Parameter], spec: Any, constants: list[Any], plain: bool, count: int
    ) -> Signature:
        """The signature that has these attributes."""
        signature = cls.__new__(cls)
        signature._parameters, signature.spec, signature.constants = parameters, spec, constants
        signature.plain, signature.count = plain, count
        return signature

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = inspect.Signature(self._parameters).bind(*args, **kwargs)
        for parameter in self._parameters:  # a default that is given is as good as none
            given = bound.arguments.get(parameter.name, parameter.empty)
            if given is not parameter.empty and given is parameter.default:
                del bound.arguments[parameter.name]
        return bound.args, bound.kwargs

    @property
    def parameters(self) -> inspect.Signature:
        return inspect.Signature(self._parameters)

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The tensors among the arguments of a call.

        Raises:
            TypeError, ArgumentError: the call is not like the example's.
        """
        if self.plain and not kwargs and len(args) == self.count:
            return list(args)
        if not kwargs and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in self._parameters) and self.plain:
            extra = args[self.count :]
            defaults = [p.default for p in self._parameters[self.count : len(args)]]
            if len(args) < self.count or len(defaults) < len(extra) or extra != tuple(defaults):
                raise TypeError(f"the model was frozen with {self.count} arguments, but got {len(args)}")
        leaves, spec = pytree.tree_flatten(self._bind(args, kwargs))
        if spec != self.spec:
            raise TypeError(
                "the model takes arguments nested as in the example that it was frozen with, "
                f"{self.spec}, but got {spec}"
            )
        tensors = []
        for known, leaf in zip(self.constants, leaves, strict=True):
            if known is None:
                tensors.append(leaf)
            elif not _same(known[0], leaf):
                raise ArgumentError(f"the model was frozen with the argument {known[0]!r}, but got {leaf!r}")
        return tensors


def _same(known: Any, given: Any) -> bool:
    if known is given:
        return True
    return type(known) is type(given) and not isinstance(given, (Tensor, torch.nn.Module)) and known == given
