"""Makes a class for a module that runs its forward with chains fused.

A fused module's class is a subclass of its own whose forward runs the rewritten graph where its guard
holds and the class's own forward elsewhere. The module itself does not change at all.
"""

from __future__ import annotations

import functools
import itertools
import linecache
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.fx.graph import _format_target
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ArgumentError
from ..graph.guards import Untraceable, submodule
from ..graph.modules import find_steps, kind_of
from ..graph.op_tables import BASE, BATCH_NORMS, unchanged_class
from ..graph.tracer import Trace, trace
from ..scripting import with_names_of
from .fused_calls import LoneBatchNorm
from .nodes import is_plain_sequential, step_name
from .patterns import Fused, base_class, rewrite, sequentials_to_inline


@dataclass(frozen=True)
class _Variant:
    """One rewritten forward, for arguments of one kind, in one mode or both.

    Attributes:
        arguments: names of the parameters that it takes.
        kind: the class of all arguments.
        training: the mode it is for, None for both.
        guard: gives the children that ``run`` calls, or None where ``run`` does not stand for the forward.
        run: the forward, of the module, its children and the arguments.
    """

    arguments: tuple[str, ...]
    kind: type
    training: bool | None
    guard: Callable[[Any], tuple[nn.Module, ...] | None]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Fusion:
    """A class for one module, and what is fused in it.

    Attributes:
        cls: the subclass that the module is to become.
        parts: the chains.
        variants: the forwards of ``cls``.
    """

    cls: type
    parts: tuple[Fused, ...]
    variants: tuple[_Variant, ...]


def plan(
    module: nn.Module, known: dict[Any, list[Fusion]] | None = None, exact: bool = False
) -> Fusion | None:
    """What to fuse in the forward of ``module``, or None if there is nothing.

    Args:
        module: may be fused already.
        known: plans of earlier calls with the same ``exact``, which serve for modules of the same structure.
        exact: whether Winograd is left out.

    Raises:
        Untraceable: its forward cannot be traced, or be replaced.
    """
    base = base_class(type(module)) or type(module)
    if isinstance(module, _BatchNorm):
        return _lone(module, base, exact)
    if not _may_have_chains(module, base):
        return None
    if "forward" in module.__dict__:
        raise Untraceable("it has a forward of its own")
    if isinstance(module, fx.GraphModule):
        raise Untraceable(
            "it is a GraphModule, whose class changes with its graph: patch what it is traced from"
        )
    known = {} if known is None else known
    structure = (base, *((name, kind_of(child)) for name, child in module.named_modules() if name))
    for fusion in known.get(structure, ()):
        if all(variant.guard(module) is not None for variant in fusion.variants):
            return fusion
    variants: list[_Variant] = []
    parts: dict[Fused, None] = {}
    traces = trace(module, base)
    inline = sequentials_to_inline(traces[0].graph, module)
    if inline:
        traces = trace(module, base, dict.fromkeys(inline, is_plain_sequential))
    for traced in traces:
        found = dict.fromkeys(rewrite(traced.graph, module, exact))
        if found:
            parts |= found
            variants.append(_variant(traced, module))
    if not variants:
        return None
    fusion = Fusion(_fused_class(base, tuple(variants), exact), tuple(parts), tuple(variants))
    known.setdefault(structure, []).append(fusion)
    return fusion


def _lone(module: nn.Module, base: type, exact: bool) -> Fusion:
    """A batch norm that no chain takes, with what its own forward goes on with."""
    if "forward" in module.__dict__:
        raise Untraceable("it has a forward of its own")
    kind, steps = unchanged_class(base), find_steps(module)
    if kind not in BATCH_NORMS:
        if steps is None:
            raise Untraceable("its forward is not known to be a batch norm and steps that follow it")
        kind = steps.norm
    what = "-".join([base.__name__, *map(step_name, steps.of(module) if steps else ())])
    cls = _lone_class(base, LoneBatchNorm(kind, steps), exact)  # type: ignore[arg-type]
    return Fusion(cls, (Fused(what, "batch_norm_act", norm=""),), ())


def _may_have_chains(module: nn.Module, base: type) -> bool:
    forward = base.forward
    if forward is nn.Sequential.forward:
        return any(isinstance(child, _BatchNorm) for child in module.children())
    return not (forward.__module__ or "").startswith(("torch.", "pooling_ext."))


_GUARD = """\
def guard(self):
    try:
        return ({children}) if {conditions} else None
    except (AttributeError, KeyError):
        return None
"""
#: Of pickled patched modules.
FORMAT = 2
_numbers = itertools.count()
_process = uuid.uuid4().hex
_classes: dict[str, Any] = {}  # of this process, by what stands for them in copies and pickles
_functions: dict[tuple[Any, ...], Callable[..., Any]] = {}


def _variant(traced: Trace, module: nn.Module) -> _Variant:
    for node in traced.graph.nodes:
        node.type = None  # annotations would have to be importable
    code = traced.graph.python_code("self")
    children, source = _with_children(code.src, traced.graph, module)
    guard = _GUARD.format(
        children="".join(f"{submodule(path)}, " for path in children),
        conditions=" and ".join(traced.conditions) or "True",
    )
    return _Variant(
        traced.arguments,
        traced.kind,
        traced.training,
        _function("guard", guard, traced.constants),
        _function("forward", source, code.globals),
    )


