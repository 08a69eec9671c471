"""Rewrites the graph of a model in eval mode for inference.

In this order: constants are computed, identities go, operations in place become ordinary ones (so that nodes
may move), views become reshapes, batch norms are folded and what follows a convolution goes into its epilogue
(folding.py); at the end, operations are made in place where nobody can tell.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .. import functional as F
from ..graph.guards import Untraceable
from ..graph.op_tables import (
    IDENTITIES,
    LAYOUT,
    OUT_OF_PLACE,
    RANDOM,
    argument,
    global_mean,
    is_in_place,
    name_of,
    out_of_place,
    plain_kind,
    replace_pool,
    uses,
)
from ..nn import REPLACES
from .editor import GraphEditor
from .folding import fold_and_fuse
from .layers import Call, FrozenBatchNormAct, InPlaceActivation, Kept, PackedConv, PackedLinear

# What gives other results in channels_last than in the memory format that the model was written for.
_LAYOUT_QUESTIONS = frozenset(
    ["stride", "is_contiguous", "as_strided", "storage_offset", "data_ptr", "numpy"]
)


def rewrite(editor: GraphEditor, parts: dict[str, nn.Module]) -> dict[str, Any]:
    """Rewrite the graph for inference.

    Args:
        parts: what replaces children that could not be traced, by their targets.

    Returns:
        The modules that the graph calls and the tensors that it reads, by their new names.

    Raises:
        Untraceable: the graph cannot stand for the model in another memory format.
    """
    editor.graph.eliminate_dead_code(is_impure_node=lambda node: _is_impure(editor, node))
    fold_constants(editor)
    drop_identities(editor)
    make_functional(editor)
    free_of_layout(editor, parts)
    replace_pools(editor)
    fold_and_fuse(editor)
    return_changed(editor)
    overwrite(editor)
    keep_rest(editor, parts)
    return editor.made


def _is_impure(editor: GraphEditor, node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    drawn = name_of(node).rstrip("_").removesuffix("_like") in RANDOM  # advances the generator
    unknown = node.op == "call_module" and not plain_kind(editor.module(node)).__module__.startswith(
        "torch.nn"
    )
    return bool(editor.aliasing.writes.get(node)) or drawn or unknown


def fold_constants(editor: GraphEditor) -> None:
    """Compute what depends on no argument, unless somebody writes to it or is given its memory."""
    aliasing = editor.gather()
    output = next(node for node in reversed(editor.graph.nodes) if node.op == "output")
    given = set().union(*(aliasing.roots[node] for node in output.all_input_nodes), frozenset())
    values: dict[fx.Node, Any] = {}
    for node in list(editor.graph.nodes):
        if node.op == "get_attr":
            if not aliasing.writers(node):
                values[node] = editor.constant(node)
        elif node.op in ("call_function", "call_method") and node.meta.get("constant"):
            known = all(source in values for source in node.all_input_nodes)
            own = aliasing.roots[node] & given
            if known and not own and not aliasing.writers(node):
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                if node.op == "call_method":
                    values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
                else:
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    for node, value in values.items():
        if node.op == "get_attr" or not isinstance(value, Tensor):
            continue
        if all(user in values and isinstance(values[user], Tensor) for user in node.users):
            continue
        name = editor.fresh(node.name)
        editor.trace.constants[name] = value
        with editor.graph.inserting_before(node):
            new = editor.graph.create_node("get_attr", name)
        new.meta = {key: node.meta[key] for key in ("type", "constant", "shape", "dtype") if key in node.meta}
        node.replace_all_uses_with(new)
    for node in reversed(list(editor.graph.nodes)):
        if node in values and not node.users:
            editor.graph.erase_node(node)
    editor.gather()


def drop_identities(editor: GraphEditor) -> None:
    for node in list(editor.graph.nodes):
        kind = editor.kind(node)
        gone = kind in IDENTITIES
        if node.op == "call_function":
            name = name_of(node)
            depth = name == "stochastic_depth" and str(node.target.__module__).startswith("torchvision.")  # type: ignore
            drops = "dropout" in name and getattr(TF, name, None) is node.target
            gone = (depth or drops) and argument(node, "training", 3 if depth else 2, True) is False
        if name_of(node) in LAYOUT and node.meta.get("same") and editor.aliasing.writers(node):
            gone = True  # others know the tensor too, and are to know it in any memory format
        source = node.args[0] if node.args else None
        if gone and isinstance(source, fx.Node):
            node.replace_all_uses_with(source)
            editor.graph.erase_node(node)
    editor.gather()


def make_functional(editor: GraphEditor) -> None:
    """Turn operations in place into ordinary ones whose later readers read the result.

    Where another value shares the memory and is read afterwards, the operation stays as it is.
    """
    graph, nodes = editor.graph, list(editor.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    aliasing = type(editor.aliasing)((), editor.effect)
    argument_of = {node: node for node in nodes if node.op == "placeholder"}
    for node in nodes:
        source = node.args[0] if node.args else None
        module = editor.module(node)
        if isinstance(source, fx.Node) and is_in_place(node, module) and _keeps_type(node, source):
            read_later = any(
                position[user] > position[node]
                for other in aliasing.sharing(source)
                if other is not source
                for user in other.users
            )
            read_later |= any(
                value is not source and value in aliasing.sharing(source) for value in editor.changed.values()
            )
            own = all(
                isinstance(root, fx.Node) and root.op != "placeholder" for root in aliasing.roots[source]
            )
            if not read_later and (own or source in argument_of) and _replace_in_place(editor, node):
                if source in argument_of:
                    argument_of[node] = argument_of[source]
                    editor.changed[argument_of[node]] = node
                node.meta.pop("wrote", None)
                node.meta.pop("shares", None)
                source.replace_all_uses_with(
                    node, delete_user_cb=lambda user, at=position[node]: position[user] > at
                )
        aliasing.add(node)
    graph.lint()
    editor.gather()


def _keeps_type(node: fx.Node, source: fx.Node) -> bool:
    """Whether the result out of place has the type that the memory has."""
    if name_of(node).rstrip("_") in RANDOM:
        return False
    dtype = source.meta.get("dtype")
    others = [other for other in node.all_input_nodes if other is not source]
    plain = all(other.meta.get("dtype", dtype) == dtype for other in others)
    numbers = [a for a in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(a, complex)]
    real = dtype is not None and dtype.is_floating_point
    return plain and real and not numbers and node.meta.get("shape") == source.meta.get("shape")


def _replace_in_place(editor: GraphEditor, node: fx.Node) -> bool:
    """Make a node compute into new memory; whether it can."""
    if node.op == "call_module":
        ordinary = copy.copy(editor.module(node))
        ordinary.inplace = False
        # The report and errors know it by its own path.
        name = f"{node.target}.out_of_place"
        editor.modules[name] = ordinary
        node.meta["layer"] = editor.path(node)
        node.target = name
        return True
    target = out_of_place(node)
    if target is None:
        return False
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
    elif node.target not in OUT_OF_PLACE and node.op == "call_function":
        node.args = tuple(False if value is True else value for value in node.args)
    node.target = target
    return True


def free_of_layout(editor: GraphEditor, parts: dict[str, nn.Module]) -> None:
    """Let the graph run in channels_last: views become reshapes.

    Raises:
        Untraceable: what remains in place reaches memory that depends on the layout whether it is shared, or
            the forward asks for the layout.
    """
    aliasing = editor.aliasing
    for node in list(editor.graph.nodes):
        if node.op in ("call_function", "call_method") and name_of(node) in _LAYOUT_QUESTIONS:
            raise Untraceable(f"its forward calls {name_of(node)}, which depends on the memory format")
        for root in aliasing.writes[node]:
            if isinstance(root, str):
                raise Untraceable(f"its forward changes {root} in place")
            shared = [other for other in editor.graph.nodes if root in aliasing.roots[other]]
            if any(other in aliasing.by_layout for other in shared):
                raise Untraceable(
                    f"its forward changes in place ({node.name}) what a change of memory format may copy"
                )
    if any(node.op == "placeholder" and aliasing.writers(node) for node in aliasing.order):
        _copy_inputs(editor)
    _check_opaque(editor, parts)
    for node in list(editor.graph.nodes):
        if name_of(node).rstrip("_").removesuffix("_like") in RANDOM and node.op != "get_attr":
            _draw_in_order(editor, node)
    for node in editor.graph.nodes:
        sizes = node.args[1:] if node.op == "call_method" and node.target == "view" else ()
        if sizes and not any(isinstance(size, torch.dtype) for size in sizes):
            node.target = "reshape"


def _check_opaque(editor: GraphEditor, parts: dict[str, nn.Module]) -> None:
    """A child that runs as it is, and changes its arguments, has to be given the memory that others read."""
    for node in editor.graph.nodes:
        part = parts.get(str(node.target)) if node.op == "call_module" else None
        if part is not None and editor.aliasing.writes[node]:
            kept = _kept(editor, str(node.target), parts)
            if kept.contiguous or kept.own != kept.dtype:
                raise Untraceable(f"{editor.path(node)}, which cannot be traced, changes its input")


def _draw_in_order(editor: GraphEditor, node: fx.Node) -> None:
    """Random numbers go to elements in the order of memory, so it has to be the model's."""
    for source in node.all_input_nodes:
        if len(source.meta.get("shape", ())) > 3 and source.meta["contiguous"] and not is_in_place(node):
            with editor.graph.inserting_before(node):
                ordered = editor.graph.call_method("contiguous", (source,))
            ordered.meta = {**source.meta, "wrote": (), "shares": ()}
            node.replace_input_with(source, ordered)
    editor.gather()


