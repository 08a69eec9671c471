"""Traces a module's forward into a torch.fx graph, and says on what the graph depends.

Two users: patch traces one module at a time, with its children as leaves, and puts the graph in place of the
forward as long as everything that the forward read is what it was (:func:`trace`). freeze traces as far down
as torch.nn's modules, computing along on an example, and runs the result beside the model
(:func:`trace_example`). The forward runs on copies (recorder.py) and its calls are watched (purity.py), so
tracing changes nothing that others see. torch.fx's own tracer is not used: it replaces methods of nn.Module
for the whole process.
"""

from __future__ import annotations

import inspect
import itertools
import pickle
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx import _symbolic_trace
from torch.fx.proxy import Scope, TracerBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ArgumentError
from .guards import Untraceable
from .op_tables import RANDOM
from .proxies import HintedValue, Value
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


@dataclass(frozen=True)
class ExampleTrace:
    """A forward as a graph, with what it computed on an example.

    Attributes:
        graph: one placeholder for each leaf of the arguments that is a tensor; its output is the tuple of the
            result's leaves. Nodes have ``meta``: "type", of what they give; for a tensor "shape", "dtype" and
            "contiguous"; "in_order" and "channels_last", by the strides of all tensors that they give;
            "shape_in", the shape of the first argument; "constant", whether it depends on no argument;
            "wrote" and "shares", the nodes whose memory it was seen to change and to share; "same", whether
            it gave its first argument itself.
        constants: tensors that are no parameters or buffers, by the names that the graph gives them.
        opaque: for each child that could not be traced: why, and the arguments it was called with.
        spec: how the result's leaves are nested.
        same: for each leaf, which placeholder's tensor it is, or None.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    opaque: dict[str, tuple[str, Any]]
    spec: Any
    same: list[int | None]


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
            tracer = _LeafTracer(module, base, mode, kind, dict(inline or {}))
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


def trace_example(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], is_leaf: Callable[[nn.Module], bool]
) -> ExampleTrace:
    """Trace ``module`` down to its leaves, on an example; children that cannot be traced are leaves too.

    Args:
        module: in eval mode; it may be called, but is not changed.
        args, kwargs: what its forward takes.
        is_leaf: whether a child is called in the graph, not traced into.

    Raises:
        Untraceable: its own forward cannot be traced; with the reason.
        ArgumentError: it does not take the example; the message names the layer.
    """
    return _ExampleTracer(module, is_leaf).trace(args, kwargs)


class _Tracer(TracerBase):
    """Runs a forward on recording copies and proxies.

    Args:
        module: whose forward it is.
        base: the class that has the forward.
        strict: see :class:`Watcher`.
    """

    def __init__(self, module: nn.Module, base: type, strict: bool) -> None:
        self.graph = fx.Graph()
        self.scope = Scope("", None)
        self.module_stack = OrderedDict()
        self.node_name_to_scope = {}
        self.module = module
        self.problem: str | None = None
        self.watcher = Watcher(self.refuse, strict)
        self.recorder = Recorder(self, module, base)
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
                raise Untraceable(
                    self.problem or f"torch.fx cannot trace it: {_first_line(error)}"
                ) from error
            if self.problem is not None:
                raise Untraceable(self.problem)
            changed = self.recorder.changes()
            if changed is not None:
                raise Untraceable(changed)
        return result


class _LeafTracer(_Tracer):
    """Traces one module with its children as leaves, for :func:`trace`."""

    def __init__(self, module: nn.Module, base: Any, training: bool, kind: type, inline: dict) -> None:
        super().__init__(module, base, strict=True)
        self.base, self.training, self.kind, self.inline = base, training, kind, inline
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


class _ExampleTracer(_Tracer):
    """Traces as far as the leaves and computes along, for :func:`trace_example`."""

    def __init__(self, module: nn.Module, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__(module, type(module), strict=False)
        self.is_leaf = is_leaf
        self.constants: dict[str, Tensor] = {}
        self.opaque: dict[str, tuple[str, Any]] = {}
        self._names: dict[int, str] = {}
        self._changing: set[int | None] = set()  # memory of constants into which something else is written
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self._names.setdefault(id(tensor), name)

    def trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExampleTrace:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        values = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                value = self.create_proxy("placeholder", f"input_{len(values)}", (), {})
                self._note(value, leaf, constant=False)
                leaf = value
            values.append(leaf)
        args, kwargs = pytree.tree_unflatten(values, spec)
        root: Any = self.recorder.root
        if "forward" in root.__dict__:
            raise Untraceable("it has a forward of its own")
        before = _drawn_elsewhere()
        result = self.run(lambda: root.forward(*args, **kwargs), _Recording(self))
        if _drawn_elsewhere() != before:
            raise Untraceable("its forward draws random numbers that are not PyTorch's")
        leaves, spec = pytree.tree_flatten(result)
        try:
            self.create_node("output", "output", (tuple(map(self.create_arg, leaves)),), {})
        except NotImplementedError as error:
            raise Untraceable(f"its forward returns what torch.fx cannot pass on: {error}") from error
        places = {id(value.hint): i for i, value in enumerate(filter(_is_value, values))}
        same = [places.get(id(leaf.hint)) if _is_value(leaf) else None for leaf in leaves]
        return ExampleTrace(self.graph, self.constants, self.opaque, spec, same)

    def type_of(self, value: Any) -> type:
        return type(value.hint)

    def proxy(self, node: fx.Node) -> HintedValue:
        return HintedValue(node, self)

    def is_constant(self, value: Any) -> bool:
        return _is_value(value) and bool(value.node.meta.get("constant"))

    def to_bool(self, obj: Any) -> bool:
        if obj.node.meta.get("constant"):
            return bool(obj.hint)
        return super().to_bool(obj)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            name = self._names.get(id(a))
            if name is None:
                name = f"constant_{len(self.constants)}"
                self.constants[name] = a  # which also keeps its id its own
                self._names[id(a)] = name
            node = self.create_node("get_attr", name, (), {})
            self._describe(node, a, constant=True)
            return node
        return super().create_arg(a)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> Any:
        # What the tracer does itself is not the model's doing.
        with self.watcher.paused(), torch._C.DisableTorchFunction():
            value: Any = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
            if kind != "placeholder":
                self._follow(value, kind, target, args, kwargs)
                if kind != "get_attr" and value.node.meta["constant"] and _is_plain(value.hint):
                    hint = value.hint  # as good as the value
                    self.graph.erase_node(value.node)
                    return hint
        return value

    def _follow(
        self, value: HintedValue, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Compute a node's value on the example, and note what is to be seen there."""
        given = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, fx.Proxy)]
        before = [_version(a.hint) for a in given]
        try:
            hint = self._compute(kind, target, args, kwargs)
        except Exception:
            self.graph.erase_node(value.node)  # an error that the model may catch
            raise
        meta = value.node.meta
        meta["wrote"] = tuple(
            a.node for a, version in zip(given, before, strict=True) if _version(a.hint) != version
        )
        memory = {_storage(leaf) for leaf in pytree.tree_leaves(hint)} - {None}
        meta["shares"] = tuple(a.node for a in given if _storage(a.hint) in memory) if memory else ()
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        drawn = kind == "call_module" or name.rstrip("_").removesuffix("_like") in RANDOM
        sources = value.node.all_input_nodes
        constant = not drawn and all(source.meta.get("constant") for source in sources)
        read = {_storage(a.hint) for a in given} - {None}
        if not constant and meta["wrote"]:
            self._changing |= {_storage(a.hint) for a in given if a.node in meta["wrote"]} - {None}
        self._note(value, hint, constant and self._changing.isdisjoint(read), args)

    def _compute(self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a node gives on the example."""
        args, kwargs = pytree.tree_map(lambda a: a.hint if isinstance(a, fx.Proxy) else a, (args, kwargs))
        if kind == "get_attr":
            return _get_attr(self.module, target)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        if kind == "call_function":
            return target(*args, **kwargs)
        try:
            return self.module.get_submodule(target)(*args, **kwargs)
        except Exception as error:
            why = f"model does not take example: {target}: {_first_line(error)}"
            raise ArgumentError(why) from error

    def _note(self, value: HintedValue, hint: Any, constant: bool, args: tuple[Any, ...] = ()) -> None:
        value.hint = hint
        self._describe(value.node, hint, constant)
        first = args[0] if args else None
        if isinstance(first, fx.Proxy):
            value.node.meta["shape_in"] = first.node.meta.get("shape")
            value.node.meta["same"] = isinstance(hint, Tensor) and hint is first.hint

    def _describe(self, node: fx.Node, hint: Any, constant: bool) -> None:
        steps = [x.stride() for x in pytree.tree_leaves(hint) if _storage(x) is not None and x.dim() > 2]
        node.meta |= {"type": type(hint), "constant": constant}
        node.meta["in_order"] = bool(steps) and all(map(_descends, steps))
        node.meta["channels_last"] = bool(steps) and all(len(s) == 4 and s[1] == 1 for s in steps)
        if isinstance(hint, Tensor):
            contiguous = hint.layout is torch.strided and hint.is_contiguous()
            node.meta |= {"shape": tuple(hint.shape), "dtype": hint.dtype, "contiguous": contiguous}

    def call_module(self, copy: nn.Module, args: tuple, kwargs: dict) -> Any:
        path, module = self.recorder.paths[id(copy)]
        if self.is_leaf(module) or isinstance(module, torch.jit.ScriptModule):
            return self.create_proxy("call_module", path, args, kwargs)
        last = self.graph._root.prev
        problem = self.problem
        try:
            if "forward" in copy.__dict__:
                raise Untraceable("it has a forward of its own")
            return copy.forward(*args, **kwargs)
        except ArgumentError:
            raise
        except Exception as error:
            why = self.problem if isinstance(error, Untraceable) else _first_line(error)
            self.problem = problem
            self.watcher.resume()
            self._erase_after(last, error)
            given = pytree.tree_map(lambda a: a.hint if isinstance(a, fx.Proxy) else a, (args, kwargs))
            self.opaque.setdefault(path, (f"cannot be traced: {why or error}", given))
            return self.create_proxy("call_module", path, args, kwargs)

    def _erase_after(self, last: fx.Node, error: Exception) -> None:
        while self.graph._root.prev is not last:
            node = self.graph._root.prev
            if node.users:
                raise error  # what the child computed is in use elsewhere
            self._attributes = {
                path: value for path, value in self._attributes.items() if value.node is not node
            }
            self.graph.erase_node(node)


class _Recording(TorchFunctionMode):
    """Makes nodes of functions whose arguments are no proxies: constants, new tensors, random numbers."""

    def __init__(self, tracer: _ExampleTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.tracer.watcher.active:
            return func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return fx.Proxy.__torch_function__(func, types, args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return func(*args, **kwargs)
        if name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__")):
            self.tracer.refuse(f"its forward changes a tensor that it keeps, by {name}")
        if torch.overrides.is_tensor_method_or_property(func):
            result = self.tracer.create_proxy("call_method", name, args, kwargs)
        else:
            result = self.tracer.create_proxy("call_function", func, args, kwargs)
        if not isinstance(result, HintedValue) or _has_tensor(result.hint):
            return result
        hint = result.hint  # torch.finfo, a dtype, a question: as good as the value
        self.tracer.graph.erase_node(result.node)
        return hint


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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, or a nest of numbers."""
    if type(value) in (tuple, list, torch.Size):
        return all(map(_is_plain, value))
    return type(value) in (bool, int, float)


def _drawn_elsewhere() -> Any:
    """The states of generators whose numbers a graph does not draw."""
    return random.getstate(), pickle.dumps(np.random.get_state(legacy=False))


def _has_tensor(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(tree))


def _is_value(x: Any) -> bool:
    return isinstance(x, HintedValue)


def _version(x: Any) -> int | None:
    """How often a tensor was written to."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None


def _descends(steps: tuple[int, ...]) -> bool:
    return all(one >= other for one, other in itertools.pairwise(steps))


def _storage(x: Any) -> int | None:
    """What tensors have in common that share memory."""
    if not isinstance(x, Tensor) or x.layout is not torch.strided or x.numel() == 0:
        return None
    return x.untyped_storage()._cdata


def _get_attr(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
