"""Traces a forward as far down as torch.nn's modules, computing along on an example; for freeze."""

from __future__ import annotations

import itertools
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import ArgumentError
from .guards import Untraceable
from .op_tables import RANDOM
from .proxies import HintedValue
from .tracer import Tracer, first_line


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


class _ExampleTracer(Tracer):
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
        positions = {id(value.hint): i for i, value in enumerate(filter(_is_value, values))}
        same = [positions.get(id(leaf.hint)) if _is_value(leaf) else None for leaf in leaves]
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
            why = f"model does not take example: {target}: {first_line(error)}"
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
        # An attribute's node is made when it is first used; were that in the child, it might be erased again.
        self.create_arg((args, kwargs))
        last = self.graph._root.prev
        problem = self.problem
        try:
            if "forward" in copy.__dict__:
                raise Untraceable("it has a forward of its own")
            return copy.forward(*args, **kwargs)
        except ArgumentError:
            raise
        except Exception as error:
            why = self.problem if isinstance(error, Untraceable) else first_line(error)
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
