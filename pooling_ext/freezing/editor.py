"""The graph of a model in eval mode while passes rewrite it, with the modules that it calls."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..graph.activations import MODULES, Activation, function_activation
from ..graph.aliasing import Aliasing
from ..graph.example_tracer import ExampleTrace
from ..graph.op_tables import Addition, Effect, addition, effect, is_hooked, is_in_place, plain_kind
from ..graph.report import FusionReport
from .layers import FrozenBatchNormAct, InPlaceActivation, PackedConv, PackedLinear

_LAYERS = (PackedConv, PackedLinear, FrozenBatchNormAct)


class GraphEditor:
    """A traced graph and what its nodes are.

    Args:
        root: the module that was traced, a private copy in eval mode.
        trace: its graph.
        dtype: to compute in; None keeps each layer's own.
        path_of: turns a target in the graph into the dotted path in the whole model.
        report: is told what became of each layer.

    Attributes:
        made: the modules and tensors that the rewritten graph calls and reads, by their new names.
        changed: the arguments that the model changes in place, and what they become.
        aliasing: facts about memory, of the graph as it was when they were last gathered.
    """

    def __init__(
        self,
        root: nn.Module,
        trace: ExampleTrace,
        dtype: torch.dtype | None,
        path_of: Callable[[str], str],
        report: FusionReport,
    ):
        self.root, self.trace, self.graph, self.dtype = root, trace, trace.graph, dtype
        self.path_of, self.report = path_of, report
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.made: dict[str, Any] = {}
        self.changed: dict[fx.Node, fx.Node] = {}
        self.aliasing = self.gather()

    def gather(self) -> Aliasing:
        """Facts about memory of the graph as it is now."""
        self.aliasing = Aliasing(self.graph.nodes, self.effect)
        return self.aliasing

    def effect(self, node: fx.Node) -> Effect:
        module = self.module(node)
        if isinstance(module, _LAYERS):
            overwrites = isinstance(module, PackedConv) and module.residual == "overwrite"
            return Effect((), tuple(node.all_input_nodes[1:]) if overwrites else ())
        if isinstance(module, InPlaceActivation):
            return Effect(tuple(node.all_input_nodes), tuple(node.all_input_nodes))
        return effect(node, module)

    # --- reading ---------------------------------------------------------------------------------

    def path(self, node: fx.Node) -> str:
        return self.path_of(str(node.target))

    def module(self, node: fx.Node | None) -> Any:
        """The module that a node calls."""
        if node is None or node.op != "call_module":
            return None
        target = str(node.target)
        return self.made.get(target) or self.modules.get(target)

    def kind(self, node: fx.Node | None) -> type | None:
        """The class of torch.nn whose forward, and nothing else, a node runs."""
        module = self.module(node)
        return None if module is None or is_hooked(module) else plain_kind(module)

    def constant(self, value: Any) -> Tensor | None:
        """The parameter, buffer or constant that a node reads, if it keeps its value."""
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        name = str(value.target)
        found = self.made.get(name, self.trace.constants.get(name))
        return operator.attrgetter(name)(self.root) if found is None else found

    def activation(self, node: fx.Node | None) -> Activation | None:
        """What a node applies to its only tensor, in new memory."""
        if node is None or is_in_place(node, self.module(node)):
            return None
        kind = self.kind(node)
        if kind is not None:
            return MODULES[kind](self.module(node)) if kind in MODULES and len(node.args) == 1 else None
        return function_activation(node)

    def addition(self, node: fx.Node | None) -> Addition | None:
        """The sum of two tensors of one shape that a node computes in new memory."""
        found = addition(node)
        if found is None or found.in_place:
            return None
        shape = found.left.meta.get("shape")
        return found if shape is not None and shape == found.right.meta.get("shape") else None

    # --- writing ---------------------------------------------------------------------------------

    def fresh(self, path: str) -> str:
        """A name for what is made of the module at ``path``."""
        base = name = path.replace(".", "_") if not path[:1].isdigit() else f"_{path.replace('.', '_')}"
        count = 1
        while name in self.made or name in self.modules or hasattr(nn.Module, name):
            count += 1
            name = f"{base}_{count}"
        return name

    def add(self, path: str, layer: Any) -> str:
        name = self.fresh(path)
        self.made[name] = layer
        return name

    def substitute(self, at: fx.Node, last: fx.Node, name: str, args: tuple, path: str) -> fx.Node:
        """Call ``name`` just before ``at``, in place of ``last`` and what led to it."""
        with self.graph.inserting_before(at):
            new = self.graph.create_node("call_module", name, args)
        kept = {key: value for key, value in last.meta.items() if key not in ("wrote", "shares")}
        new.meta = {**kept, "layer": path, "shape_in": args[0].meta.get("shape")}
        self.aliasing.replace(last, new, at)
        last.replace_all_uses_with(new)
        self.changed = {of: new if node is last else node for of, node in self.changed.items()}
        self.erase(last, keep=new)
        return new

    def erase(self, last: fx.Node, keep: fx.Node | None = None) -> None:
        """Drop ``last`` and, from there backwards, what nobody reads any more."""
        stack = [last]
        while stack:
            node = stack.pop()
            if node.users or node is keep or node._erased or node.op == "placeholder":
                continue
            if self.aliasing.writes.get(node) and node is not last:
                continue
            sources = [s for s in node.all_input_nodes if keep is None or s not in keep.all_input_nodes]
            self.graph.erase_node(node)
            stack += sources

    def tell_norm(self, path: str | None) -> None:
        """Note that a batch norm is no operation of its own any more."""
        if path is not None:
            self.report.folded.add(path)

    def tell(self, node: fx.Node, what: str, why: str) -> None:
        self.report.replace(self.path(node), what, why)
