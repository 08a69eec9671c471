"""freeze: a model made into a module for inference alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .. import nn as ours
from ..errors import ArgumentError
from ..graph.example_tracer import ExampleTrace, trace_example
from ..graph.guards import Untraceable
from ..graph.op_tables import BATCH_NORMS, is_hooked, plain_kind
from ..graph.report import FusionReport
from ..ops import winograd_weights
from ..patching import unpatch
from . import conv_allotment
from .check import Undecided, cloned, difference, random_state_kept, replica, state_kept
from .editor import GraphEditor
from .frozen import Frozen
from .layers import PackedConv
from .parts import Part, freeze_parts
from .passes import rewrite
from .region import Input, Outputs, Region, floating, in_order, own_dtype
from .signature import Signature, call_arguments

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_OURS = tuple(getattr(ours, name) for name in ours.__all__)
_LEFT_OUT = "Winograd's kernels are left out: with them"


def freeze(
    model: nn.Module,
    example: Any,
    dtype: torch.dtype | None = None,
    *,
    check: bool = True,
    exact: bool = False,
) -> Frozen:
    """Make a module for inference with the outputs of ``model`` in eval mode; ``model`` stays as it is.

    Batch norms are folded into the convolutions before them (in float64), weights are packed for the
    device's kernels, residual additions and activations happen in the convolutions, activations are kept in
    channels_last, and pooling runs on this library's operators. A model that cannot be traced as a whole is
    frozen in parts.

    On the CPU each convolution runs on the fastest implementation at the example's size; ``report`` names it.
    Winograd's (3x3, stride 1) is two to three times as fast as the direct one and less accurate. In float32 a
    layer is off by a few 1e-6 of its largest element, between float32's own rounding and TF32 (near 1e-3). A
    whole model is off by at most four times the error of ``model``, or 1e-4 of the largest result. In half
    precision it makes no difference. An infinity or NaN reaches all pixels of the 4x4 that read it. Its
    weights take four times the memory, for which POOLING_EXT_WINOGRAD_MIB in the environment is the limit
    (1024); beyond it, layers run the direct convolution.

    Args:
        model: any torch.nn.Module, patched or not, in either mode. It is copied.
        example: an input like those to come. A tuple holds several positional arguments. A dictionary whose
            keys are parameters of ``model``'s forward holds keyword arguments. The result takes tensors of
            the example's number of dimensions and channels. Other batch and image sizes work as far as
            ``model`` takes them, and are fastest at the example's size. Arguments that are no tensors stay as
            they are in the example.
        dtype: float32, bfloat16, float16 or float64, to compute in; None for the model's own.
        check: run the result beside ``model``, on ``example`` and on a changed copy of it, and compare; this
            takes about the time of four forwards. Where they differ, ``model`` is frozen exactly, and where
            that differs too, in parts.
        exact: leave Winograd's kernels out, also where the result is unpickled. POOLING_EXT_WINOGRAD=0 in the
            environment does the same for a process, and for frozen models that are unpickled in it.

    Returns:
        A :class:`Frozen`. It takes inputs in any memory format and floating dtype, and returns outputs of
        the input's dtype, without gradients.

    Raises:
        TypeError: an argument has the wrong type.
        ArgumentError: a layer cannot be frozen (it normalizes by the batch's own statistics), ``model`` does
            not take ``example``, or the frozen model gives other results; the message names the layer.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        >>> fast = pooling_ext.freeze(model, torch.randn(2, 3, 32, 32))
        >>> fast(torch.randn(4, 3, 64, 64)).shape
        torch.Size([4, 8, 31, 31])
        >>> fast.report.batch_norms_fused
        1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, but got {type(dtype).__name__}")
    if dtype is not None and dtype not in _DTYPES:
        raise ArgumentError(f"dtype must be one of {_DTYPES} or None, but got {dtype}")
    if isinstance(model, Frozen):
        raise ArgumentError("model is frozen already")
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(
            "model is a ScriptModule, compiled by torch.jit: freeze the module it was made from"
        )
    source = getattr(model, "_orig_mod", model)  # torch.compile's wrapper is not traceable
    off = [torch.autocast(device, enabled=False) for device in ("cpu", "cuda")]
    with random_state_kept(), torch.no_grad(), off[0], off[1]:
        job = _Job(source, example, dtype)
        return _checked(job, exact) if check else job.freeze(True, False, exact)


def _checked(job: _Job, exact: bool) -> Frozen:
    """What computes the same as the model: frozen as a whole, without Winograd's kernels, or in parts."""
    problem = of_whole = inexact = None
    frozen: Any = None
    for whole, again in ((True, False), (True, True), (False, False), (False, True)):
        if again and (exact or inexact is None):
            continue  # Winograd's kernels were not at work
        frozen = None  # its weights take memory
        frozen = job.freeze(whole, not whole, exact or again)
        if not whole:
            text = f"gives other results when it is frozen as a whole: {of_whole}"
            frozen.report.skip("(root)", job.name, text)
        problem = job.difference(frozen)
        if problem is None:
            if again:
                frozen.report.warnings.append(f"{_LEFT_OUT} {inexact}")
            return frozen
        of_whole = problem if whole else of_whole
        one = isinstance(frozen.body, Region)  # of parts that are not compared, all would have to do without
        inexact = problem if frozen.report.winograd_bytes and (one or not whole) else None
    raise ArgumentError(
        f"model ({job.name}) cannot be frozen: {problem}, also where it is frozen in parts; look at "
        f"{_to_blame(job, frozen)}. freeze(..., check=False) leaves the comparison out"
    )


def _to_blame(job: _Job, frozen: Frozen) -> str:
    """The part without which ``frozen`` would be right; where none alone is at fault, all that are left."""
    parts = {path: m for path, m in frozen.body.named_modules() if type(m) is Part and ".region." not in path}
    for path, part in parts.items():
        with part.unfrozen():
            if job.difference(frozen) is None:
                return path
    return ", ".join(entry.path for entry in frozen.report.skipped[:-1]) or "(root)"


@dataclass
class _Job:
    """One call of freeze.

    Args:
        source: the model.
        example, dtype: see :func:`freeze`.
    """

    source: nn.Module
    example: Any
    dtype: torch.dtype | None
    report: FusionReport = field(default_factory=FusionReport)

    def __post_init__(self) -> None:
        self.name = type(self.source).__name__
        twin = self.twin()
        args, kwargs = call_arguments(twin, self.example)
        self.own = own_dtype(twin) or own_dtype((args, kwargs))
        self.call = pytree.tree_map(lambda x: floating(x, self.own), (args, kwargs))

    def twin(self, share: bool = False) -> nn.Module:
        """A copy of the model in eval mode, unpatched and without what only recomputes its weights."""
        twin = replica(self.source, share).eval()
        unpatch(twin)
        return _with_plain_weights(twin if share else twin.requires_grad_(False))

    def freeze(self, whole: bool, compare: bool, exact: bool) -> Frozen:
        """Freeze the model.

        Args:
            whole: whether to try it as one region.
            compare: whether to compare each region with the module that it stands for.
            exact: whether to leave Winograd's kernels out.
        """
        self.report, self.compare, self.exact, self.spent = FusionReport(), compare, exact, 0
        args, kwargs = self._copied()
        region = self._region(self.twin(), args, kwargs, "") if whole else None
        body: nn.Module = self.twin() if region is None else region
        if region is None:
            self.report.replaced.clear()  # parts of a region that came to nothing
            self.report.folded.clear()
            self.spent = 0
            args, kwargs = self._copied()
            body = self._parts(body, args, kwargs, "")
            try:
                with state_kept(body):
                    args, kwargs = self._copied()
                    body(*args, **kwargs)
            except Exception as error:
                raise ArgumentError(
                    f"model ({self.name}) cannot be traced, and does not run with its parts frozen: {error}"
                ) from error
        # Regions were given memory as they came; now the layers of all of them are known.
        if conv_allotment.allot(conv_allotment.convolutions(body), winograd_weights.limit(), exact):
            for part in body.modules():
                if isinstance(part, Region):
                    part.bind()
        conv_allotment.describe(body, self.report)
        self.report.count_norms(self.source)
        return Frozen(body, self.name, self.dtype or self.own, self.report)

    def difference(self, frozen: Frozen) -> str | None:
        """How ``frozen`` differs from the model; where that cannot be told, the report says so."""
        try:
            with state_kept(frozen):
                return difference(self.twin(share=True), frozen, self.call, self.dtype or self.own)
        except Undecided as error:
            text = f"freeze could not check its result: {error}"
            frozen.report.warnings.append(text)
            warnings.warn(text, stacklevel=4)
            return None

    def _copied(self) -> Any:
        return cloned(self.call)

    def _parts(self, module: nn.Module, args: tuple, kwargs: dict, path: str) -> nn.Module:
        return freeze_parts(module, args, kwargs, path, self._region)

    def _region(
        self, module: nn.Module, args: tuple, kwargs: dict, path: str, inexact: str | None = None
    ) -> Region | None:
        """Freeze ``module`` as one region; None where it cannot be.

        Args:
            inexact: what was wrong with Winograd's kernels, which are left out then.
        """
        before, exact = self.spent, self.exact
        self.exact = exact or inexact is not None
        try:
            region, report = self._traced(module, args, kwargs, path)
        except Untraceable as error:
            self.report.skip(path, type(module).__name__, f"cannot be traced: {error}")
            return None
        finally:
            self.exact = exact
        if self.compare:
            try:
                with state_kept(module):
                    problem = difference(module, region, (args, kwargs), self.dtype or self.own)
            except Undecided:
                problem = None
            if problem is not None and inexact is None and conv_allotment.spent(region):
                self.spent = before
                return self._region(module, args, kwargs, path, problem)
            if problem is not None:
                self.report.skip(path, type(module).__name__, f"gives other results when frozen: {problem}")
                return None
            if inexact is not None:
                self.report.warnings.append(f"{path}: {_LEFT_OUT} {inexact}")
        self.spent = before + conv_allotment.spent(region)  # that of parts inside it is counted already
        self.report.folded |= report.folded
        for entry in report.replaced:
            self.report.replace(entry.path, entry.what, entry.why)
        for entry in report.skipped:
            self.report.skip(entry.path, entry.what, entry.why)
        return region

    def _traced(self, module: nn.Module, args: tuple, kwargs: dict, path: str) -> tuple[Region, FusionReport]:
        """A region for ``module``, and what is to be said of it if it is used."""
        if is_hooked(module):
            raise Untraceable("it has hooks")
        report = FusionReport()
        signature, args, kwargs = Signature.of(module.forward, args, kwargs)
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not tensors:
            raise Untraceable("it is given no tensor")
        root, name = module, type(module).__name__
        if _is_leaf(module):
            root = _Around(module)
        with state_kept(root):
            trace = trace_example(root, args, kwargs, _is_leaf)

        def path_of(target: str) -> str:
            inner = target if root is module else target.removeprefix("module").removeprefix(".")
            return _dotted(path, inner)

        parts = {}
        for target, (why, (given, named)) in trace.opaque.items():
            child = root.get_submodule(target)
            inside = path_of(target)
            report.skip(inside, type(child).__name__, why)
            parts[target] = self._parts(child, given, named, inside)
        editor = GraphEditor(root, trace, self.dtype, path_of, report)
        contiguous = _contiguous_outputs(trace, tensors)
        made = rewrite(editor, parts)
        ours = [layer for layer in made.values() if isinstance(layer, PackedConv)]
        conv_allotment.allot(ours, winograd_weights.limit() - self.spent, self.exact)
        graph = trace.graph
        layers = {str(node.target): node.meta["layer"] for node in graph.nodes if "layer" in node.meta}
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        inputs = [Input.read_by(node, x, layers, made) for node, x in zip(placeholders, tensors, strict=True)]
        changed = [place for place, node in enumerate(placeholders) if node in editor.changed]
        outputs = Outputs(trace.spec, contiguous, changed, trace.same)
        region = Region(
            fx.GraphModule(made, graph, name),
            self.dtype or self.own,
            tensors[0].device,
            inputs,
            layers,
            signature,
            outputs,
        )
        return region, report


class _Around(nn.Module):
    """Calls a module, so that there is a graph around one that is called in graphs, not traced into."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is called in the graph, not traced into."""
    kind = plain_kind(module)
    known = kind.__module__.startswith(("torch.nn.modules.", "torch.ao.nn.")) and kind is not nn.Sequential
    return known or is_hooked(module) or isinstance(module, _OURS) or kind in BATCH_NORMS


def _dotted(prefix: str, path: str) -> str:
    return ".".join(part for part in (prefix, path) if part) or "(root)"


def _contiguous_outputs(trace: ExampleTrace, tensors: list[Tensor]) -> list[bool]:
    """Which of the results are in the order of their dimensions where the arguments are."""
    # Of an example in channels_last, results in channels_last: they would follow the other order too.
    wanted = "in_order" if all(map(in_order, tensors)) else "channels_last"
    output = next(node for node in reversed(trace.graph.nodes) if node.op == "output")
    return [
        isinstance(x, fx.Node) and x.meta[wanted]
        for x in output.args[0]  # type: ignore[union-attr]
    ]


def _with_plain_weights(model: nn.Module) -> nn.Module:
    """Let go of hooks that only compute a weight from parameters, which no longer change."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if type(hook).__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.prune"):
                hook(module, ())
                del module._forward_pre_hooks[key]
    return model