def _copy_inputs(editor: GraphEditor) -> None:
    """Let the graph change copies of the arguments, which are copied back at its end."""
    for node in list(editor.graph.nodes):
        if node.op == "placeholder" and editor.aliasing.writers(node):
            with editor.graph.inserting_after(node):
                copied = editor.graph.call_method("clone", (node,))
            copied.meta = dict(node.meta)
            editor.changed.setdefault(node, copied)
            node.replace_all_uses_with(copied, delete_user_cb=lambda user, own=copied: user is not own)
    editor.gather()


def replace_pools(editor: GraphEditor) -> None:
    for node in list(editor.graph.nodes):
        module = editor.module(node)
        if module is not None:
            ours = REPLACES.get(editor.kind(node) or nn.Module)
            if ours is not None:
                editor.tell(node, type(module).__name__, f"pooling_ext.{ours.__name__}")
                module.__class__ = ours
        elif replace_pool(node) is None and len(node.meta.get("shape_in") or ()) == 4:
            mean = global_mean(node)
            if mean is not None:
                node.op, node.target = "call_function", F.global_avg_pool2d
                node.args, node.kwargs = (node.args[0], mean.keepdim), {}


def return_changed(editor: GraphEditor) -> None:
    """Give what the arguments have become as further results, in the arguments' order."""
    output = next(node for node in reversed(editor.graph.nodes) if node.op == "output")
    order = [node for node in editor.graph.nodes if node in editor.changed]
    output.args = ((*output.args[0], *(editor.changed[node] for node in order)),)  # type: ignore[misc]


