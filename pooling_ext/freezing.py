"""freeze: a model made into a module for inference alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling
from torch.utils import _pytree as pytree

from . import nn as ours
from .errors import ArgumentError
from .folding import Freezer
from .graphs import Graphs
from .patching import PatchEntry, PatchReport, unpatch
from .prepacked import PackedConv, PackedLinear, Prepacked
from .recognition import hooked, is_batch_norm

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def freeze(model: nn.Module, example: Any, dtype: torch.dtype | None = None) -> Frozen:
    """Make a module for inference that computes what ``model`` does in eval mode; ``model`` stays as it is.

    Batch norms are folded into the convolutions before them (in float64), weights are packed for the
    device's kernels, residual additions and activations happen in the convolutions, activations are
    kept in channels_last, and pooling is ours. What cannot be traced as a whole is frozen in parts.

    Args:
        model: any torch.nn.Module; patched or not, in either mode. It is copied.
        example: an input like those to come; a tuple holds several positional arguments. Its
            number of dimensions and channels are those that the result takes; other batch and image sizes
            work as far as ``model`` takes them, and are fastest at the example's size.
        dtype: float32, bfloat16, float16 or float64, to compute in; None for the model's own.

    Returns:
        A :class:`Frozen`. It takes inputs in any memory format and floating dtype, and returns outputs of the
        input's dtype, without gradients.

    Raises:
        TypeError: an argument has the wrong type.
        ArgumentError: a layer cannot be frozen (it normalises by the batch's own statistics), or
            ``model`` does not take ``example``; the message names the layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, but got {type(dtype).__name__}")
    if dtype is not None and dtype not in _DTYPES:
        raise ArgumentError(f"dtype must be one of {_DTYPES} or None, but got {dtype}")
    if isinstance(model, Frozen):
        raise ArgumentError("model is frozen already")
    name = type(model).__name__
    twin = copy.deepcopy(getattr(model, "_orig_mod", model))  # torch.compile's wrapper is not traceable
    unpatch(twin)
    twin.eval().requires_grad_(False)
    args = example if isinstance(example, tuple) else (example,)
    own = _own_dtype(twin) or _own_dtype(args)
    report = PatchReport()
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        args = pytree.tree_map(lambda x: _floating(x, own), args)
        body = _freeze_whole(twin, args, dtype, own, "", report)
        if body is None:
            body = _freeze_parts(twin, args, dtype, own, report)
    return Frozen(body, name, dtype or own, report)


class Frozen(nn.Module):
    """What :func:`freeze` returns: call it like the model it was made from.

    It may be called from several threads at once, copied, pickled and saved with ``torch.save``. It has no
    parameters, stays in eval mode, and computes on the device and in the dtype that it was made for.

    Attributes:
        report: a :class:`PatchReport` of what was folded and prepacked, and what was left.
        dtype: what it computes in.
    """

    def __init__(self, body: nn.Module, name: str, dtype: torch.dtype | None, report: PatchReport):
        super().__init__()
        self.body, self.name, self.dtype, self.report = body, name, dtype, report
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)  # there is nothing left to train

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frozen:
        for region in self.modules():
            if isinstance(region, Region):
                probe = torch.empty(0, dtype=region.dtype, device=region.device)
                moved = fn(probe)
                if moved.dtype != probe.dtype or moved.device != probe.device:
                    raise ArgumentError(
                        f"a frozen module stays on {region.device} in {region.dtype}, but got "
                        f"{moved.device}, {moved.dtype}; freeze the model again there"
                    )
        return self

    def __repr__(self) -> str:
        lines = [f"Frozen({self.name}, {str(self.dtype).removeprefix('torch.')}):"]
        for path, region in self.body.named_modules():
            if isinstance(region, Region):
                lines += [f"  {path}:"] if path else []
                lines += [f"  {line}" for line in repr(region).splitlines()]
        lines.append(f"  {len(self.report.replaced)} layers frozen, {len(self.report.skipped)} kept")
        return "\n".join(lines)


class _Input(NamedTuple):
    """What a region expects of an argument: None as rank for what is no tensor."""

    layer: str
    rank: int | None = None
    floating: bool = False
    channels: int | None = None


