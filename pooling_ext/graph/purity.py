"""What a traced forward may call: operators, and helpers that keep no state and do not ask for it.

Everything else may do something that a graph does not repeat. The model's calls are seen through
:func:`sys.setprofile`, so that no function has to be replaced while other threads run.
"""

from __future__ import annotations

import dis
import functools
import gc
import os
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# For patch: PyTorch's operators and harmless helpers, by the beginnings of the names of their modules.
_TORCH = ("torch.nn.", "torch.fx.", "torch.functional.", "torch.overrides.", "torch._jit_internal.")
_STANDARD = frozenset(
    ["_collections_abc", "abc", "collections", "contextlib", "dataclasses", "enum", "functools"]
)
_STANDARD |= {"itertools", "math", "operator", "types", "typing"}
_BUILTINS = frozenset(["print", "input", "open", "exec", "eval", "globals", "locals", "vars", "id", "hash"])
_C_MODULES = frozenset(["_io", "_random", "io", "numpy", "os", "posix", "random", "time"])
_QUERIES = ("is_", "are_", "get_", "set_", "_")  # torch.is_grad_enabled and the like

# For freeze, which runs the result beside the model: what changes how operators compute, and random numbers.
_RANDOM = ("random.", "_random.", "secrets.", "numpy.random.")
_REFUSED = (*_RANDOM, "torch.random.", "torch.cuda.random.", "torch.utils.checkpoint.")
_SETTERS = ("set_", "_set_", "manual_seed", "autocast_increment_nesting", "use_deterministic")

#: Functions of PyTorch, by name, in which ``isinstance`` asks on behalf of the model.
_TYPE_TESTS = frozenset(["is_tensor", "_isinstance", "isinstance", "container_checker"])


def module_name(frame: Any) -> str:
    return frame.f_globals.get("__name__") or ""


def is_torch(name: str) -> bool:
    return name == "torch" or name.startswith("torch.")


def is_ours(name: str) -> bool:
    return name.startswith("pooling_ext.graph.")


def is_model(name: str) -> bool:
    """Whether a Python module may hold a model's code."""
    return not is_torch(name) and not is_ours(name) and name.partition(".")[0] not in sys.stdlib_module_names


class Watcher:
    """Refuses calls of a forward that a graph cannot stand for.

    Args:
        refuse: is given the reason, and raises.
        strict: whether everything that is not known to be harmless is refused, for a graph that nothing
            checks; else only what is known to do harm.

    Attributes:
        active: whether the forward is running.
        formats: whether it may make text of values, which a graph gets wrong.
    """

    formats = False

    def __init__(self, refuse: Callable[[str], None], strict: bool) -> None:
        self.refuse, self.strict = refuse, strict
        self.active = False
        self._asking = {hasattr: 0, getattr: 0, isinstance: 0}

    def asks_for_type(self, frame: Any) -> bool:
        """Whether the code at ``frame``, which reads a value's ``__class__``, is the model's isinstance."""
        if not self.active:
            return False
        if self._asking[isinstance] and not is_torch(module_name(frame)):
            return True
        return is_torch(module_name(frame)) and frame.f_code.co_name in _TYPE_TESTS and not self.strict

    @property
    def asks_for_attribute(self) -> bool:
        """Whether the model's code calls hasattr or getattr, which may have a default."""
        return self._asking[hasattr] > 0 or self._asking[getattr] > 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model's code, which runs in the body."""
        before, collects = sys.getprofile(), gc.isenabled()
        gc.disable()  # what others do when garbage is collected would look like calls of the model
        self.resume()
        try:
            yield
        finally:
            self.active = False
            sys.setprofile(before)
            if collects:
                gc.enable()

    def resume(self) -> None:
        """Watch on after an error, which ends a profile function."""
        self.active = True
        self._asking = dict.fromkeys(self._asking, 0)
        sys.setprofile(self._profile)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the body call anything."""
        active, before, asking = self.active, sys.getprofile(), dict(self._asking)
        self.active = False
        sys.setprofile(None)
        try:
            yield
        finally:
            self.active, self._asking = active, asking
            sys.setprofile(before)

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        """Look at each call that the model's code makes; see :func:`sys.setprofile`."""
        why, caller = None, frame
        if event == "call":
            caller = frame.f_back
            called_by = module_name(caller) if caller is not None else ""
            if not is_ours(module_name(frame)) and (is_ours(called_by) or is_model(called_by)):
                why = self._why_not_call(module_name(frame), frame)
        elif event != "return" and is_model(module_name(frame)):
            if argument is hasattr or argument is getattr or argument is isinstance:
                self._asking[argument] += 1 if event == "c_call" else -1
            elif event == "c_call":
                why = self._why_not_builtin(argument)
        if why is not None and caller is not None:
            self.refuse(f"{why} ({os.path.basename(caller.f_code.co_filename)}:{caller.f_lineno})")

    def _why_not_call(self, name: str, frame: Any) -> str | None:
        """Why a forward that calls a Python function of the module ``name`` cannot be traced."""
        top, code = name.partition(".")[0], frame.f_code
        if not self.strict:
            allowed = not f"{name}.".startswith(_REFUSED) and not _enters_autocast(name, frame)
        elif top == "torch":
            allowed = f"{name}.".startswith(_TORCH) or code is torch._assert.__code__
        else:
            allowed = top in _STANDARD or (top != "numpy" and top not in sys.stdlib_module_names)
        if not allowed:
            return f"its forward calls {name}.{code.co_name}"
        if not is_torch(name) and top not in _STANDARD and is_model(name) and _asks_for_exact_type(code):
            return f"{code.co_name} calls type()"
        return None

    def _why_not_builtin(self, function: Any) -> str | None:
        """As :meth:`_why_not_call`, of a function that is written in C."""
        name = getattr(function, "__name__", "")
        module = getattr(function, "__module__", None)
        if module is None:
            owner = getattr(function, "__self__", None)
            if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
                return f"its forward calls {owner.__name__}.{name}" if self.strict else None
            module = owner.__name__ if isinstance(owner, types.ModuleType) else type(owner).__module__
        module = str(module)
        top = module.partition(".")[0]
        if self.strict:
            asks = top == "torch" and name.startswith(_QUERIES)
            refused = asks or top in _C_MODULES or (top == "builtins" and name in _BUILTINS)
        else:
            sets = top == "torch" and name.startswith(_SETTERS)
            refused = sets or f"{module}.".startswith(_RANDOM)
        return f"its forward calls {module}.{name}" if refused else None


def _enters_autocast(name: str, frame: Any) -> bool:
    """Whether a call changes the dtype that operators compute in."""
    entered = frame.f_code.co_name == "__enter__" and name.startswith("torch.")
    context = frame.f_locals.get("self") if entered else None
    return isinstance(context, torch.autocast) and bool(context._enabled)


@functools.cache
def _asks_for_exact_type(code: types.CodeType) -> bool:
    """Whether a function gives something else than its ``self`` to ``type``."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("PUSH_NULL", "CACHE")]
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval == "type":
            of_self = after is not None and after.opname.startswith("LOAD_FAST") and after.argval == "self"
            if not of_self:
                return True
    return False
