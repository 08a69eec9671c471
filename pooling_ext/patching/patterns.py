"""Finds in a traced forward what our operators take together, and puts them into its graph."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as TF
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook

from ..graph.activations import RELU, function_activation
from ..graph.aliasing import Aliasing
from ..graph.op_tables import (
    POOL_NAMES,
    Effect,
    addition,
    argument,
    effect,
    global_mean,
    is_global,
    is_in_place,
    name_of,
    only_user,
    replace_pool,
    unchanged_class,
)
from ..ops.conv_choice import STANDS_FOR
from .fused_calls import (
    ADDS,
    AVG_POOLS,
    BATCH_NORMS,
    MAX_POOLS,
    RELUS,
    Add,
    AddPoolChain,
    BatchNormChain,
    GlobalAvgPool,
    MaxPool,
    calls_only_forward,
)

BASE = "_pooling_ext_base"  # the attribute of a fused class that holds what it stands for
_MAX_POOL_ARGUMENTS = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}


def base_class(cls: type) -> type | None:
    """The class that a fused class stands for, or None if ``cls`` is no fused class."""
    return cls.__dict__.get(BASE)


def plain_class(module: nn.Module) -> type:
    cls = type(module)
    return base_class(cls) or cls.__dict__.get(STANDS_FOR, cls)


def worth_fusing(module: nn.Module) -> bool:
    """Whether there is probably something to fuse in a module that could not be traced."""
    if any(isinstance(child, BATCH_NORMS) for child in module.children()):
        return True
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and not POOL_NAMES.isdisjoint(code.co_names)


class Fused(NamedTuple):
    """A chain: its steps, the operator that takes them, and the path of the convolution in it."""

    steps: str
    operator: str
    conv: str | None = None


def rewrite(graph: fx.Graph, module: nn.Module, exact: bool) -> Iterator[Fused]:
    """Replace the chains in ``graph``.

    Args:
        exact: whether Winograd is left out.
    """
    nodes = list(graph.nodes)
    match = _Match(module, nodes, exact)
    # From the end, so that of two that are added, the one that is computed last takes the addition.
    norms = [node for node in reversed(nodes) if match.is_module(node, BATCH_NORMS)]
    yield from reversed([match.batch_norm(node) for node in norms])
    _let_defer(graph)
    for node in nodes:
        if node not in match.taken:
            name = _function_name(node)
            pooled = match.add_pool(node)
            if pooled is None and (ours := replace_pool(node)) is not None:
                pooled = Fused(name, ours)
            if pooled is not None:
                yield pooled


def sequentials_to_inline(graph: fx.Graph, module: nn.Module) -> list[str]:
    """Paths of the Sequentials that end in a batch norm whose output goes into an addition only."""
    match = _Match(module, list(graph.nodes))
    paths: list[str] = []
    for node in match.order:
        operands = [value for value in node.args if isinstance(value, fx.Node) and match.add(node, value)]
        if any(match.is_module(value, BATCH_NORMS) for value in operands):
            continue
        for value in sorted(operands, key=match.places.__getitem__, reverse=True):
            found = match.ends_in_batch_norm(value) if only_user(value) is node else []
            if found:
                paths += found
                break
    return paths


def is_plain_sequential(module: Any) -> bool:
    """Whether calling ``module`` just calls its children."""
    cls = type(module)
    return (
        getattr(cls.__dict__.get(BASE, cls), "forward", None) is nn.Sequential.forward
        and calls_only_forward(module)
        and not _has_any_global_hook()
    )


def _let_defer(graph: fx.Graph) -> None:
    """Tell each chain whose output goes into the convolution of one other chain alone which that is."""
    for node in graph.nodes:
        user = only_user(node)
        if not (_is_conv_chain(node) and _is_conv_chain(user)):
            continue
        conv, *_, input = user.args[: _INPUT_AT + 1]
        if input is node and node.target.add is None:
            with graph.inserting_before(node):
                following = graph.create_node("get_attr", conv.target)
            node.kwargs = {"following": following}


#: Where a chain's input stands among its arguments, after its modules.
_INPUT_AT = 4


def _is_conv_chain(node: fx.Node | None) -> bool:
    """Whether ``node`` calls a chain with a convolution and without a pooling."""
    if node is None or not isinstance(node.target, BatchNormChain):
        return False
    conv, _, _, pool, *_ = node.args
    return conv is not None and pool is None and node.target.pool is None


class _Match:
    def __init__(self, module: nn.Module, nodes: list[fx.Node], exact: bool = False) -> None:
        self.module, self.exact = module, exact
        self.order = nodes
        self.places = {node: place for place, node in enumerate(nodes)}
        self.taken: set[fx.Node] = set()
        self.aliasing = Aliasing(nodes, self._effect)

    def _effect(self, node: fx.Node) -> Effect:
        # Other children may be replaced later, so nothing is known of them.
        if self.is_module(node, (nn.Conv2d, *BATCH_NORMS, *MAX_POOLS)):
            return Effect()
        return effect(node)

    def is_module(self, node: Any, kinds: tuple[type, ...]) -> bool:
        """Whether ``node`` calls a module of these classes, or one as good as them, with one argument."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs or len(node.args) != 1:
            return False
        return isinstance(node.args[0], fx.Node) and unchanged_class(type(self._child(node))) in kinds

    def _child(self, node: fx.Node) -> nn.Module:
        return self.module.get_submodule(str(node.target))

    def _unchanged(self, value: fx.Node, since: fx.Node, chain: list[fx.Node]) -> bool:
        """Whether ``chain`` may read ``value`` at its end instead of at ``since``."""
        return self.aliasing.unchanged(value, since, chain[-1], besides=chain)

    def _called_within(self, bn: fx.Node, chain: list[fx.Node]) -> bool:
        """Whether something calls the batch norm again before ``chain`` ends, which moves its call there."""
        norm = self._child(bn)
        between = self.order[self.places[bn] + 1 : self.places[chain[-1]]]
        return any(norm in self._child(node).modules() for node in between if node.op == "call_module")

    def _written_after(self, value: fx.Node, node: fx.Node) -> bool:
        """Whether an operator changes ``value`` after ``node``; what a child does to it is its own affair."""
        return any(
            self.places[writer] > self.places[node]
            for writer in self.aliasing.writers(value)
            if writer.op != "call_module"
        )

    def batch_norm(self, bn: fx.Node) -> Fused:
        """Replace the longest chain around ``bn`` by one call."""
        source: Any = bn.args[0]
        conv = source if self.is_module(source, (nn.Conv2d,)) and only_user(source) is bn else None
        for tail in self._tails(bn):
            for chain in ([conv, *tail], tail) if conv else (tail,):
                added = self.add(chain[-1], bn) or self.add(chain[-2] if len(chain) > 1 else None, bn)
                at: Any = next((node for node in chain if added and added[1] in node.all_input_nodes), None)
                read: Any = chain[0].args[0]
                if (
                    self._unchanged(read, chain[0], chain)
                    and (added is None or self._unchanged(added[1], at, chain))
                    and not self._called_within(bn, chain)  # its running statistics move in order
                ):
                    return self._fuse(bn, chain, added)
        raise AssertionError("nothing happens between a batch norm and itself")

    def _tails(self, bn: fx.Node) -> Iterator[list[fx.Node]]:
        """The chains that start with ``bn``, longest first."""
        step = only_user(bn)
        if self.add(step, bn) is not None:
            after = only_user(step)
            if self._is_relu(after):
                yield [bn, step, after]
            yield [bn, step]
        elif self._is_relu(step):
            after = only_user(step)
            # Backward reads what was pooled, PyTorch's does not.
            if self._max_pool(after) is not None and not self._written_after(after, after):
                yield [bn, step, after]
            yield [bn, step]
        yield [bn]

    def ends_in_batch_norm(self, node: fx.Node) -> list[str]:
        """The path of the Sequential that ``node`` calls and those at its end, if a batch norm ends them."""
        if node.op != "call_module":
            return []
        path, child, paths = str(node.target), self._child(node), []
        while is_plain_sequential(child) and len(child):  # type: ignore[arg-type]
            paths.append(path)
            name, child = list(child.named_children())[-1]
            path = f"{path}.{name}"
        return paths if unchanged_class(type(child)) in BATCH_NORMS else []

    def _is_relu(self, node: fx.Node | None) -> bool:
        return _relu(node) is not None or self.is_module(node, (nn.ReLU,))

    def _fuse(self, bn: fx.Node, chain: list[fx.Node], added: Any) -> Fused:
        add, residual = added or (None, None)
        conv = chain[0] if chain[0] is not bn else None
        relu = next((node for node in chain if self._is_relu(node)), None)
        relu_function = _relu(relu)
        pool = self._max_pool(chain[-1])
        pool_function = pool if isinstance(pool, MaxPool) else None
        modules = [conv, bn, None if relu_function else relu, None if pool_function else pool]
        inputs = [chain[0].args[0], *([] if residual is None else [residual])]
        fused = "batch_norm_relu_max_pool" if pool else "conv_bn_act" if conv else "batch_norm_act"
        function = BatchNormChain(add, relu_function, pool_function, self.exact)
        path = None if conv is None else str(conv.target)
        return Fused(self._replace(chain, function, modules, inputs), fused, path)

    def add(self, node: fx.Node | None, value: fx.Node) -> tuple[Add, fx.Node] | None:
        """How ``node`` adds ``value`` to another, and that other."""
        found = addition(node)
        if found is None or value not in (found.left, found.right):
            return None
        # An addition in place to the other operand shows outside.
        if found.in_place and found.left is not value:
            return None
        return Add(ADDS[found.in_place], found.left is not value), found.other(value)

    def _max_pool(self, node: fx.Node | None) -> Any:
        """``node`` if it is a max pooling module, its MaxPool if it is a function, else None."""
        if node is None:
            return None
        if self.is_module(node, MAX_POOLS):
            child: Any = self._child(node)
            return None if child.return_indices else node
        if node.op != "call_function" or node.target not in (TF.max_pool2d, torch.max_pool2d):
            return None
        arguments = dict(zip(_MAX_POOL_ARGUMENTS, node.args[1:], strict=False)) | dict(node.kwargs)
        if arguments.pop("return_indices", False) or len(node.all_input_nodes) != 1:
            return None
        arguments = _MAX_POOL_ARGUMENTS | arguments
        arguments["stride"] = arguments["stride"] or None
        return MaxPool(tuple(_as_tuple(value) for value in arguments.values()))

    def add_pool(self, pool: fx.Node) -> Fused | None:
        function = _global_avg_pool(pool)
        if function is None:
            child: Any = self._child(pool) if self.is_module(pool, AVG_POOLS) else None
            if child is None or not is_global(child.output_size):
                return None
        relu = pool.args[0]
        if not isinstance(relu, fx.Node) or only_user(relu) is not pool:
            return None
        relu_function = _relu(relu)
        if relu_function is None and not self.is_module(relu, (nn.ReLU,)):
            return None
        node = relu.args[0]
        if not isinstance(node, fx.Node) or only_user(node) is not relu or node in self.taken:
            return None
        value: Any = node.args[0] if node.args else None
        added = self.add(node, value) if isinstance(value, fx.Node) else None
        if added is None:
            return None
        add, residual = added
        in_place = add.function is operator.iadd
        chain = [node, relu, pool]
        if in_place and not (self.aliasing.roots[value] == {value} and only_user(value) is node):
            return None
        if not all(self._unchanged(operand, node, chain) for operand in (value, residual)):
            return None
        if self._written_after(value, pool) or self._written_after(residual, pool):
            return None  # backward reads what was added
        call = AddPoolChain(add, function, relu_function)
        modules = [None if relu_function else relu, None if function else pool]
        return Fused(self._replace(chain, call, modules, [value, residual]), "add_relu_global_avg_pool")

    def _step_name(self, node: fx.Node) -> str:
        if node.op != "call_module":
            return _function_name(node)
        path = str(node.target)
        if path.rpartition(".")[2].isdecimal():  # in a Sequential
            return f"{type(self._child(node)).__name__}({path})"
        return path

    def _replace(
        self, chain: list[fx.Node], function: Any, modules: list[fx.Node | None], inputs: list[Any]
    ) -> str:
        graph = chain[-1].graph
        names = "-".join(self._step_name(node) for node in chain)
        with graph.inserting_before(chain[-1]):
            children = [node and graph.create_node("get_attr", str(node.target)) for node in modules]
            call = graph.create_node("call_function", function, (*children, *inputs))
        self.aliasing.replace(chain[-1], call, chain[-1])
        chain[-1].replace_all_uses_with(call)
        for node in reversed(chain):
            graph.erase_node(node)
        self.taken.update(chain)
        return names


def _function_name(node: fx.Node) -> str:
    name = name_of(node)
    return {"in_place_add": "add", "iadd": "add", "add_": "add", "relu_": "relu"}.get(name, name)


def _relu(node: fx.Node | None) -> Callable[[Any], Any] | None:
    """torch.relu or torch.relu_ if ``node`` calls one of them or its like."""
    if node is None or function_activation(node) != RELU:
        return None
    return RELUS[is_in_place(node)]


def _global_avg_pool(node: fx.Node) -> GlobalAvgPool | None:
    """The global average pooling that ``node`` calls as a function."""
    if not node.args or len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_function" and node.target is TF.adaptive_avg_pool2d:
        return GlobalAvgPool(True) if is_global(argument(node, "output_size", 1, None)) else None
    mean = global_mean(node)
    return None if mean is None else GlobalAvgPool(mean.keepdim, mean.dims)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