class Region(nn.Module):
    """A traced and rewritten graph, which casts and checks what goes in, and casts back what comes out."""

    def __init__(
        self,
        graph: fx.GraphModule,
        dtype: torch.dtype | None,
        device: torch.device,
        inputs: list[_Input],
        layers: dict[str, str],
        spec: Any,
    ):
        super().__init__()
        self.graph, self.dtype, self.device, self.inputs = graph, dtype, device, inputs
        self.layers, self.spec = layers, spec
        self._bind()

    def _bind(self) -> None:
        """Let the graph's code find functions where it names prepacked layers: small models gain by it."""
        names: dict[str, Any] = dict(self.graph.named_children())
        names |= dict(self.graph.named_buffers(recurse=False))
        names |= {name: layer.function for name, layer in names.items() if isinstance(layer, Prepacked)}
        self._run = partial(type(self.graph).forward, SimpleNamespace(**names))
        self._graphs = Graphs(self._run, self._cast) if self.device.type == "cuda" else None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_run", "_graphs")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._bind()

    def forward(self, *args: Any) -> Any:
        if len(args) != len(self.inputs):
            raise TypeError(f"the model was frozen with {len(self.inputs)} arguments, but got {len(args)}")
        back = None
        for want, x in zip(self.inputs, args, strict=True):
            if want.rank is not None:
                self._check(want, x)
                if want.floating:
                    back = back or x.dtype
        run = self._run
        if self._graphs is None or is_compiling() or torch.cuda.is_current_stream_capturing():
            entered = tuple(map(self._cast, args))
        else:  # which casts as it copies
            run, entered = self._graphs, args
        autocast = torch.is_autocast_enabled(self.device.type)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False) if autocast else nullcontext():
            try:
                result = run(*entered)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise self._blame(args, error) from error
            if type(result) is Tensor:
                return _floating(result, back)
            leaves = [_floating(leaf, back) for leaf in pytree.tree_leaves(result)]
            return pytree.tree_unflatten(leaves, self.spec)

    def _check(self, want: _Input, x: Any) -> None:
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

    def _blame(self, args: tuple[Any, ...], error: Exception) -> Exception:
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


def _floating(x: Any, dtype: torch.dtype | None) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not dtype else x


def _own_dtype(tree: Any) -> torch.dtype | None:
    """The first floating dtype among a module's or a nest's tensors."""
    if isinstance(tree, nn.Module):
        tensors = [*tree.parameters(), *tree.buffers()]
    else:
        tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return next((x.dtype for x in tensors if x.is_floating_point()), None)


# --- tracing -------------------------------------------------------------------------------------


class _Call1(nn.Module):
    """Calls a module, so that there is a graph around it whatever its signature."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, a: Any) -> Any:
        return self._keep(self.model(a))

    def _keep(self, result: Any) -> Any:
        """Remember how the result is nested; a graph turns ordered dictionaries into plain ones."""
        self.spec = pytree.tree_structure(result)
        return result


class _Call2(_Call1):
    def forward(self, a: Any, b: Any) -> Any:  # type: ignore[override]
        return self._keep(self.model(a, b))


class _Call3(_Call1):
    def forward(self, a: Any, b: Any, c: Any) -> Any:  # type: ignore[override]
        return self._keep(self.model(a, b, c))


_CALLS = {1: _Call1, 2: _Call2, 3: _Call3}
_OURS = tuple(getattr(ours, name) for name in ours.__all__)


class _Tracer(fx.Tracer):
    """Traces down to torch.nn's modules and ours, and remembers where it failed."""

    def __init__(self, opaque: frozenset[str] = frozenset()):
        super().__init__()
        self.opaque = opaque
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = hooked(m) or is_batch_norm(m) or isinstance(m, _OURS) or module_qualified_name in self.opaque
        return leaf or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:  # the innermost
                self.failed = self.path_of_module(m)
            raise


