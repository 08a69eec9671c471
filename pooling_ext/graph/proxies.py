"""The values that a traced forward works with: torch.fx's proxies, which know what they stand for.

Where the tracer computes along on an example, a proxy has the example's value as its ``hint`` and answers
from it what does not depend on sizes or contents: types, attributes, the number of dimensions. What torch.fx
would get wrong is refused.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute

from .purity import is_model, module_name

# The names of a proxy's own attributes.
_OWN = frozenset(["root", "attr", "node", "_node", "tracer", "hint"])


def _in_place_function(name: str) -> Callable[[Any, Any], Any]:
    apply = getattr(operator, name)

    def function(value: Any, other: Any) -> Any:
        return apply(value, other)

    function.__name__ = function.__qualname__ = f"in_place_{name[1:]}"
    return function


#: In place operators, which torch.fx would take for their out-of-place forms. It writes `x += y` for
#: operator.iadd and binds a name anew, which is wrong for values that are immutable.
IN_PLACE = ("iadd", "isub", "imul", "itruediv")
IN_PLACE_FUNCTIONS = {name: _in_place_function(name) for name in IN_PLACE}
globals().update({function.__name__: function for function in IN_PLACE_FUNCTIONS.values()})  # for pickle


def expect_length(value: Any, length: int) -> Any:
    """``value``, whose items a traced forward took apart one by one; there have to be as many again."""
    if len(value) != length:
        raise RuntimeError(f"expected {length} values as on the example, but got {len(value)}")
    return value


class _Checks:
    """What torch.fx would get wrong about a value is refused."""

    tracer: Any
    node: fx.Node

    @property
    def __class__(self: Any) -> type:  # type: ignore[override]
        tracer = object.__getattribute__(self, "tracer")
        asking = sys._getframe(2)  # through __getattribute__
        return tracer.type_of(self) if tracer.watcher.asks_for_type(asking) else type(self)

    def __getattribute__(self, name: str) -> Any:
        if name in _OWN and is_model(module_name(sys._getframe(1))):
            tracer = object.__getattribute__(self, "tracer")
            if tracer.watcher.active:  # the model's value has no such attribute
                raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return object.__getattribute__(self, name)

    def __format__(self: Any, spec: str) -> str:
        watcher = self.tracer.watcher
        if watcher.active and watcher.strict and not watcher.formats:
            self.tracer.refuse("its forward makes text of a value")
        return format(repr(self), spec)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name not in _OWN:
            self.tracer.refuse(f"its forward sets the attribute {name} of a value")
        object.__setattr__(self, name, value)


class Value(_Checks, fx.Proxy):
    """What an operator, a child or an argument gives, of which nothing is known."""

    def __getattr__(self, name: str) -> Any:
        if self.tracer.watcher.asks_for_attribute:
            self.tracer.refuse("its forward asks whether a value has an attribute")
        return _Attribute(self, name)


class _Attribute(_Checks, Attribute):
    """An attribute of a value; its node is made when it is used other than by calling it."""


class _Hinted(_Checks):
    """Answers from the value on the example, ``hint``, what does not depend on sizes or contents."""

    hint: Any

    def __iter__(self: Any) -> Iterator[Any]:
        hint = self.hint
        if isinstance(hint, torch.Size):  # as many as there are dimensions, which stay
            return (self[i] for i in range(len(hint)))
        if isinstance(hint, (tuple, list)):
            checked = self.tracer.create_proxy("call_function", expect_length, (self, len(hint)), {})
            return (checked[i] for i in range(len(hint)))
        if isinstance(hint, dict):
            return iter(hint)
        return self.tracer.refuse("its forward goes through a value whose length may change")

    def __len__(self: Any) -> int:
        if isinstance(self.hint, (tuple, list, dict)):
            return len(self.hint)
        return self.tracer.refuse("its forward asks for the length of a value")

    def __int__(self: Any) -> int:
        return int(self._number())

    def __float__(self: Any) -> float:
        return float(self._number())

    def __index__(self: Any) -> int:
        return operator.index(self._number())

    def _number(self: Any) -> Any:
        if not self.node.meta.get("constant"):
            self.tracer.refuse("its forward turns a value into a number")
        return self.hint

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.hint, dict):
            return item in self.hint
        return self.tracer.refuse("its forward looks for something in a value")

    def __setitem__(self: Any, index: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, item), {})

    def __getattr__(self: Any, name: str) -> Any:
        hint = self.hint
        if not hasattr(hint, name):
            raise AttributeError(f"{type(hint).__name__!r} object has no attribute {name!r}")
        if isinstance(hint, Tensor) and (
            name == "ndim" or (name == "shape" and self.node.meta.get("constant"))
        ):
            return getattr(hint, name)
        if isinstance(hint, dict) and name in ("keys", "values", "items"):
            return lambda: getattr({key: self[key] for key in hint}, name)()
        return _HintedAttribute(self, name)

    def dim(self: Any) -> Any:
        if isinstance(self.hint, Tensor):
            return self.hint.dim()
        return self.tracer.create_proxy("call_method", "dim", (self,), {})


class HintedValue(_Hinted, fx.Proxy):
    """What an operator, a child or an argument gives.

    Attributes:
        hint: its value on the example.
    """


class _HintedAttribute(_Hinted, Attribute):
    @property
    def hint(self: Any) -> Any:
        return getattr(self.root.hint, self.attr)


def _in_place(name: str) -> Any:
    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", IN_PLACE_FUNCTIONS[name], (self, other), {})

    return method


def _unsupported(name: str) -> Any:
    def method(self: Any, *_: Any) -> Any:
        return self.tracer.refuse(f"its forward calls {name} of a value")

    return method


for _name in (*IN_PLACE, "iand", "ior", "ixor", "ifloordiv", "imod", "ipow", "imatmul"):
    setattr(_Checks, f"__{_name}__", (_in_place if _name in IN_PLACE else _unsupported)(_name))
for _name in ("__delitem__", "__copy__", "__deepcopy__"):
    setattr(_Checks, _name, _unsupported(_name))
for _name in ("__setitem__", "__contains__"):
    setattr(Value, _name, _unsupported(_name))