def _with_children(source: str, graph: fx.Graph, module: nn.Module) -> tuple[list[str], str]:
    """The paths of the children that a forward calls, and its source with them as one more argument.

    To look each up by nn.Module.__getattr__ takes longer than all else that happens around small operators.
    """
    paths = {path for path, _ in module.named_modules(remove_duplicate=False)}
    nodes = [node for node in graph.nodes if node.op in ("call_module", "get_attr") and node.target in paths]
    children = list(dict.fromkeys(str(node.target) for node in nodes))
    name = "children"
    while name in source:
        name += "_"
    for node in nodes:
        path = str(node.target)
        assigned = f"\n    {node!r} = "
        looked_up = assigned + _format_target("self", path)
        source = source.replace(looked_up, f"{assigned}{name}[{children.index(path)}]", 1)
    return children, source.replace("def forward(self", f"def forward(self, {name}", 1)


def _function(name: str, source: str, namespace: dict[str, Any]) -> Callable[..., Any]:
    """The function ``name`` of ``source``; the same one for the same source, so that classes are shared."""
    key = (source, *((name, namespace[name]) for name in sorted(namespace)))
    if key not in _functions:
        filename = f"<pooling_ext.patching.codegen {next(_numbers)}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        scope = dict(namespace)
        exec(compile(source, filename, "exec"), scope)
        _functions[key] = scope[name]
    return _functions[key]


@functools.cache
def _fused_class(base: Any, variants: tuple[_Variant, ...], exact: bool) -> type:
    traced_forward = base.forward

    arguments = variants[0].arguments  # those of every variant, and at least one
    count = len(arguments)
    choices = [(variant.kind, variant.training, variant.guard, variant.run) for variant in variants]

    traces = is_tracing  # all names are local, as with_names_of asks

    @functools.wraps(traced_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if base.forward is traced_forward and not traces():
            values = args
            if kwargs:
                fits = len(args) + len(kwargs) == count
                values = (*args, *(kwargs.get(name) for name in arguments[len(args) :])) if fits else ()
            if len(values) == count:
                for kind, training, guard, run in choices:
                    if training is None or training == self.training:
                        for value in values:
                            if not isinstance(value, kind):
                                break
                        else:
                            children = guard(self)
                            if children is not None:
                                return run(self, children, *values)
        return base.forward(self, *args, **kwargs)

    return _class_with(base, forward, exact)


@functools.cache
def _lone_class(base: Any, norm: LoneBatchNorm, exact: bool) -> type:
    inherited = base.forward
    traces = is_tracing

    @functools.wraps(inherited)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if base.forward is inherited and len(args) == 1 and not kwargs and not traces():
            return norm(self, args[0], inherited)
        return base.forward(self, *args, **kwargs)

    return _class_with(base, forward, exact)


def _class_with(base: Any, forward: Any, exact: bool) -> type:
    """A subclass of ``base`` with another forward, which can be pickled."""

    def reduce(self: Any, protocol: Any) -> Any:
        reduced = base.__reduce_ex__(self, max(2, protocol))
        if reduced[0].__name__ == "__newobj__" and reduced[1][0] is type(self):
            return (_rebuild, (FORMAT, key, exact, base, *reduced[1][1:]), *reduced[2:])
        return reduced

    key = f"{_process} {next(_numbers)}"
    members = {"forward": with_names_of(base.forward, forward), "__reduce_ex__": reduce}
    _classes[key] = _subclass(base, members)
    return _classes[key]


def _subclass(base: Any, members: dict[str, Any]) -> Any:
    names = {name: base.__dict__[name] for name in ("__doc__", "__module__") if name in base.__dict__}
    try:
        return type(base)(
            base.__name__, (base,), {**names, "__qualname__": base.__qualname__, BASE: base, **members}
        )
    except Exception as error:
        raise Untraceable(f"{base.__name__} cannot be subclassed: {error}") from error


@functools.cache
def _restored_class(base: Any, exact: bool) -> type:
    """What a module of another process is until it has its state: then it is fused again, if it can be."""

    def setstate(self: Any, state: Any) -> None:
        self.__class__ = base
        self.__setstate__(state)
        try:
            fusion = plan(self, exact=exact)
        except Untraceable:
            return
        if fusion is not None:
            self.__class__ = fusion.cls

    return _subclass(base, {"__setstate__": setstate})


def _rebuild(version: Any, *args: Any) -> Any:
    """A module without its state, as pickles name it."""
    if isinstance(version, str):  # before there were versions
        version, args = 0, (version, *args)
    if version < 2:  # before there was a choice
        args = (args[0], False, *args[1:])
    if version > FORMAT:
        raise ArgumentError(
            f"this patched model was saved by a newer version of pooling_ext (format {version}, and this one "
            f"reads up to {FORMAT})"
        )
    key, exact, base, *given = args
    cls = _classes.get(key) or _restored_class(base, exact)
    return cls.__new__(cls, *given)