def _trace(root: nn.Module) -> tuple[fx.Graph, dict[str, str]]:
    """Trace ``root``, leaving out what cannot be traced.

    Returns:
        the graph, and why each module in it was left out.

    Raises:
        Exception: whatever tracing the outermost module raised.
    """
    kept: dict[str, str] = {}
    while True:
        tracer = _Tracer(frozenset(kept))
        try:
            return tracer.trace(root), kept
        except Exception as error:
            if tracer.failed in (None, "model") or tracer.failed in kept:
                raise
            kept[tracer.failed] = _why(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _Shapes(fx.Interpreter):
    """Runs a graph and notes the shapes of its tensors."""

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            layer = str(n.target).removeprefix("model.") if n.op == "call_module" else n.name
            raise ArgumentError(f"model does not take example: {layer}: {_first_line(error)}") from error
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        if n.args and isinstance(n.args[0], fx.Node):
            n.meta["shape_in"] = n.args[0].meta.get("shape")
        return result


# --- freezing ------------------------------------------------------------------------------------


def _freeze_whole(
    module: nn.Module,
    args: tuple[Any, ...],
    dtype: torch.dtype | None,
    own: torch.dtype | None,
    prefix: str,
    report: PatchReport,
) -> Region | None:
    """Freeze ``module`` as one region; None where it cannot be traced."""
    call = _CALLS.get(len(args))
    if call is None:
        return None
    root = call(module).eval()
    try:
        graph, kept = _trace(root)
    except Exception as error:
        report.skipped.append(PatchEntry(prefix.rstrip(".") or "(root)", type(module).__name__, _why(error)))
        return None
    _Shapes(fx.GraphModule(root, graph), garbage_collect_values=True).run(*args)
    freezer = Freezer(root, graph, dtype, lambda path: _dotted(prefix, path), report)
    made = freezer.run()
    for path, why in kept.items():
        report.skipped.append(PatchEntry(_dotted(prefix, path), type(root.get_submodule(path)).__name__, why))
    layers = {str(node.target): node.meta["layer"] for node in graph.nodes if "layer" in node.meta}
    inputs = [
        _expected(node, x, layers, made)
        for node, x in zip([n for n in graph.nodes if n.op == "placeholder"], args, strict=True)
    ]
    tensors = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    frozen = fx.GraphModule(made, graph, type(module).__name__)
    return Region(frozen, dtype or own, device, inputs, layers, root.spec)


def _why(error: Exception) -> str:
    return f"cannot be traced: {_first_line(error)}"


def _dotted(prefix: str, path: str) -> str:
    """The path in the whole model of what is at ``path`` in the graph around ``prefix``."""
    inner = path.removeprefix("model").removeprefix(".")
    return ".".join(part for part in (prefix.rstrip("."), inner) if part) or "(root)"


def _expected(node: fx.Node, x: Any, layers: dict[str, str], made: dict[str, nn.Module]) -> _Input:
    """What the layer that reads the argument ``node`` asks of it."""
    layer, channels = "input", None
    for user in node.users:
        if user.op == "call_module":
            name = str(user.target)
            layer = layers.get(name, name)
            packed = made[name]
            if isinstance(packed, PackedConv) and isinstance(x, Tensor) and x.dim() == packed.weight.dim():
                transposed = packed.output_padding is not None
                channels = packed.weight.shape[0] if transposed else packed.weight.shape[1] * packed.groups
            elif isinstance(packed, PackedLinear) and isinstance(x, Tensor) and x.dim() == 2:
                channels = packed.weight.shape[1]
            break
    if not isinstance(x, Tensor):
        return _Input(layer)
    return _Input(layer, x.dim(), x.is_floating_point(), channels)


def _freeze_parts(
    root: nn.Module,
    args: tuple[Any, ...],
    dtype: torch.dtype | None,
    own: torch.dtype | None,
    report: PatchReport,
) -> nn.Module:
    """Freeze the parts of ``root`` that can be traced, in place."""
    calls = _record_calls(root, args)
    done: dict[nn.Module, Region | None] = {}

    def descend(module: nn.Module, path: str) -> None:
        for name, child in list(module.named_children()):
            inside = f"{path}.{name}" if path else name
            if child not in done:
                given = calls.get(child)
                done[child] = None
                if given is not None:
                    done[child] = _freeze_whole(child, given, dtype, own, inside, report)
                if done[child] is None:
                    descend(child, inside)
            region = done[child]
            if region is not None:
                setattr(module, name, region)

    descend(root, "")
    try:
        root(*args)
    except Exception as error:
        raise ArgumentError(
            f"model ({type(root).__name__}) cannot be traced, and does not run with its parts frozen: {error}"
        ) from error
    return root


def _record_calls(root: nn.Module, args: tuple[Any, ...]) -> dict[nn.Module, tuple[Tensor, ...]]:
    """Run ``root`` and return the arguments of the modules that were always called with tensors alone."""
    calls: dict[nn.Module, Any] = {}

    def note(module: nn.Module, given: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs:
            try:
                bound = inspect.signature(module.forward).bind(*given, **kwargs)
            except TypeError:
                bound = None
            given = bound.args if bound is not None and not bound.kwargs else (None,)
        plain = given and all(type(x) is Tensor for x in given)
        known = calls.get(module, given)
        calls[module] = known if plain and known is not None and not kwargs else None

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in root.modules() if m is not root]
    try:
        root(*args)
    except Exception as error:
        raise ArgumentError(f"model does not take example: {_first_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return {module: given for module, given in calls.items() if given is not None}
