"""A traced and rewritten graph as a module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from ..errors import ArgumentError
from ..exporting import is_exporting, tracing_state
from . import plain
from .cuda_graphs import Graphs
from .layers import Call, PackedConv, PackedLinear
from .signature import Signature


class Input(NamedTuple):
    """What a region expects of an argument, and the layer that reads it."""

    layer: str
    rank: int
    floating: bool = False
    channels: int | None = None

    @classmethod
    def read_by(cls, node: fx.Node, x: Tensor, layers: dict[str, str], made: dict[str, nn.Module]) -> Input:
        """What the layer that reads the argument ``node``, like ``x``, asks of it."""
        layer, channels = "input", None
        for user in node.users:
            if user.op == "call_module":
                name = str(user.target)
                layer = layers.get(name, name)
                packed = made[name] if user.args[0] is node else None  # it may be the residual alone
                if isinstance(packed, PackedConv) and x.dim() == packed.weight.dim():
                    transposed = packed.output_padding is not None
                    channels = (
                        packed.weight.shape[0] if transposed else packed.weight.shape[1] * packed.groups
                    )
                elif isinstance(packed, PackedLinear) and x.dim() == 2:
                    channels = packed.weight.shape[1]
                break
        return cls(layer, x.dim(), x.is_floating_point(), channels)


class Outputs:
    """What becomes of a graph's results.

    Args:
        spec: how they are nested.
        contiguous: for each, whether its tensors have to be contiguous where no argument is in channels_last.
        changed: which arguments the model changes in place; what they become are further results.
        same: for each, which argument itself it is, or None.
    """

    def __init__(self, spec: Any, contiguous: list[bool], changed: list[int], same: list[int | None]) -> None:
        self.spec, self.contiguous, self.changed = spec, contiguous, changed
        self.same = [(position, given) for position, given in enumerate(same) if given is not None]
        self.single = spec == pytree.tree_structure(0)

    def finish(self, results: tuple[Any, ...], dtype: torch.dtype | None, inputs: list[Any]) -> Any:
        """The results nested, in ``dtype``, and in the memory format that the model's have."""
        if self.changed:
            given, results = results[len(self.contiguous) :], results[: len(self.contiguous)]
            for position, value in zip(self.changed, given, strict=True):
                inputs[position].copy_(value)
        if self.same:
            own = dict(self.same)
            results = tuple(inputs[own[i]] if i in own else x for i, x in enumerate(results))
        if True in self.contiguous and all(map(in_order, inputs)):
            results = tuple(
                pytree.tree_map(_contiguous, x) if ordered else x
                for x, ordered in zip(results, self.contiguous, strict=True)
            )
        if self.single and type(results[0]) is Tensor:
            return floating(results[0], dtype)
        leaves = [pytree.tree_map(lambda x: floating(x, dtype), leaf) for leaf in results]
        return pytree.tree_unflatten(leaves, self.spec)


#: Attributes that are made again of others.
_BOUND = ("_run", "_compiled", "_exported", "_graphs")


