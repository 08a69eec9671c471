"""Conditions under which what a forward read from its module is still what it was, as Python expressions.

An expression names the module ``self``; what it cannot write down is in ``constants``.
"""

from __future__ import annotations

import enum
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx.graph import _format_target

_LITERALS = (int, float, complex, str, bytes, types.NoneType)
_CONSTANTS = (types.FunctionType, types.BuiltinFunctionType, type, enum.Enum, functools.partial)
_CONSTANTS += (torch.dtype, torch.device, torch.memory_format, torch.layout)


class Untraceable(Exception):
    """No trace can stand for the forward; the message says why."""


def submodule(path: str) -> str:
    """An expression for the child of ``self`` at ``path``, which spares nn.Module.__getattr__'s search."""
    return "self" + "".join(f"._modules[{name!r}]" for name in path.split(".") if name)


def dotted(path: str, name: str) -> str:
    """The attribute ``name`` of the child at ``path`` as errors show it."""
    return ".".join(("self", path, name)) if path else f"self.{name}"


def predicate(conditions: Sequence[str], constants: dict[str, Any]) -> Callable[[Any], bool]:
    """The function of a module that says whether all conditions hold."""
    source = (
        "def holds(self):\n"
        "    try:\n"
        f"        return {' and '.join(conditions) or 'True'}\n"
        "    except (AttributeError, KeyError):\n"
        "        return False\n"
    )
    scope = dict(constants)
    exec(compile(source, "<pooling_ext.graph.guards>", "exec"), scope)
    return scope["holds"]


def condition(
    module: nn.Module, shown: str, target: str, name: str, checked: bool, constants: dict[str, Any]
) -> str | None:
    """The expression that says that reading ``name`` from ``module`` gives what it gave."""
    fields = module.__dict__
    if name in ("_parameters", "_buffers"):
        raise Untraceable(f"its forward looks into {shown}")
    if name == "_modules":
        if None in module._modules.values():
            raise Untraceable(f"{shown} holds a child that is None")
        return f"tuple({target}._modules) == {tuple(module._modules)!r}"
    if name in fields:
        return _equal(f"{target}.{name}", shown, fields[name], constants)
    for slot in ("_modules", "_parameters", "_buffers"):
        if name in fields[slot]:
            missing = fields[slot][name] is None
            attribute = f"{target}._modules[{name!r}]" if slot == "_modules" else _format_target(target, name)
            return f"{attribute} is {'' if missing else 'not '}None" if checked or missing else None
    missing_value = object()
    value = inspect.getattr_static(module, name, missing_value)
    if value is missing_value:
        return f"not hasattr({target}, {name!r})"
    owner = next((base for base in type(module).__mro__ if name in base.__dict__), None)
    if owner is None or name.startswith("__") or isinstance(value, property):
        return None
    if owner.__module__.partition(".")[0] == "torch":
        return None
    if isinstance(value, types.FunctionType):
        return f"getattr({target}.{name}, '__func__', None) is {constant(value, constants)}"
    return _equal(f"{target}.{name}", shown, getattr(module, name), constants)


def _equal(expression: str, shown: str, value: Any, constants: dict[str, Any]) -> str:
    if value is None or isinstance(value, bool):
        return f"{expression} is {value}"
    if isinstance(value, types.MethodType):
        return f"{expression}.__func__ is {constant(value.__func__, constants)}"
    if isinstance(value, _CONSTANTS):
        return f"{expression} is {constant(value, constants)}"
    if not _is_literal(value):
        raise Untraceable(f"its forward reads {shown}, a {type(value).__name__}, which may change")
    return f"{expression} == {value!r}"


def _is_literal(value: Any) -> bool:
    if type(value) in (tuple, list, set):
        return all(map(_is_literal, value))
    if type(value) is dict:
        return all(map(_is_literal, itertools.chain(value, value.values())))
    # Infinity and NaN have no literal.
    return type(value) in (*_LITERALS, bool) and (type(value) is not float or abs(value) < float("inf"))


def constant(value: Any, constants: dict[str, Any]) -> str:
    """A name for ``value``, under which it is added to ``constants``."""
    name = f"_{id(value)}"
    constants[name] = value
    return name
