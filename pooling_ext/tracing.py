"""Traces one module's forward with torch.fx, its children as leaves, and says on what the trace depends.

A trace stands for the forward as long as what the forward read while it was traced (flags, which children
there are, the training mode) is the same. So the module is traced as a copy that records each read, and
the trace comes with a guard that compares them. A forward that a trace cannot stand for (it branches on
values, enters contexts, has side effects, draws numbers) is :class:`Untraceable`.
"""

from __future__ import annotations

import dis
import functools
import gc
import inspect
import operator
import os
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute
from torch.utils._python_dispatch import TorchDispatchMode

from .guards import Untraceable, condition, constant, dotted, submodule

#: In place operators, which fx would take for their out-of-place forms.
IN_PLACE = ("iadd", "isub", "imul", "itruediv")

# What a traced forward may call besides functions of its own: PyTorch's operators and harmless helpers.
# All else may keep state, ask for it, or be lost in the trace (torch.no_grad, torch.utils.checkpoint).
_TORCH = ("torch.nn.", "torch.fx.", "torch.functional.", "torch.overrides.", "torch._jit_internal.")
_STANDARD = frozenset(
    ["_collections_abc", "abc", "collections", "contextlib", "dataclasses", "enum", "functools"]
)
_STANDARD |= {"itertools", "math", "operator", "types", "typing"}
_BUILTINS = frozenset(["print", "input", "open", "exec", "eval", "globals", "locals", "vars", "id", "hash"])
_C_MODULES = frozenset(["_io", "_random", "io", "numpy", "os", "posix", "random", "time"])
_QUERIES = ("is_", "are_", "get_", "set_", "_")  # torch.is_grad_enabled and the like

_lock = threading.RLock()  # torch.fx changes nn.Module while it traces
_ours = sys.modules[__name__].__dict__


@dataclass(frozen=True)
class Trace:
    """A forward as a graph, for arguments of one kind.

    Attributes:
        graph: its placeholders are ``arguments``, in order.
        arguments: names of the parameters of forward that have no default; the others had theirs.
        kind: the class of all arguments, Tensor or list.
        training: the mode it is for; None where the forward does not look at it.
        conditions: Python expressions of ``self`` under which the graph is right; where they raise
            AttributeError or KeyError it is not.
        constants: the values that ``conditions`` name.
    """

    graph: fx.Graph
    arguments: tuple[str, ...]
    kind: type
    training: bool | None
    conditions: tuple[str, ...]
    constants: dict[str, Any]


def trace(
    module: nn.Module, base: type, inline: Mapping[str, Callable[[Any], bool]] | None = None
) -> list[Trace]:
    """Trace the forward that ``module`` has as a ``base``, in each mode and for each kind of argument.

    Args:
        module: stays as it is.
        base: a class of it.
        inline: paths of children that are to be traced into, and what has to be true of them.

    Raises:
        Untraceable: with the reason.
    """
    traces: list[Trace] = []
    kinds: list[type] = [Tensor]
    for kind in kinds:
        modes = [module.training]
        for mode in modes:
            session = _Session(module, base, mode, inline or {})
            try:
                traces.append(session.trace(kind))
            except Untraceable:
                if kind is Tensor:  # otherwise the first kind is what there is
                    raise
                continue
            if session.read_training and len(modes) == 1:
                modes.append(not mode)
            if session.asked_for_type and list not in kinds and len(traces[-1].arguments) == 1:
                kinds.append(list)
    return traces


def _module_name(frame: Any) -> str:
    return frame.f_globals.get("__name__") or ""


def _is_torch(name: str) -> bool:
    return name == "torch" or name.startswith("torch.")


def _is_model(name: str) -> bool:
    """Whether a Python module may hold a model's code."""
    return not _is_torch(name) and name.partition(".")[0] not in sys.stdlib_module_names


