"""Which values of a graph may share memory, and who may change it between two places."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from .op_tables import Effect


class Aliasing:
    """Facts about the memory of a graph's values.

    A value's roots stand for the memory that it may be in: the node that made it, the parameter or buffer
    that it is, or, for all arguments together, the first of them (they may share memory).

    Args:
        nodes: the graph's, in order; more may be added.
        effect: what each of them does; to it comes what was seen on an example (``meta``: "wrote", "shares").
    """

    def __init__(self, nodes: Iterable[fx.Node], effect: Callable[[fx.Node], Effect]) -> None:
        self.effect = effect
        self.order: dict[fx.Node, int] = {}
        self.roots: dict[fx.Node, frozenset[Any]] = {}
        self.writes: dict[fx.Node, frozenset[Any]] = {}
        #: Nodes whose value shares the memory of an argument in some layouts alone.
        self.by_layout: set[fx.Node] = set()
        self._inputs: fx.Node | None = None
        self._sharing: dict[Any, list[fx.Node]] = {}
        for node in nodes:
            self.add(node)

    def add(self, node: fx.Node) -> None:
        """Take up a node after all that are known."""
        done = self.effect(node)
        shares = (*done.shares, *node.meta.get("shares", ()))
        writes = (*done.writes, *node.meta.get("wrote", ()))
        if node.op == "placeholder":
            self._inputs = self._inputs or node
            own: Any = self._inputs
        else:
            own = str(node.target) if node.op == "get_attr" else node
        self.order[node] = len(self.order)
        self.roots[node] = self._union(shares) or frozenset((own,))
        self.writes[node] = self._union(writes)
        if done.by_layout and shares:
            self.by_layout.add(node)
        for root in self.roots[node]:
            self._sharing.setdefault(root, []).append(node)

    def replace(self, old: fx.Node, new: fx.Node, at: fx.Node) -> None:
        """Know ``new``, which stands at the place of ``at``, as what gives the value of ``old``."""
        self.order[new], self.roots[new], self.writes[new] = self.order[at], self.roots[old], frozenset()
        for root in self.roots[new]:
            self._sharing.setdefault(root, []).append(new)

    def sharing(self, value: fx.Node) -> list[fx.Node]:
        """The nodes whose value may share memory with that of ``value``, and ``value``."""
        return list(dict.fromkeys(node for root in self.roots[value] for node in self._sharing[root]))

    def _union(self, nodes: Iterable[fx.Node]) -> frozenset[Any]:
        return frozenset().union(*(self.roots[node] for node in nodes if node in self.roots))

    def writers(self, value: fx.Node) -> list[fx.Node]:
        """The nodes that may change the memory of ``value``, in order."""
        roots = self.roots[value]
        return [node for node, written in self.writes.items() if not written.isdisjoint(roots)]

    def unchanged(
        self, value: fx.Node, since: fx.Node, until: fx.Node, besides: Iterable[fx.Node] = ()
    ) -> bool:
        """Whether ``value`` may be read at ``until`` instead of ``since``: nothing between may change it."""
        first, last = self.order[since], self.order[until]
        skipped = set(besides)
        return all(not first < self.order[node] < last or node in skipped for node in self.writers(value))
