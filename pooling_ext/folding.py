"""Rewrites the graph of a model in eval mode for inference: folds, fuses and prepacks.

The passes work on a torch.fx graph whose modules are a private copy, in this order: identities go,
operations in place become ordinary ones (so that nodes may move), batch norms are folded, and what follows a
convolution goes into its epilogue; at the end, operations are made in place where nobody can tell.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, fx, nn

from . import functional as F
from .nn import REPLACES
from .patching import PatchEntry, PatchReport
from .prepacked import (
    RELU,
    Activation,
    FrozenBatchNormAct,
    InPlaceActivation,
    Kept,
    PackedConv,
    PackedLinear,
)
from .recognition import (
    ACTIVATION_FUNCTIONS,
    ACTIVATION_MODULES,
    ADDS,
    CONVS,
    FRESH,
    IDENTITIES,
    INPLACE,
    POOLS,
    TRANSPOSED,
    Normalisation,
    folded,
    hooked,
    is_batch_norm,
    normalisation,
    padding,
)


class Freezer:
    """Rewrites one traced graph.

    Args:
        root: the module that was traced, a private copy in eval mode.
        graph: its graph; each tensor-valued node has ``meta["shape"]``.
        dtype: to compute in; None keeps each layer's own.
        path_of: turns a target in the graph into the dotted path in the whole model.
        report: is told what became of each layer.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        dtype: torch.dtype | None,
        path_of: Callable[[str], str],
        report: PatchReport,
    ):
        self.graph, self.dtype, self.path_of, self.report = graph, dtype, path_of, report
        self.modules = dict(root.named_modules())
        self.attributes = root
        self.made: dict[str, nn.Module] = {}
        self._shared: dict[Any, str] = {}
        self._moving = True
        graph.owning_module = None  # its modules are about to change

    def run(self) -> dict[str, nn.Module]:
        """Rewrite the graph; returns the modules that it calls, by their new names."""
        self._drop_identities()
        self._make_functional()
        self._replace_pools()
        for node in list(self.graph.nodes):
            # Nodes that a fusion has taken in are still listed here.
            if node.op == "call_module" and not node._erased:
                module = self.modules.get(node.target)
                if module is None or hooked(module):
                    continue
                if type(module) in (*CONVS, *TRANSPOSED, nn.Linear):
                    self._fuse(node, module)
                elif is_batch_norm(module):
                    self._batch_norm(node, module)
        self._overwrite()
        self._keep_the_rest()
        return self.made

    # --- reading the graph -----------------------------------------------------------------------

    def _path(self, node: fx.Node) -> str:
        return self.path_of(str(node.target))

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def _may_alias(self, node: fx.Node) -> bool:
        """Whether the node's value may share memory with another's."""
        if node.op == "call_module":
            module = self.made.get(str(node.target)) or self._module(node)
            what = type(module)
            ours = what.__module__.startswith(("torch.nn.", "pooling_ext."))
            return not ours or what in (Kept, nn.Flatten, nn.Unflatten, *IDENTITIES)
        if node.op not in ("call_function", "call_method"):
            return True
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return name not in FRESH

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        if len(node.users) != 1:
            return None
        user = next(iter(node.users))
        # Used twice by the same node (x * x) is not one use.
        return user if user.all_input_nodes.count(node) == 1 and _uses(user, node) == 1 else None

    def _activation(self, node: fx.Node | None) -> Activation | None:
        """What ``node`` applies to its only tensor."""
        if node is None:
            return None
        module = self._module(node)
        if module is not None:
            make = ACTIVATION_MODULES.get(type(module))
            return make(module) if make and not hooked(module) else None
        make = ACTIVATION_FUNCTIONS.get(node.target)
        if make is None or node.op not in ("call_function", "call_method") or len(node.all_input_nodes) != 1:
            return None
        try:
            return make(*node.args[1:], **node.kwargs)
        except (TypeError, ValueError):  # arguments that we do not know
            return None

    def _addends(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The two tensors of one shape that ``node`` adds; None also where nodes may not move."""
        if node.op not in ("call_function", "call_method") or node.target not in ADDS:
            return None
        if not self._moving or node.kwargs or len(node.args) != 2:
            return None
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
            return None
        shape = a.meta.get("shape")
        return (a, b) if shape is not None and shape == b.meta.get("shape") else None

    # --- passes ----------------------------------------------------------------------------------

    def _drop_identities(self) -> None:
        for node in list(self.graph.nodes):
            module = self._module(node)
            if module is not None:
                gone = type(module) in IDENTITIES and not hooked(module)
            else:
                name = getattr(node.target, "__name__", "")
                gone = node.op == "call_function" and (
                    name in ("stochastic_depth",) or ("dropout" in name and name in TF.__dict__)
                )
                gone = gone and not _argument(node, "training", 3 if name == "stochastic_depth" else 2, True)
            if gone and isinstance(node.args[0] if node.args else None, fx.Node):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                self.graph.erase_node(node)

    def _make_functional(self) -> None:
        """Turn operations in place into ordinary ones whose later readers read the result."""
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        # Read first: a module may be called several times.
        found = [(node, target) for node in order if (target := self._inplace_target(node)) is not None]
        for node, target in found:
            source = node.args[0]
            fresh = isinstance(source, fx.Node) and (
                source.op == "placeholder" or not self._may_alias(source)
            )
            if not fresh or any(map(self._may_alias, source.users)):
                self._moving = False  # someone else sees the change, so everything stays where it is
                continue
            if node.op == "call_module":
                twin = self.modules[target]
                twin.inplace = False  # type: ignore[assignment]
            else:
                node.target = target
                if "inplace" in node.kwargs:
                    node.kwargs = {**node.kwargs, "inplace": False}
            source.replace_all_uses_with(node, delete_user_cb=lambda user, at=order[node]: order[user] > at)

    def _inplace_target(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            return node.target if getattr(self._module(node), "inplace", False) else None
        if node.op == "call_function":
            if node.kwargs.get("inplace"):
                return node.target
            return INPLACE.get(node.target)
        name = str(node.target)
        if node.op == "call_method" and name[-1] == "_" and name[-2:] != "__" and name != "requires_grad_":
            return name[:-1]
        return None

    def _replace_pools(self) -> None:
        for node in list(self.graph.nodes):
            module = self._module(node)
            if module is not None:
                ours = REPLACES.get(type(module))
                if ours is not None:
                    module.__class__ = ours
                    self._tell(node, type(module).__name__, "ours")
            elif node.op == "call_function" and node.target in POOLS:
                node.target = POOLS[node.target]
            elif node.target in ("mean", torch.mean) and len(node.meta.get("shape_in", ())) == 4:
                dims = _argument(node, "dim", 1, None)
                keep = _argument(node, "keepdim", 2, False)
                known = not set(node.kwargs) - {"dim", "keepdim"}
                if known and isinstance(dims, (list, tuple)) and {d % 4 for d in dims} == {2, 3}:
                    node.op, node.target = "call_function", F.global_avg_pool2d
                    node.args, node.kwargs = (node.args[0], bool(keep)), {}

    def _fuse(self, node: fx.Node, module: Any) -> None:
        """Take what follows a convolution or linear layer into it."""
        path, parts, last = self._path(node), [type(module).__name__], node
        normalisations = []
        key: list[Any] = [node.target]
        user = self._only_user(last)
        while user is not None and (bn := self._module(user)) is not None and is_batch_norm(bn):
            if hooked(bn) or not _normalises_channels(module, node):
                break
            normalisations.append(normalisation(bn, self._path(user)))
            parts.append(f"{type(bn).__name__} {self._path(user)}")
            key.append(user.target)
            last, user = user, self._only_user(user)
        activation, residual = self._activation(user), None
        if activation is not None and user is not None:
            last = user
            parts.append(str(activation))
        elif type(module) in (nn.Conv2d, nn.Conv3d) and user is not None and (pair := self._addends(user)):
            residual = pair[1] if pair[0] is last else pair[0]
            last = user
            parts.append("add")
            after = self._only_user(last)
            if after is not None and self._activation(after) == RELU:
                activation, last = RELU, after
                parts.append("relu")
        before, own_padding = padding(module)
        if before is not None:
            self._pad(node, before, module.padding_mode)
        key += [activation, residual is not None, node.meta.get("shape_in")]
        name = self._shared.get(tuple(key))
        if name is None:
            layer = self._pack(module, normalisations, activation, residual is not None, own_padding, node)
            name = self._shared[tuple(key)] = self._add(str(node.target), layer)
        args = (node.args[0],) if residual is None else (node.args[0], residual)
        # A residual may be made after the convolution, so the sum is where both are there.
        at = node if residual is None else last
        self._substitute(at, last, name, args, path)
        self._tell(node, parts[0], ", ".join(parts[1:]) or "prepacked")

    def _pack(
        self,
        module: Any,
        normalisations: list[Normalisation],
        activation: Activation | None,
        residual: bool,
        own_padding: Sequence[int],
        node: fx.Node,
    ) -> nn.Module:
        dtype = self.dtype or module.weight.dtype
        transposed = type(module) in TRANSPOSED
        weight, bias = folded(module.weight, module.bias, normalisations, module if transposed else None)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        shape = node.meta.get("shape_in") or ()
        if type(module) is nn.Linear:
            rows = torch.Size(shape[:-1]).numel() if len(shape) > 1 else 1
            return PackedLinear(weight, bias, activation, rows)
        return PackedConv(
            weight,
            bias,
            module.stride,
            own_padding,
            module.dilation,
            module.groups,
            activation,
            "add" if residual else None,
            shape,
            module.output_padding if transposed else None,
        )

    def _pad(self, node: fx.Node, before: list[int], mode: str) -> None:
        with self.graph.inserting_before(node):
            mode = "constant" if mode == "zeros" else mode
            padded = self.graph.call_function(TF.pad, (node.args[0], before), {"mode": mode})
        node.args = (padded, *node.args[1:])

    def _batch_norm(self, node: fx.Node, module: nn.Module) -> None:
        """A batch norm that nothing takes in becomes one pass with what follows."""
        norm = normalisation(module, self._path(node))
        residual, last, parts = None, node, []
        user = self._only_user(node)
        relu = self._activation(user) == RELU
        if relu and user is not None:
            last = user
            parts.append("relu")
        elif user is not None and (pair := self._addends(user)):
            after = self._only_user(user)
            if after is not None and self._activation(after) == RELU:
                residual, last, relu = (pair[1] if pair[0] is node else pair[0]), after, True
                parts += ["add", "relu"]
        wide = torch.float64 if (self.dtype or norm.mean.dtype) == torch.float64 else torch.float32
        values = [None if x is None else x.detach().to(wide) for x in norm[:4]]
        layer = FrozenBatchNormAct(*values, norm.eps, relu)  # type: ignore[arg-type]
        name = self._add(str(node.target), layer)
        args = (node.args[0],) if residual is None else (node.args[0], residual)
        self._substitute(last, last, name, args, self._path(node))
        self._tell(node, type(module).__name__, ", ".join(["one pass", *parts]))

    def _overwrite(self) -> None:
        """Work in place where the memory is read for the last time."""
        order = {node: place for place, node in enumerate(self.graph.nodes)}
        calls = Counter(str(node.target) for node in order)

        def is_last_reader(node: fx.Node, source: fx.Node) -> bool:
            if not _owns_its_memory(source, self.made) or _uses(node, source) != 1:
                return False
            return all(
                order[user] <= order[node] and (user is node or not self._may_alias(user))
                for user in source.users
            )

        for node in list(self.graph.nodes):
            layer = self.made.get(str(node.target)) if node.op == "call_module" else None
            adds = isinstance(layer, PackedConv) and layer.packed and layer.residual == "add"
            if adds and calls[str(node.target)] == 1 and is_last_reader(node, node.args[1]):  # type: ignore
                layer.overwrite_residual()  # type: ignore[union-attr]
            activation = self._activation(node)
            if activation is not None and activation.name != "gelu":
                source = node.args[0]
                if isinstance(source, fx.Node) and is_last_reader(node, source):
                    name = self._add(node.name, InPlaceActivation(activation))
                    self._substitute(node, node, name, (source,), node.name)

    def _keep_the_rest(self) -> None:
        """Bring what is left along, in the dtype."""
        for node in self.graph.nodes:
            module = self._module(node)
            if module is not None and node.target not in self.made:
                target = str(node.target)
                node.meta["layer"] = self._path(node)
                if not type(module).__module__.startswith(("torch.nn", "pooling_ext")):
                    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), self.dtype)
                    module = Kept(module, own, self.dtype or own)
                elif self.dtype is not None:
                    module.to(self.dtype)
                name = self._shared.get(target) or self._add(target, module)
                self._shared[target] = node.target = name
            elif node.op == "get_attr":
                value = operator.attrgetter(str(node.target))(self.attributes)
                if isinstance(value, Tensor):
                    value = value.detach()
                    if value.is_floating_point() and self.dtype is not None:
                        value = value.to(self.dtype)
                name = self._fresh(str(node.target))
                self.made[name] = value  # type: ignore[assignment]
                node.target = name

    # --- writing the graph -----------------------------------------------------------------------

    def _fresh(self, path: str) -> str:
        path = path.removeprefix("model.")
        base = name = path.replace(".", "_") if not path[:1].isdigit() else f"_{path.replace('.', '_')}"
        count = 1
        while name in self.made or name in self.modules or hasattr(nn.Module, name):
            count += 1
            name = f"{base}_{count}"
        return name

    def _add(self, path: str, layer: nn.Module) -> str:
        name = self._fresh(path)
        self.made[name] = layer
        return name

    def _substitute(self, at: fx.Node, last: fx.Node, name: str, args: tuple, path: str) -> None:
        """Call ``name`` just before ``at``, in place of ``last`` and what led to it."""
        with self.graph.inserting_before(at):
            new = self.graph.create_node("call_module", name, args)
        new.meta = {**last.meta, "layer": path, "shape_in": args[0].meta.get("shape")}
        last.replace_all_uses_with(new)
        # From the end backwards, what nobody reads any more.
        stack = [last]
        while stack:
            node = stack.pop()
            if not node.users and node is not new and not node._erased and node.op != "placeholder":
                before = [source for source in node.all_input_nodes if source not in new.all_input_nodes]
                self.graph.erase_node(node)
                stack += before

    def _tell(self, node: fx.Node, what: str, why: str) -> None:
        self.report.replaced.append(PatchEntry(self._path(node), what, why))


def _argument(node: fx.Node, name: str, place: int, default: Any) -> Any:
    return node.kwargs.get(name, node.args[place] if len(node.args) > place else default)


def _uses(user: fx.Node, node: fx.Node) -> int:
    """How often ``node`` stands among the arguments of ``user``."""
    count = 0

    def visit(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is node
        return argument

    fx.map_arg((user.args, user.kwargs), visit)
    return count


def _owns_its_memory(node: fx.Node, made: dict[str, nn.Module]) -> bool:
    """Whether the node is known to have made its value, so that nothing else is there."""
    if node.op == "call_module":
        layer = made.get(str(node.target))
        return isinstance(layer, (PackedConv, PackedLinear, FrozenBatchNormAct))
    return node.op == "call_function" and node.target in (operator.add, torch.add, torch.cat)


def _normalises_channels(module: nn.Module, node: fx.Node) -> bool:
    """Whether a batch norm after ``module`` normalises what ``module`` calls its output channels."""
    return not isinstance(module, nn.Linear) or len(node.meta.get("shape", ())) == 2