def overwrite(editor: GraphEditor) -> None:
    """Work in place where the memory is read for the last time."""
    graph, aliasing = editor.graph, editor.gather()
    calls = Counter(str(node.target) for node in aliasing.order)

    def is_last_reader(node: fx.Node, source: fx.Node) -> bool:
        owns = isinstance(editor.module(source), (PackedConv, PackedLinear, FrozenBatchNormAct)) or (
            source.op == "call_function" and source.target in (operator.add, torch.add, torch.cat)
        )
        if not owns or uses(node, source) != 1 or aliasing.roots[source] != {source}:
            return False
        last = aliasing.order[node]
        return all(
            aliasing.order[user] <= last and (user is node or other is source)
            for other in aliasing.sharing(source)
            for user in other.users
        )

    for node in list(graph.nodes):
        layer = editor.module(node)
        adds = isinstance(layer, PackedConv) and layer.residual == "add"
        if adds and calls[str(node.target)] == 1 and is_last_reader(node, node.args[1]):  # type: ignore
            layer.overwrite_residual()
        activation = editor.activation(node)
        if activation is not None and activation.name != "gelu":
            source = node.args[0]
            if isinstance(source, fx.Node) and is_last_reader(node, source):
                name = editor.add(node.name, InPlaceActivation(activation))
                editor.substitute(node, node, name, (source,), node.name)