class _Session:
    """One run of fx over a copy of a module and all its children."""

    def __init__(self, module: nn.Module, base: Any, training: bool, inline: Mapping[str, Any]) -> None:
        self.module = module
        self.base = base
        self.training = training
        self.inline = inline
        self.kind: type = Tensor
        self.arguments = _arguments(base.forward)
        self.reads: dict[tuple[str, str], int] = {}
        self.paths: dict[int, tuple[str, nn.Module]] = {}
        self.active = False
        self.asked_for_type = False
        self.in_hasattr = 0
        self.problem: str | None = None

    @property
    def read_training(self) -> bool:
        return ("", "training") in self.reads

    def trace(self, kind: type) -> Trace:
        with _lock:
            copies: dict[int, nn.Module] = {}
            root = self._copy(self.module, "", copies)
            root.__dict__["training"] = self.training
            before = {key: _freeze(copy.__dict__) for key, copy in copies.items()}
            self.kind = kind
            tracer = _Tracer(self)
            try:
                graph = tracer.trace(root)
            except Untraceable:
                raise
            except Exception as error:
                text = (str(error).splitlines() or [""])[0]
                raise Untraceable(self.problem or f"torch.fx cannot trace it: {text}") from error
            if self.problem is not None:
                raise Untraceable(self.problem)
            for key, copy in copies.items():
                for name, value in _freeze(copy.__dict__).items():
                    if name not in before[key] or before[key][name] != value:
                        raise Untraceable(f"its forward changes {dotted(self.paths[id(copy)][0], name)}")
        calls = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
        conditions, constants = self._conditions(calls)
        training = self.training if self.read_training else None
        return Trace(graph, self.arguments, kind, training, conditions, constants)

    def _copy(self, module: nn.Module, path: str, memo: dict[int, nn.Module]) -> nn.Module:
        """A shallow copy that records what is read from it; its children are copies too."""
        if id(module) in memo:
            return memo[id(module)]
        if isinstance(module, (torch.jit.ScriptModule, fx.GraphModule)):
            return module
        copy = object.__new__(_recording(type(module) if path else self.base))
        memo[id(module)] = copy
        self.paths[id(copy)] = path, module
        fields = {
            # The forward may change these, and must not change the module's.
            key: value.copy() if type(value) in (dict, OrderedDict, list, set) else value
            for key, value in module.__dict__.items()
        }
        fields["_modules"] = type(module._modules)(
            (name, None if child is None else self._copy(child, f"{path}.{name}" if path else name, memo))
            for name, child in module._modules.items()
        )
        object.__setattr__(copy, "__dict__", fields)
        copy.__dict__["_pooling_ext_session"] = self
        return copy

    def record(self, copy: Any, name: str, frame: Any) -> None:
        while frame is not None and _module_name(frame) == "torch.nn.modules.module":
            frame = frame.f_back
        caller = "" if frame is None else _module_name(frame)
        if caller.startswith("torch.fx.") or caller == __name__:
            return
        key = self.paths[id(copy)][0], name
        self.reads[key] = self.reads.get(key, 0) + 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        before, collects = sys.getprofile(), gc.isenabled()
        gc.disable()  # what others do when garbage is collected would look like calls of the model
        self.active = True
        try:
            with _NoOperators():
                sys.setprofile(self._profile)
                try:
                    yield
                finally:
                    sys.setprofile(before)
        finally:
            self.active = False
            if collects:
                gc.enable()

    def _profile(self, frame: Any, event: str, argument: Any) -> None:
        """Looks at each call that the model's code makes; see :func:`sys.setprofile`."""
        why, caller = None, frame
        if event == "call":
            ours = frame.f_back.f_globals is _ours  # the call of the forward itself
            caller = frame.f_back
            if frame.f_globals is not _ours and (ours or _is_model(_module_name(caller))):
                why = _why_not_call(_module_name(frame), frame.f_code)
        elif event != "return" and frame.f_globals is not _ours and _is_model(_module_name(frame)):
            if argument is hasattr:
                self.in_hasattr += 1 if event == "c_call" else -1
            elif event == "c_call":
                why = _why_not_builtin(argument)
        if why is not None:
            self.refuse(f"{why} ({os.path.basename(caller.f_code.co_filename)}:{caller.f_lineno})")

    def refuse(self, why: str) -> None:
        self.problem = self.problem or why
        raise Untraceable(why)

    def _conditions(self, calls: list[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
        originals = dict(self.paths.values())
        conditions: list[str] = []
        constants: dict[str, Any] = {}
        for path, holds in self.inline.items():
            conditions.append(f"{constant(holds, constants)}({submodule(path)})")
        for (path, name), count in self.reads.items():
            module = originals[path]
            if name == "training" and not path:
                continue
            called = sum(call == (f"{path}.{name}" if path else name) for call in calls)
            shown, target = dotted(path, name), submodule(path)
            found = condition(module, shown, target, name, count > called, constants)
            if found is not None:
                conditions.append(found)
        return tuple(conditions), constants


def _freeze(fields: dict[str, Any]) -> dict[str, Any]:
    """What to compare, to see whether a forward changed its module; identities, and those in containers."""
    frozen: dict[str, Any] = {}
    for name, value in fields.items():
        if type(value) in (dict, OrderedDict):
            frozen[name] = [(key, id(item)) for key, item in value.items()]
        elif type(value) in (list, set):
            frozen[name] = [id(item) for item in value]
        else:
            frozen[name] = id(value)
    return frozen


def _arguments(forward: Any) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    required = [
        p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if not required or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise Untraceable("its forward has no positional argument without a default")
    return tuple(p.name for p in required)


@functools.cache
def _recording(base: type) -> type:
    def read(self: Any, name: str) -> Any:
        # The slot that runs this falls back to nn.Module.__getattr__, where children and parameters are.
        session = object.__getattribute__(self, "__dict__").get("_pooling_ext_session")
        if session is not None and session.active and name != "__dict__":
            session.record(self, name, sys._getframe(1))
        elif session is not None and session.active and not _is_torch(_module_name(sys._getframe(1))):
            session.refuse("its forward looks into __dict__")
        return base.__getattribute__(self, name)  # type: ignore[call-arg]

    try:
        return type(base.__name__, (base,), {"__getattribute__": read, "__module__": base.__module__})
    except Exception as error:
        raise Untraceable(f"{base.__name__} cannot be subclassed: {error}") from error


class _NoOperators(TorchDispatchMode):
    """Refuses what runs on real tensors: the trace would keep its result as a constant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable(f"its forward computes {func} from no argument of it")


def _session(value: Any) -> Any:
    return value.tracer.session


class _Checks:
    """What fx would get wrong about a value is refused."""

    @property
    def __class__(self: Any) -> type:  # type: ignore[override]
        frame = sys._getframe(1)
        session = _session(self)
        if not session.active or frame.f_globals is _ours or _is_torch(_module_name(frame)):
            return type(self)
        if isinstance(self, Attribute) or self.node.op != "placeholder":
            session.refuse("its forward asks for the type of a value it computed")
        session.asked_for_type = True
        return session.kind

    def __setattr__(self: Any, name: str, value: Any) -> None:
        if name not in ("root", "attr", "node", "_node", "tracer"):
            _session(self).refuse(f"its forward sets the attribute {name} of a value")
        object.__setattr__(self, name, value)


class _Value(_Checks, fx.Proxy):
    """A proxy that claims to be of the kind that is traced."""

    def __getattr__(self, name: str) -> Any:
        if _session(self).in_hasattr:
            _session(self).refuse("its forward asks whether a value has an attribute")
        return _Attribute(self, name)


class _Attribute(_Checks, Attribute):
    pass


def _in_place(name: str) -> Any:
    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", IN_PLACE_FUNCTIONS[name], (self, other), {})

    return method


def _unsupported(name: str) -> Any:
    def method(self: Any, *_: Any) -> Any:
        _session(self).refuse(f"its forward calls {name} of a value")

    return method


def _in_place_function(name: str) -> Callable[[Any, Any], Any]:
    apply = getattr(operator, name)

    def function(value: Any, other: Any) -> Any:
        return apply(value, other)

    function.__name__ = function.__qualname__ = f"in_place_{name[1:]}"
    return function


# fx writes `x += y` for operator.iadd and binds a name anew, which is wrong for values that are immutable.
IN_PLACE_FUNCTIONS = {name: _in_place_function(name) for name in IN_PLACE}
for _name in (*IN_PLACE, "iand", "ior", "ixor", "ifloordiv", "imod", "ipow", "imatmul"):
    setattr(_Value, f"__{_name}__", (_in_place if _name in IN_PLACE else _unsupported)(_name))
for _name in ("__setitem__", "__delitem__", "__copy__", "__deepcopy__", "__contains__"):
    setattr(_Value, _name, _unsupported(_name))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, session: _Session) -> None:
        super().__init__()
        self.session = session

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.session.inline

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        values = [self.create_proxy("placeholder", name, (), {}) for name in self.session.arguments]

        def run(*values: Any) -> Any:
            with self.session.watching():
                return root_fn(self.root, *values)

        return run, values

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:  # fx would make it a dict
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, dict) and type(a) is not dict:
            self.session.refuse(f"its forward passes on a {type(a).__name__}")
        return super().create_arg(a)


def _why_not_call(name: str, code: types.CodeType) -> str | None:
    """Why a forward that calls a Python function of the module ``name`` cannot be traced."""
    top = name.partition(".")[0]
    if top == "torch":
        allowed = f"{name}.".startswith(_TORCH)
    else:
        allowed = top in _STANDARD or (top != "numpy" and top not in sys.stdlib_module_names)
    if not allowed:
        return f"its forward calls {name}.{code.co_name}"
    if not _is_torch(name) and top not in _STANDARD and _asks_for_exact_type(code):
        return f"{code.co_name} calls type()"
    return None


@functools.cache
def _asks_for_exact_type(code: types.CodeType) -> bool:
    return any(
        step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval == "type"
        for step in dis.get_instructions(code)
    )


def _why_not_builtin(function: Any) -> str | None:
    """As :func:`_why_not_call`, of a function that is written in C."""
    name = getattr(function, "__name__", "")
    module = getattr(function, "__module__", None)
    if module is None:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
            return f"its forward calls {owner.__name__}.{name}"
        module = owner.__name__ if isinstance(owner, types.ModuleType) else type(owner).__module__
    top = str(module).partition(".")[0]
    asks = top == "torch" and name.startswith(_QUERIES)
    if asks or top in _C_MODULES or (top == "builtins" and name in _BUILTINS):
        return f"its forward calls {module}.{name}"
    return None
