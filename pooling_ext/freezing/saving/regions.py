"""A frozen graph as data: its nodes, its layers, and how it is called."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ...errors import ArgumentError
from ..layers import Call, Kept
from ..region import Input, Outputs, Region
from ..signature import Signature
from . import layers, operators
from .values import Decoder, Encoder, Fields, Unsupported, device

_OPS = ("placeholder", "get_attr", "call_function", "call_method", "call_module", "output")


def encode(region: Region, encoder: Encoder) -> tuple[dict[str, Any], list[str]]:
    """A region as data, and what of it has no such form: where that is, and what it is."""
    problems: list[str] = []

    def attempt(where: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Unsupported as error:
            problems.append(f"{where}: {error}")

    graph = region.graph.graph
    made: dict[str, Any] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op in ("call_module", "get_attr") and name not in made:
            layer = getattr(region.graph, name)
            path = _described(region.layers.get(name, name), layer)
            if not _is_layer_name(name):
                problems.append(f"{path}: its name is none that files may have")
            made[name] = attempt(path, lambda layer=layer: layers.encode(layer, encoder))
    nodes = [attempt(node.name, lambda node=node: _encode_node(node, encoder)) for node in graph.nodes]
    data = {
        "name": type(region.graph).__name__,
        "dtype": encoder.value(region.dtype),
        "device": str(region.device),
        "inputs": [list(want) for want in region.inputs],
        "paths": region.layers,
        "layers": made,
        "nodes": nodes,
        "signature": attempt("its arguments", lambda: _encode_signature(region.signature, encoder)),
        "outputs": attempt("its results", lambda: _encode_outputs(region.outputs, encoder)),
    }
    return data, problems


def _described(path: str, layer: Any) -> str:
    kept = layer.module if isinstance(layer, Kept) else layer
    own = isinstance(kept, nn.Module) and not isinstance(kept, Call)
    return f"{path} ({type(kept).__name__})" if own else path


def decode(data: Fields, decoder: Decoder, winograd_bytes: int) -> tuple[Region, dict[str, str]]:
    """The region that data stand for; by their paths, why convolutions do not run as they did elsewhere.

    Args:
        winograd_bytes: what weights may take that are transformed for Winograd's kernels.

    Raises:
        ArgumentError: the data stand for none, or for one that does not run here.
    """
    where = device(data.get("device", str))
    paths = data.get("paths", dict)
    if any(type(path) is not str for path in paths.values()):
        raise ArgumentError(f"{data.where}: paths must be strings")
    reader = layers.LayerReader(decoder)
    made = {}
    for name, layer in data.get("layers", dict).items():
        if not _is_layer_name(name):
            raise ArgumentError(f"{data.where}: {name!r} is no name of a layer")
        made[name] = reader.read(name, paths.get(name, name), layer)
    reader.settle(winograd_bytes)
    inputs = [_decode_input(entry) for entry in data.items("inputs", list)]
    graph = _decode_graph(data.items("nodes", dict), made, len(inputs))
    signature = _decode_signature(Fields(data.get("signature"), "signature"), decoder)
    if signature.constants.count(None) != len(inputs):
        raise ArgumentError(f"signature: it has {signature.constants.count(None)} tensors, not {len(inputs)}")
    outputs = _decode_outputs(Fields(data.get("outputs"), "outputs"), decoder, len(inputs))
    dtype = decoder.value(data.get("dtype"))
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(f"dtype must be a floating one or None, but got {dtype}")
    (output,) = (node for node in graph.nodes if node.op == "output")
    if len(output.args[0]) != len(outputs.contiguous) + len(outputs.changed):  # type: ignore[arg-type]
        raise ArgumentError(f"outputs: the graph gives {len(output.args[0])} values")  # type: ignore[arg-type]
    module = fx.GraphModule(made, graph, data.get("name", str))
    region = Region(module, dtype, where, inputs, dict(paths), signature, outputs)
    return region, {paths.get(name, name): why for name, why in reader.changed.items()}


def _is_name(name: Any) -> bool:
    """Whether code may have it as a name as it stands, and no more than that."""
    return type(name) is str and name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


def _is_layer_name(name: Any) -> bool:
    """Whether code may have it between quotes, as torch.fx writes what is no name of Python's."""
    plain = type(name) is str and name != "" and name.isprintable() and set("\"'\\.").isdisjoint(name)
    return plain and not hasattr(fx.GraphModule, name) and not hasattr(nn.Module(), name)


# --- nodes -------------------------------------------------------------------------------------------------


def _encode_node(node: fx.Node, encoder: Encoder) -> dict[str, Any]:
    target: Any = node.target
    if node.op == "call_function":
        target = operators.name_of(target)
        problem = operators.attribute_problem(node.args, node.kwargs) if node.target is getattr else None
        if problem is not None:
            raise Unsupported(problem)
    elif node.op == "call_method" and not operators.is_method(target):
        raise Unsupported(f"it calls the method {target}")
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": encoder.value(node.args),
        "kwargs": encoder.value(node.kwargs),
    }