def keep_rest(editor: GraphEditor, parts: dict[str, nn.Module]) -> None:
    """Bring what is left along, in the dtype."""
    shared: dict[str, str] = {}
    for node in list(editor.graph.nodes):
        target = str(node.target)
        if node.op == "call_module" and target not in editor.made:
            node.meta.setdefault("layer", editor.path(node))
            if target not in shared:
                shared[target] = editor.add(target, _kept(editor, target, parts))
            node.target = shared[target]
        elif node.op == "get_attr":
            if target not in shared:
                shared[target] = editor.add(target, _constant(editor, node))
            node.target = shared[target]
        elif node.op == "call_function" and (_is_ours(node) or not node.all_input_nodes):
            if node.all_input_nodes:
                call = Call(node.target)  # type: ignore[arg-type]
            else:
                call = Call(node.target, tuple(node.args), dict(node.kwargs))  # type: ignore[arg-type]
                node.args, node.kwargs = (), {}
            node.meta.setdefault("layer", node.name)
            node.op, node.target = "call_module", editor.add(node.name, call)


def _is_ours(node: fx.Node) -> bool:
    """Whether torch.fx would run a function, not call it in a graph, when it reads the graph back."""
    name = str(getattr(node.target, "__module__", ""))
    return (
        name.startswith("pooling_ext.graph")
        or node.target is operator.setitem
        or (
            name.partition(".")[0] not in ("torch", "_operator", "builtins", "pooling_ext", "math")
            and not isinstance(node.target, type)
            and getattr(node.target, "__module__", None) is not None
        )
    )


def _kept(editor: GraphEditor, target: str, parts: dict[str, nn.Module]) -> Any:
    module = parts.get(target) or editor.modules[target]
    if target in parts or not type(module).__module__.startswith(("torch.nn", "pooling_ext")):
        own = next((p.dtype for p in module.parameters() if p.is_floating_point()), editor.dtype)
        return Kept(module, own, editor.dtype or own, asks_for_layout(module))
    return module if editor.dtype is None else module.to(editor.dtype)


def _constant(editor: GraphEditor, node: fx.Node) -> Any:
    value = editor.constant(node)
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    statistics = any(name_of(user) == "batch_norm" for user in node.users)  # which stay float32
    if value.is_floating_point() and editor.dtype is not None and not statistics:
        value = value.to(editor.dtype)
    return value


def asks_for_layout(module: nn.Module) -> bool:
    """Whether the code of a module, or of one in it, may depend on its input's memory format."""
    names = {*_LAYOUT_QUESTIONS, "view", "contiguous"}
    for child in module.modules():
        if type(child).__module__.startswith(("torch.nn", "pooling_ext")):
            continue
        for member in vars(type(child)).values():
            code = getattr(member, "__code__", None)
            if code is not None and not names.isdisjoint(code.co_names):
                return True
    return False
