"""Finds in a traced forward what our operators take together, and puts them into its graph."""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..graph.aliasing import Aliasing
from ..graph.op_tables import (
    BASE,
    POOL_NAMES,
    Effect,
    effect,
    is_global,
    only_user,
    replace_pool,
)
from ..ops import activations as kernels
from .fused_calls import AVG_POOLS, MAX_POOLS, AddPoolChain, BatchNormChain, MaxPool, step_activation
from .nodes import Nodes, function_name, global_avg_pool, relu_function


def base_class(cls: type) -> type | None:
    """The class that a fused class stands for, or None if ``cls`` is no fused class."""
    return cls.__dict__.get(BASE)


def worth_fusing(module: nn.Module) -> bool:
    """Whether there is probably something to fuse in a module that could not be traced."""
    if any(isinstance(child, _BatchNorm) for child in module.children()):
        return True
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and not POOL_NAMES.isdisjoint(code.co_names)


class Fused(NamedTuple):
    """A chain: its steps, the operator that takes them, and the paths of the modules in it."""

    steps: str
    operator: str
    conv: str | None = None
    norm: str | None = None


def rewrite(graph: fx.Graph, module: nn.Module, exact: bool) -> Iterator[Fused]:
    """Replace the chains in ``graph``.

    Args:
        exact: whether Winograd is left out.
    """
    nodes = list(graph.nodes)
    match = _Match(module, nodes, exact)
    # From the end, so that of two that are added, the one that is computed last takes the addition.
    norms = [node for node in reversed(nodes) if match.is_norm(node)]
    yield from reversed([match.batch_norm(node) for node in norms])
    _let_defer(graph)
    for node in nodes:
        if node not in match.taken:
            name = function_name(node)
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
        if any(match.is_norm(value) for value in operands):
            continue
        for value in sorted(operands, key=match.positions.__getitem__, reverse=True):
            found = match.ends_in_batch_norm(value) if only_user(value) is node else []
            if found:
                paths += found
                break
    return paths


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