def _decode_graph(nodes: list[Any], made: dict[str, Any], inputs: int) -> fx.Graph:
    graph = fx.Graph()
    decoder = Decoder({})  # arguments of nodes are no tensors
    for position, node in enumerate(nodes):
        data = Fields(node, f"node {position}")
        op, name, target = data.get("op", str), data.get("name", str), data.get("target", str)
        data.where = name
        if op not in _OPS or not _is_name(name) or name in decoder.nodes:
            raise ArgumentError(f"node {position}: {op!r} {name!r} is no node")
        if (op == "output") != (position == len(nodes) - 1):
            raise ArgumentError(f"{name}: a graph has one output, at its end")
        args, kwargs = decoder.value(data.get("args")), decoder.value(data.get("kwargs"))
        if type(args) is not tuple or type(kwargs) is not dict or not all(map(_is_name, kwargs)):
            raise ArgumentError(f"{name}: args must be a tuple, and kwargs a dict")
        known = _target(data, op, target, made, args, kwargs)
        decoder.nodes[name] = graph.create_node(op, known, args, kwargs, name)
    given = sum(node.op == "placeholder" for node in graph.nodes)
    if not nodes or given != inputs:
        raise ArgumentError(f"the graph has {given} inputs, not {inputs}")
    return graph


def _target(data: Fields, op: str, target: str, made: dict[str, Any], args: tuple, kwargs: dict) -> Any:
    """What a node calls or reads.

    Raises:
        ArgumentError: it may not.
    """
    where = data.where
    if op == "call_function":
        try:
            function = operators.function_named(target)
        except ArgumentError as error:
            raise ArgumentError(f"{where}: {error}") from error
        problem = operators.attribute_problem(args, kwargs) if function is getattr else None
        if problem is not None:
            raise ArgumentError(f"{where}: {problem}, which no frozen model does")
        return function
    if op == "call_method":
        fits = operators.is_method(target) and bool(args)
    elif op == "output":
        fits = len(args) == 1 and isinstance(args[0], tuple) and not kwargs
    elif op == "placeholder":
        fits = _is_name(target) and not args and not kwargs
    else:
        calls = isinstance(made.get(target), nn.Module)
        fits = target in made and calls == (op == "call_module") and (calls or not (args or kwargs))
    if not fits:
        raise ArgumentError(f"{where}: {op} of {target!r} is nothing that a frozen model does")
    return target


# --- calls -------------------------------------------------------------------------------------------------


def _decode_input(entry: list[Any]) -> Input:
    types = [type(value) for value in entry]
    if types[:3] != [str, int, bool] or types[3:] not in ([int], [type(None)]):
        raise ArgumentError(f"inputs: {entry!r} is none")
    return Input(*entry)


def _encode_signature(signature: Signature, encoder: Encoder) -> dict[str, Any]:
    parameters = []
    for parameter in signature.parameters.parameters.values():
        entry: dict[str, Any] = {"name": parameter.name, "kind": parameter.kind.name}
        if parameter.default is not parameter.empty:
            entry["default"] = encoder.value(parameter.default)
        parameters.append(entry)
    return {
        "parameters": parameters,
        "nest": encoder.value(pytree.tree_unflatten(list(range(len(signature.constants))), signature.spec)),
        "constants": encoder.value(signature.constants),
        "plain": signature.plain,
        "count": signature.count,
    }


def _decode_signature(data: Fields, decoder: Decoder) -> Signature:
    parameters = []
    for entry in data.items("parameters", dict):
        fields = Fields(entry, data.where)
        name, kind = fields.get("name", str), fields.get("kind", str)
        if not _is_name(name) or kind not in inspect._ParameterKind.__members__:
            raise ArgumentError(f"signature: {kind} {name!r} is no parameter")
        default = decoder.value(entry["default"]) if "default" in entry else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, inspect._ParameterKind[kind], default=default))
    try:
        inspect.Signature(parameters)
    except ValueError as error:
        raise ArgumentError(f"signature: {error}") from error
    constants = decoder.value(data.get("constants"))
    if type(constants) is not list or any(c is not None and type(c) is not tuple for c in constants):
        raise ArgumentError("signature: constants must be a list")
    spec = _spec(decoder.value(data.get("nest")), len(constants), data.where)
    return Signature.restored(parameters, spec, constants, data.get("plain", bool), data.get("count", int))


def _encode_outputs(outputs: Outputs, encoder: Encoder) -> dict[str, Any]:
    nest = pytree.tree_unflatten(list(range(len(outputs.contiguous))), outputs.spec)
    return {
        "nest": encoder.value(nest),
        "contiguous": outputs.contiguous,
        "changed": outputs.changed,
        "same": [list(pair) for pair in outputs.same],
    }


def _decode_outputs(data: Fields, decoder: Decoder, inputs: int) -> Outputs:
    contiguous, changed = data.items("contiguous", bool), data.items("changed", int)
    same: list[int | None] = [None] * len(contiguous)
    for pair in data.items("same", list):
        if len(pair) != 2 or pair[0] not in range(len(same)) or pair[1] not in range(inputs):
            raise ArgumentError(f"outputs: same has {pair!r}")
        same[pair[0]] = pair[1]
    if any(position not in range(inputs) for position in changed):
        raise ArgumentError(f"outputs: changed is {changed!r} of {inputs} arguments")
    spec = _spec(decoder.value(data.get("nest")), len(contiguous), data.where)
    return Outputs(spec, contiguous, changed, same)


def _spec(nest: Any, count: int, where: str) -> Any:
    """How ``count`` values are nested, from their numbers in a nest."""
    numbers, spec = pytree.tree_flatten(nest)
    if numbers != list(range(count)):
        raise ArgumentError(f"{where}: the nest has {numbers}, not the numbers of {count} values")
    return spec
