"""Traces a module's forward into a torch.fx graph, and says on what the graph depends.

patch traces one module at a time, with its children as leaves, and puts the graph in place of the forward as
long as everything that the forward read is what it was (:func:`trace`); for freeze see example_tracer.py. The
forward runs on copies (recorder.py) and its calls are watched (purity.py), so tracing changes nothing that
others see. torch.fx's own tracer is not used: it replaces methods of nn.Module for the whole process.
"""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.proxy import Scope, TracerBase
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ArgumentError
from .guards import Untraceable
from .proxies import Value
from .purity import Watcher
from .recorder import Recorder

_lock = threading.RLock()  # functions that torch.fx.wrap names are wrapped while a forward is traced


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
    module: nn.Module,
    base: type,
    inline: Mapping[str, Callable[[Any], bool]] | None = None,
    norm: type | None = None,
) -> list[Trace]:
    """Trace the forward that ``module`` has as a ``base``, in each mode and for each kind of argument.

    Args:
        module: stays as it is.
        base: a class of it.
        inline: paths of children that are to be traced into, and what has to be true of them.
        norm: a batch norm of torch.nn whose forward, where that of ``base`` calls it, makes a node.

    Raises:
        Untraceable: with the reason.
    """
    traces: list[Trace] = []
    kinds: list[type] = [Tensor]
    for kind in kinds:
        modes = [module.training]
        for mode in modes:
            tracer = _LeafTracer(module, base, mode, kind, dict(inline or {}), norm)
            try:
                traces.append(tracer.trace())
            except Untraceable:
                if kind is Tensor:  # otherwise the first kind is what there is
                    raise
                continue
            if tracer.read_training and len(modes) == 1:
                modes.append(not mode)
            if tracer.asked_for_type and list not in kinds and len(traces[-1].arguments) == 1:
                kinds.append(list)
    return traces


class Tracer(TracerBase):
    """Runs a forward on recording copies and proxies.

    Args:
        module: whose forward it is.
        base: the class that has the forward.
        strict: see :class:`Watcher`.
        norm: see :class:`Recorder`.
    """

    def __init__(self, module: nn.Module, base: type, strict: bool, norm: type | None = None) -> None:
        self.graph = fx.Graph()
        self.scope = Scope("", None)
        self.module_stack = OrderedDict()
        self.node_name_to_scope = {}
        self.module = module
        self.problem: str | None = None
        self.watcher = Watcher(self.refuse, strict)
        self.recorder = Recorder(self, module, base, norm)
        self._attributes: dict[str, fx.Proxy] = {}

    def refuse(self, why: str) -> NoReturn:
        self.problem = self.problem or why
        raise Untraceable(why)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def attribute(self, path: str, value: Tensor) -> Any:
        """The parameter or buffer ``value`` of the module, which the forward reads."""
        if path not in self._attributes:
            self._attributes[path] = self.create_proxy("get_attr", path, (), {})
        return self._attributes[path]

    def is_constant(self, value: Any) -> bool:
        """Whether a value is known to be the same in each call."""
        return False

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:  # torch.fx would make it a dict
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, dict) and type(a) is not dict:
            self.refuse(f"its forward passes on a {type(a).__name__}")
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return self.create_node("call_function", type(a), tuple(map(self.create_arg, a)), {})
        return super().create_arg(a)

    def run(self, forward: Callable[[], Any], mode: Any) -> Any:
        """What the forward gives; raises Untraceable where no graph can stand for it."""
        with _lock, _wrapped_functions():
            self.recorder.start()
            try:
                with mode, self.watcher.watching():
                    result = forward()
            except (Untraceable, ArgumentError):
                raise
            except Exception as error:
                raise Untraceable(self.problem or f"torch.fx cannot trace it: {first_line(error)}") from error
            if self.problem is not None:
                raise Untraceable(self.problem)
            changed = self.recorder.changes()
            if changed is not None:
                raise Untraceable(changed)
        return result


class _LeafTracer(Tracer):
    """Traces one module with its children as leaves, for :func:`trace`."""

    def __init__(
        self, module: nn.Module, base: Any, training: bool, kind: type, inline: dict, norm: type | None
    ) -> None:
        super().__init__(module, base, strict=True, norm=norm)
        self.base, self.training, self.kind, self.inline = base, training, kind, inline
        self.watcher.formats = norm is not None  # of its graph nothing but the batch norm and more is used
        self.arguments = _required_arguments(base.forward)
        self.asked_for_type = False
        self.recorder.root.__dict__["training"] = training

    @property
    def read_training(self) -> bool:
        return ("", "training") in self.recorder.reads

    def trace(self) -> Trace:
        values = [self.create_proxy("placeholder", name, (), {}) for name in self.arguments]
        result = self.run(lambda: self.base.forward(self.recorder.root, *values), _NoOperators())
        self.create_node("output", "output", (self.create_arg(result),), {})
        calls = [str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")]
        conditions, constants = self.recorder.conditions(self.inline, calls)
        training = self.training if self.read_training else None
        return Trace(self.graph, self.arguments, self.kind, training, conditions, constants)

    def call_module(self, copy: nn.Module, args: tuple, kwargs: dict) -> Any:
        path, _ = self.recorder.paths[id(copy)]
        if path in self.inline:
            return copy.forward(*args, **kwargs)
        return self.create_proxy("call_module", path, args, kwargs)

    def type_of(self, value: Value) -> type:
        if value.node.op != "placeholder":
            self.refuse("its forward asks for the type of a value it computed")
        self.asked_for_type = True
        return self.kind


class _NoOperators(TorchDispatchMode):
    """Refuses what runs on real tensors: the trace would keep its result as a constant."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable(f"its forward computes {func} from no argument of it")


@contextmanager
def _wrapped_functions() -> Iterator[None]:
    """Let the functions that torch.fx.wrap names make nodes; to other threads they are as before."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for (_, name), namespace in list(getattr(_symbolic_trace, "_wrapped_fns_to_patch", {}).items()):
            function = namespace.get(name)
            if callable(function):
                replaced.append((namespace, name, function))
                namespace[name] = _symbolic_trace._create_wrapped_func(function)
        yield
    finally:
        for namespace, name, function in replaced:
            namespace[name] = function


def _required_arguments(forward: Any) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    required = [
        p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if not required or any(p.kind is p.KEYWORD_ONLY for p in required):
        raise Untraceable("its forward has no positional argument without a default")
    return tuple(p.name for p in required)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