class _Match(Nodes):
    def __init__(self, module: nn.Module, nodes: list[fx.Node], exact: bool = False) -> None:
        super().__init__(module)
        self.exact = exact
        self.order = nodes
        self.positions = {node: position for position, node in enumerate(nodes)}
        self.taken: set[fx.Node] = set()
        self.aliasing = Aliasing(nodes, self._effect)

    def _effect(self, node: fx.Node) -> Effect:
        # Other children may be replaced later, so nothing is known of them.
        if self.is_norm(node) or self.is_module(node, (nn.Conv2d, *MAX_POOLS)):
            return Effect()
        return effect(node)

    def _unchanged(self, value: fx.Node, since: fx.Node, chain: list[fx.Node]) -> bool:
        """Whether ``chain`` may read ``value`` at its end instead of at ``since``."""
        return self.aliasing.unchanged(value, since, chain[-1], besides=chain)

    def _called_within(self, bn: fx.Node, chain: list[fx.Node]) -> bool:
        """Whether something calls the batch norm again before ``chain`` ends, which moves its call there."""
        norm = self.child(bn)
        between = self.order[self.positions[bn] + 1 : self.positions[chain[-1]]]
        return any(norm in self.child(node).modules() for node in between if node.op == "call_module")

    def _written_after(self, value: fx.Node, node: fx.Node) -> bool:
        """Whether something changes ``value`` after ``node``, which children do not that do not say so."""
        return any(
            self.positions[writer] > self.positions[node]
            for writer in self.aliasing.writers(value)
            if writer.op != "call_module" or getattr(self.child(writer), "inplace", False)
        )

    def batch_norm(self, bn: fx.Node) -> Fused:
        """Replace the longest chain around ``bn`` by one call."""
        head = self._head(bn)
        for tail in self._tails(bn):
            for chain in ([*head, *tail], tail) if head else (tail,):
                additions = [(node, self.add(node, value)) for value, node in itertools.pairwise(chain)]
                at, added = next((pair for pair in additions if pair[1] is not None), (None, None))
                read: Any = chain[0].args[0]
                if (
                    self._unchanged(read, chain[0], chain)
                    and (added is None or self._unchanged(added[1], at, chain))  # type: ignore[arg-type]
                    and not self._called_within(bn, chain)  # its running statistics move in order
                ):
                    return self._fuse(bn, chain, at, added)
        raise AssertionError("nothing happens between a batch norm and itself")

    def _head(self, bn: fx.Node) -> list[fx.Node]:
        """The convolution before a batch norm, and what does nothing between them."""
        source: Any = bn.args[0]
        while self.passes(source):
            source = source.args[0]
        if not self.is_module(source, (nn.Conv2d,)):
            return []
        passed, user = self.after(source)
        return [source, *passed] if user is bn else []

    def _tails(self, bn: fx.Node) -> Iterator[list[fx.Node]]:
        """The chains that start with ``bn``, longest first."""
        tails, own = [[bn]], self.own_steps(bn)

        def extend(node: fx.Node | None = None) -> fx.Node | None:
            """Let the chain go on to ``node``, and to what does nothing after it; gives what is next."""
            if node is not None:
                tails.append([*tails[-1], node])
            passed, after = self.after(tails[-1][-1])
            for each in passed:
                tails.append([*tails[-1], each])
            return after

        step = extend()
        relu = [step_activation(each) for each in own] == [kernels.RELU]
        if not own:
            if self.add(step, tails[-1][-1]) is not None:
                step = extend(step)
                if self.activation(step) is not None:
                    extend(step)
            elif (activation := self.activation(step)) is not None:
                step, relu = extend(step), activation == kernels.RELU
        # Backward reads what was pooled, PyTorch's does not.
        if relu and self.max_pool(step) is not None and not self._written_after(step, step):  # type: ignore
            tails.append([*tails[-1], step])  # type: ignore[list-item]
        return reversed(tails)

    def _fuse(self, bn: fx.Node, chain: list[fx.Node], add: fx.Node | None, added: Any) -> Fused:
        conv = chain[0] if self.is_module(chain[0], (nn.Conv2d,)) else None
        pool = self.max_pool(chain[-1])
        act = next((node for node in chain if node is not bn and self.activation(node) is not None), None)
        steps = [conv, bn, add, act, chain[-1] if pool is not None else None]
        passed, gaps, position = [], [0] * len(steps), 0
        for node in chain:
            if node in steps:
                position = steps.index(node)
            else:
                passed.append(node)
                gaps[position] += 1
        function = self.function_step(act)
        pool_function = pool if isinstance(pool, MaxPool) else None
        modules = [conv, bn, None if function else act, None if pool_function else pool]
        how, residual = added or (None, None)
        call = BatchNormChain(
            how,
            function,
            self.activation(act) if function else kernels.IDENTITY,  # type: ignore[arg-type]
            pool_function,
            self.exact,
            self.steps(bn),
            tuple(gaps),
        )
        fused = "batch_norm_relu_max_pool" if pool else "conv_bn_act" if conv else "batch_norm_act"
        names = "-".join(name for node in steps if node is not None for name in self.names(node))
        inputs = [chain[0].args[0], residual] if residual is not None or passed else [chain[0].args[0]]
        self._replace(chain, call, modules, inputs, passed)
        return Fused(names, fused, None if conv is None else str(conv.target), str(bn.target))

    def add_pool(self, pool: fx.Node) -> Fused | None:
        function = global_avg_pool(pool)
        if function is None:
            child: Any = self.child(pool) if self.is_module(pool, AVG_POOLS) else None
            if child is None or not is_global(child.output_size):
                return None
        relu = pool.args[0]
        if not isinstance(relu, fx.Node) or only_user(relu) is not pool:
            return None
        rectifies = relu_function(relu)
        if rectifies is None and not self.is_module(relu, (nn.ReLU,)):
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
        call = AddPoolChain(add, function, rectifies)
        modules = [None if rectifies else relu, None if function else pool]
        self._replace(chain, call, modules, [value, residual], [])
        names = "-".join(name for step in chain for name in self.names(step))
        return Fused(names, "add_relu_global_avg_pool")

    def _replace(
        self,
        chain: list[fx.Node],
        function: Any,
        modules: list[fx.Node | None],
        inputs: list[Any],
        passed: list[fx.Node],
    ) -> None:
        """Call ``function`` in place of ``chain``, with children and inputs as its arguments."""
        graph = chain[-1].graph
        with graph.inserting_before(chain[-1]):
            children, more = (
                [node and graph.create_node("get_attr", str(node.target)) for node in nodes]
                for nodes in (modules, passed)
            )
            call = graph.create_node("call_function", function, (*children, *inputs, *more))
        self.aliasing.replace(chain[-1], call, chain[-1])
        chain[-1].replace_all_uses_with(call)
        for node in reversed(chain):
            graph.erase_node(node)
        self.taken.update(chain)