class Region(nn.Module):
    """A traced and rewritten graph, which casts and checks what goes in, and casts back what comes out."""

    def __init__(
        self,
        graph: fx.GraphModule,
        dtype: torch.dtype | None,
        device: torch.device,
        inputs: list[Input],
        layers: dict[str, str],
        signature: Signature,
        outputs: Outputs,
    ):
        super().__init__()
        self.graph, self.dtype, self.device, self.inputs = graph, dtype, device, inputs
        self.layers, self.signature, self.outputs = layers, signature, outputs
        self.bind()

    def bind(self) -> None:
        """Let the graph's code find functions where it names prepacked layers: small models gain by it."""
        self._run = self._bound(plain.packed)
        self._compiled, self._exported = self._bound(plain.compiled), self._bound(plain.exported)
        self._graphs = Graphs(self._run, self._cast) if self.device.type == "cuda" else None

    def _bound(self, call_of: Callable[[Any], Any]) -> Callable[..., Any]:
        """The graph's code as a function of the arguments, with ``call_of(layer)`` where it calls a layer."""
        names: dict[str, Any] = dict(self.graph.named_children())
        names |= dict(self.graph.named_buffers(recurse=False))
        for name, layer in names.items():
            plain_call = isinstance(layer, Call) and not (layer.args or layer.kwargs)
            names[name] = layer.function if plain_call else call_of(layer)
        return partial(type(self.graph).forward, SimpleNamespace(**names))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in _BOUND}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.bind()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        tensors = self.signature.flatten(args, kwargs)
        back = None
        for want, x in zip(self.inputs, tensors, strict=True):
            if tracing_state() is None:  # sizes are tensors there
                self._check(want, x)
            if want.floating:
                back = back or x.dtype
        run: Callable[..., Any] = self._run
        if plain.is_wanted():
            run, entered = self._bound(plain.plain), (floating(x, self.dtype) for x in tensors)
        elif is_compiling():
            run = self._exported if is_exporting() else self._compiled
            entered = map(self._cast, tensors)
        elif self._graphs is None or torch.cuda.is_current_stream_capturing():
            entered = map(self._cast, tensors)
        else:  # which casts as it copies
            run, entered = self._graphs, iter(tensors)
        autocast = torch.is_autocast_enabled(self.device.type)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False) if autocast else nullcontext():
            try:
                result = run(*entered)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise self._blame(tensors, error) from error
            return self.outputs.finish(result, back, tensors)

    def _check(self, want: Input, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{want.layer} takes a torch.Tensor, but got {type(x).__name__}")
        if x.device != self.device:
            raise ArgumentError(f"{want.layer} was frozen on {self.device}, but got a tensor on {x.device}")
        if x.is_floating_point() != want.floating or x.is_complex():
            kind = "floating-point" if want.floating else "integer"
            raise ArgumentError(f"{want.layer} takes a {kind} tensor, but got one of dtype {x.dtype}")
        channels = want.channels is not None and x.dim() == want.rank and x.shape[1] != want.channels
        if x.dim() != want.rank or channels:
            having = "" if want.channels is None else f" with {want.channels} channels"
            raise ArgumentError(
                f"{want.layer} takes a tensor of {want.rank} dimensions{having}, but got shape "
                f"{tuple(x.shape)}"
            )

    def _cast(self, x: Any) -> Any:
        """An argument in our dtype and layout, in one copy."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if x.dim() == 4:
            return x.to(dtype=self.dtype, memory_format=torch.channels_last)
        return x if x.dtype is self.dtype else x.to(self.dtype)

    def _blame(self, args: list[Any], error: Exception) -> Exception:
        """The error to raise for ``error``: the one that names the layer, found by running again."""
        blame = _Blame(self.graph, self.layers)
        try:
            blame.run(*map(self._cast, args))
        except Exception as again:
            return ArgumentError(f"{blame.layer}: {again}")
        return error

    def __repr__(self) -> str:
        lines = []
        for name, layer in self.graph.named_children():
            lines.append(f"{self.layers.get(name, name)}: {layer!r}")
        return "\n".join(lines)


class _Blame(fx.Interpreter):
    """Remembers the layer that it is at."""

    def __init__(self, graph: fx.GraphModule, layers: dict[str, str]):
        super().__init__(graph)
        self.layers = layers
        self.layer = "(root)"

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            self.layer = self.layers.get(str(n.target), str(n.target))
        elif n.op != "placeholder":
            self.layer = n.name
        return super().run_node(n)


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) else x


def in_order(x: Tensor) -> bool:
    """Whether convolutions of PyTorch keep the channels of what they make of ``x`` apart in memory."""
    return x.dim() < 3 or x.is_contiguous() or (x.dim() > 3 and x.stride(1) != 1)


def floating(x: Any, dtype: torch.dtype | None) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not dtype else x


def own_dtype(tree: Any) -> torch.dtype | None:
    """The first floating dtype among a module's or a nest's tensors."""
    if isinstance(tree, nn.Module):
        tensors = [*tree.parameters(), *tree.buffers()]
    else:
        tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return next((x.dtype for x in tensors if x.is_floating_point()), None)
