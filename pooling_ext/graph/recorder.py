"""Copies of a module and its children that record what a forward reads from them.

A forward runs on the copies, so neither the module nor anything that other threads use is changed. A copy's
class is a subclass of its module's; calling a child, and reading a parameter, goes to the tracer.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from .guards import Untraceable, condition, constant, dotted, submodule
from .purity import is_model, is_ours, module_name

_MARK = "_pooling_ext_recorder"


class Recorder:
    """Makes the copies, and knows what was read.

    Args:
        tracer: has ``call_module(copy, args, kwargs)``, ``attribute(path, value)``, ``refuse(why)`` and a
            ``watcher``.
        module: what is copied; stays as it is.
        base: the class whose forward is traced.
        norm: a batch norm of torch.nn whose forward, where that of ``base`` calls it, makes a node.
    """

    def __init__(self, tracer: Any, module: nn.Module, base: type, norm: type | None = None) -> None:
        self.tracer = tracer
        self.reads: dict[tuple[str, str], int] = {}
        self.paths: dict[int, tuple[str, nn.Module]] = {}  # by the copy's id
        self._copies: dict[int, nn.Module] = {}
        self._norm = norm
        self.root = self._copy(module, "", base)
        self._before: dict[int, dict[str, Any]] = {}
        self._written: dict[int, set[str]] = {}

    def start(self) -> None:
        """Remember the copies' attributes as they are before the forward runs."""
        self._before = {key: _snapshot(copy.__dict__) for key, copy in self._copies.items()}

    def _copy(self, module: nn.Module, path: str, cls: type | None = None) -> nn.Module:
        """A shallow copy that records what is read from it; its children are copies too."""
        if id(module) in self._copies:
            return self._copies[id(module)]
        if isinstance(module, torch.jit.ScriptModule):
            copy: nn.Module = _Scripted(module)
            copy.__dict__["_modules"] = {}
        else:
            copy = object.__new__(_recording(cls or type(module), None if path else self._norm))
            fields = {
                # The forward may change these, and must not change the module's.
                key: value.copy() if type(value) in (dict, OrderedDict, list, set) else value
                for key, value in module.__dict__.items()
            }
            object.__setattr__(copy, "__dict__", fields)
        self._copies[id(module)] = copy
        self.paths[id(copy)] = path, module
        if not isinstance(module, torch.jit.ScriptModule):
            copy.__dict__["_modules"] = type(module._modules)(
                (name, None if child is None else self._copy(child, f"{path}.{name}" if path else name))
                for name, child in module._modules.items()
            )
        copy.__dict__[_MARK] = self
        return copy

    def record(self, copy: Any, name: str, frame: Any) -> None:
        while frame is not None and module_name(frame) == "torch.nn.modules.module":
            frame = frame.f_back
        caller = "" if frame is None else module_name(frame)
        if caller.startswith("torch.fx.") or is_ours(caller):
            return
        key = self.paths[id(copy)][0], name
        self.reads[key] = self.reads.get(key, 0) + 1

    def write(self, copy: Any, name: str, value: Any) -> None:
        """A forward that sets what it has read keeps state; what it only sets, its results do not show.

        A constant that it computes once and keeps is none either: it would be the same again.
        """
        path, module = self.paths[id(copy)]
        cached = copy.__dict__.get(name) is None and self.tracer.is_constant(value)
        if self.tracer.watcher.strict or ((path, name) in self.reads and not cached):
            self.tracer.refuse(f"its forward changes {dotted(path, name)}")
        self._written.setdefault(id(module), set()).add(name)

    def changes(self) -> str | None:
        """What the forward changed in the modules, or None."""
        for key, copy in self._copies.items():
            before, ignored = self._before[key], self._written.get(key, ())
            for name, value in _snapshot(copy.__dict__).items():
                if name in ignored or (name in before and before[name] == value):
                    continue
                if not self._only_caches(copy.__dict__[name], before.get(name)):
                    if name in ("_parameters", "_buffers", "_modules"):
                        changed = set(value) ^ set(before[name])
                        name = next(key for key, _ in changed)
                    return f"its forward changes {dotted(self.paths[id(copy)][0], name)}"
        return None

    def _only_caches(self, value: Any, before: Any) -> bool:
        """Whether a dictionary has been given constants under new keys, and nothing else."""
        if type(value) not in (dict, OrderedDict) or not isinstance(before, list):
            return False
        after = _snapshot({"": value})[""]
        added = list(value.values())[len(before) :]
        return after[: len(before)] == before and all(map(self.tracer.is_constant, added))

    def conditions(self, inline: dict[str, Any], calls: list[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Expressions under which every read gives what it gave, and the constants that they name.

        Args:
            inline: paths of children that were traced into, and what has to be true of them.
            calls: the targets of the graph that reads of children and parameters have become.
        """
        originals = dict(self.paths.values())
        conditions: list[str] = []
        constants: dict[str, Any] = {}
        for path, holds in inline.items():
            conditions.append(f"{constant(holds, constants)}({submodule(path)})")
        for (path, name), count in self.reads.items():
            if name == "training" and not path:
                continue
            called = sum(call == (f"{path}.{name}" if path else name) for call in calls)
            found = condition(
                originals[path], dotted(path, name), submodule(path), name, count > called, constants
            )
            if found is not None:
                conditions.append(found)
        return tuple(conditions), constants


class _Scripted(nn.Module):
    """Stands for a ScriptModule, which cannot be subclassed."""

    def __init__(self, module: nn.Module) -> None:
        object.__setattr__(self, "_module", module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_MARK].tracer.call_module(self, args, kwargs)


def _snapshot(fields: dict[str, Any]) -> dict[str, Any]:
    """What to compare, to see whether a forward changed its module; identities, and those in containers."""
    snapshot: dict[str, Any] = {}
    for name, value in fields.items():
        if type(value) in (dict, OrderedDict):
            snapshot[name] = [(key, id(item)) for key, item in value.items()]
        elif type(value) in (list, set):
            snapshot[name] = [id(item) for item in value]
        else:
            snapshot[name] = id(value)
    return snapshot


def batch_norm_of(input: Any) -> Any:
    """Stands in graphs for the batch norm that the forward of a subclass inherits."""
    raise NotImplementedError


@functools.cache
def _inherited(norm: Any) -> type:
    """Comes between ``norm`` and its subclasses, where their ``super().forward`` finds it."""

    def forward(self: Any, input: Any) -> Any:
        return self.__dict__[_MARK].tracer.create_proxy("call_function", batch_norm_of, (input,), {})

    return type(norm.__name__, (norm,), {"forward": forward})


@functools.cache
def _recording(base: Any, norm: type | None = None) -> type:
    def recorder(self: Any) -> Recorder | None:
        found = object.__getattribute__(self, "__dict__").get(_MARK)
        return found if found is not None and found.tracer.watcher.active else None

    def read(self: Any, name: str) -> Any:
        # The slot that runs this falls back to __getattr__, where children and parameters are.
        found = recorder(self)
        if found is not None and name != "__dict__":
            found.record(self, name, sys._getframe(1))
        elif found is not None and is_model(module_name(sys._getframe(1))):
            found.tracer.refuse("its forward looks into __dict__")
        return base.__getattribute__(self, name)

    def fall_back(self: Any, name: str) -> Any:
        value = base.__getattr__(self, name)
        found = recorder(self)
        if found is not None and isinstance(value, Tensor):
            path = found.paths[id(self)][0]
            return found.tracer.attribute(f"{path}.{name}" if path else name, value)
        return value

    def write(self: Any, name: str, value: Any) -> None:
        found = recorder(self)
        if found is not None:
            found.write(self, name, value)
        base.__setattr__(self, name, value)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = self.__dict__[_MARK]
        return found.tracer.call_module(self, args, kwargs)

    members = {"__getattribute__": read, "__getattr__": fall_back, "__setattr__": write, "__call__": call}
    try:
        bases = (base,) if norm is None else (base, _inherited(norm))
        return type(base.__name__, bases, {**members, "__module__": base.__module__})
    except Exception as error:
        raise Untraceable(f"{base.__name__} cannot be subclassed: {error}") from error
