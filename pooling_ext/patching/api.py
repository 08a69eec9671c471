"""patch and unpatch: put our operators into a model that is already built."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ArgumentError
from ..graph.guards import Untraceable
from ..graph.report import FusionEntry, FusionReport
from ..nn import CONVOLUTIONS, REPLACES
from ..ops.conv_bn_act.call import calls_only_forward
from ..ops.conv_choice import may_be_ours, stands_for
from .codegen import Fusion, plan
from .fused_calls import BATCH_NORMS
from .patterns import base_class, worth_fusing

_ORIGINAL: dict[type[nn.Module], type[nn.Module]] = {ours: theirs for theirs, ours in REPLACES.items()}
_ORIGINAL |= {ours: theirs for theirs, ours in CONVOLUTIONS.items()}
_POOLING_BASES = (*REPLACES, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_SCRIPTED = {cls.__name__ for cls in (*_POOLING_BASES, *BATCH_NORMS)}
_MARK = "_pooling_ext_patched"
_ALREADY = "is a module of pooling_ext already"


def patch(model: nn.Module, *, strict: bool = False, exact: bool = False) -> FusionReport:
    """Put this library's operators into ``model``, in place, for training and evaluation.

    **What is replaced.** Pooling modules and functions. Where a forward can be traced, ``patch``
    fuses these sequences in it: convolution, batch norm, the addition of a residual, an activation and
    max pooling; and an addition, ReLU and global average pooling. Other batch norms are fused alone, each
    with the activation that its own forward goes on with. Convolutions that this library's kernels may
    run faster are replaced wherever they stand: 3x3 ones, 3-d ones with 3x3 planes, depthwise and 1x1 ones.

    **What stays.** A module keeps its identity, attributes, parameters, hooks and mode. Its class becomes
    a subclass of it, so ``isinstance`` checks, ``state_dict``, ``copy.deepcopy`` and pickling go on
    working. Replace a child, add a hook or change a flag later, and that module runs its original
    forward. :func:`unpatch` gives the classes back.

    **Thresholds.** A fused call costs more than it saves where its input is small. On the CPU, with
    gradients, a fused batch norm runs from 65,536 to 262,144 elements on, for each thread, by dtype,
    layout and mode; without gradients it runs at any size. Winograd's convolution runs from 16 channels
    and a million multiplications on, where it is known to be faster. Below that PyTorch's operators run,
    as in the unpatched model. ``explain(model, x)`` shows for each call what runs, and the threshold that
    it misses.

    **torch.compile.** Patch first, then compile; ``fullgraph=True`` works. The graph has this library's
    operators, with the thresholds of one thread. Without gradients the compiler has the convolutions and
    batch norms.

    **DistributedDataParallel.** Patch first, then wrap. Names of parameters and buffers do not change, so
    checkpoints of patched and unpatched models are the same. A patched SyncBatchNorm also runs on the
    CPU.

    Args:
        model: any module. It may be patched already.
        strict: raise, and leave the model as it was, if something has to be skipped or a batch norm is left.
        exact: leave out Winograd's convolution, whose results and gradients are off by a few 1e-6 of their
            largest element in float32, where the direct convolution's are by 1e-6 and TF32's by 1e-3.

    Returns:
        A :class:`FusionReport`; print it for a table.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
        ArgumentError: ``strict`` is set and something has to be skipped.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2))
        >>> print(pooling_ext.patch(model))
                  module  what
        replaced  (root)  Conv2d(0)-BatchNorm2d(1)-ReLU(2)  pooling_ext.functional.conv_bn_act
        replaced  3       AvgPool2d                         pooling_ext.nn.AvgPool2d
        2 replaced, 0 skipped
        fused 1 of 1 batch norms
        >>> isinstance(model, nn.Sequential), list(model.state_dict())[:2]
        (True, ['0.weight', '0.bias'])
    """
    plans = _Replacements(exact)
    for path, module in _modules(model):
        plans.look_at(path, module)
    plans.take_batch_norms()
    plans.take_convolutions()
    report = plans.report
    failed = [entry for entry in report.skipped if entry.why != _ALREADY]
    if strict and failed:
        listed = "; ".join(f"{entry.path} ({entry.what}) {entry.why}" for entry in failed)
        raise ArgumentError(f"patch(strict=True) cannot replace everything in model: {listed}")
    set_classes(plans.classes)
    return report


class _Replacements:
    """Which classes the modules of a model are to have, and the report of it.

    Attributes:
        exact: as in :func:`patch`.
        report: what is replaced and skipped.
        classes: modules and their new classes.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.report = FusionReport()
        self.classes: list[tuple[nn.Module, type[nn.Module]]] = []
        self._known: dict[Any, list[Fusion]] = {}
        # They come last: a chain of another module may take them.
        self._convolutions: list[tuple[str, nn.Module]] = []
        self._batch_norms: list[tuple[str, nn.Module]] = []
        self._chained: set[nn.Module] = set()  # convolutions and batch norms

    def look_at(self, path: str, module: nn.Module) -> None:
        """Decide about a module, or keep it for one of the methods below."""
        what, kind = type(module).__name__, type(module)
        if isinstance(module, torch.jit.ScriptModule):
            if module.original_name in _SCRIPTED:
                entry = FusionEntry(path, str(module.original_name), "is compiled by torch.jit")
                self.report.skipped.append(entry)
        elif (ours := REPLACES.get(kind)) is not None:
            self.classes.append((module, ours))
            self.report.replace(path, what, f"{ours.__module__}.{ours.__qualname__}")
        elif (theirs := stands_for(module)) in CONVOLUTIONS:
            if _may_be_ours(module, self.exact):
                self._convolutions.append((path, module))
            elif module.__dict__.get(_MARK):  # it was ours by another patch
                self.classes.append((module, theirs))
        elif kind in _ORIGINAL:
            self.report.skip(path, what, _ALREADY)
        elif isinstance(module, _POOLING_BASES):
            why = "has no counterpart here" if kind in _POOLING_BASES else "has a class of its own"
            self.report.skip(path, what, why)
        elif isinstance(module, _BatchNorm):
            self._batch_norms.append((path, module))
        else:
            self._fuse(path, module)

    def _fuse(self, path: str, module: nn.Module) -> None:
        """Fuse what stands in the forward of a module."""
        try:
            fusion = plan(module, self._known, self.exact)
        except Untraceable as error:
            if worth_fusing(module):
                self.report.skip(path, type(module).__name__, str(error))
            return
        if fusion is not None:
            self._take(path, module, fusion)

    def take_batch_norms(self) -> None:
        """Fuse the batch norms that are in no chain, each alone."""
        self.report.batch_norms = len(self._batch_norms)
        for path, module in self._batch_norms:
            if module in self._chained and calls_only_forward(module):
                continue
            try:
                self._take(path, module, plan(module, exact=self.exact))
            except Untraceable as error:
                self.report.leave_norm(path, type(module).__name__, str(error))

    def take_convolutions(self) -> None:
        """Replace convolutions; those in a chain are told there."""
        for path, module in self._convolutions:
            cls = CONVOLUTIONS[stands_for(module)]
            already = type(module) is cls
            if not already:
                self.classes.append((module, cls))
            if module in self._chained:
                continue
            why = _ALREADY if already else f"{cls.__module__}.{cls.__name__}"
            told = self.report.skipped if already else self.report.replaced
            told.append(FusionEntry(path, cls.__name__, why))

    def _take(self, path: str, module: nn.Module, fusion: Any) -> None:
        """Note what is fused in a module; what is in a chain of another module already is not told again."""
        already = type(module) is fusion.cls
        if not already:
            self.classes.append((module, fusion.cls))
        for part in fusion.parts:
            taken = [module.get_submodule(name) for name in (part.conv, part.norm) if name is not None]
            if part.norm is not None and taken[-1] in self._chained and taken[-1] is not module:
                continue
            self._chained.update(taken)
            if already:
                self.report.skip(path, part.steps, _ALREADY)
            else:
                self.report.replace(path, part.steps, f"pooling_ext.functional.{part.operator}")


def _may_be_ours(conv: Any, exact: bool) -> bool:
    shape = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.dilation, conv.groups
    return conv.padding_mode == "zeros" and may_be_ours(*shape, exact)


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`: give back their classes to the modules that it changed.

    Modules that were built from this library's classes stay as they are.

    Args:
        model: any module, patched or not.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
        ArgumentError: something has made a class of its own out of one that :func:`patch` set
            (torch.nn.utils.parametrize and fully_shard do so), and has to be undone first.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        >>> report = pooling_ext.patch(model)
        >>> pooling_ext.unpatch(model)
        >>> type(model[3])
        <class 'torch.nn.modules.pooling.MaxPool2d'>
    """
    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    for path, module in _modules(model):
        if module.__dict__.get(_MARK) and type(module) in _ORIGINAL:
            classes.append((module, _ORIGINAL[type(module)]))
            continue
        base = base_class(type(module))
        if base is not None:
            classes.append((module, base))
        elif any(map(base_class, type(module).__mro__)):
            raise ArgumentError(
                f"model.{path} has class {type(module).__name__}, made after patch() out of the class it was "
                "given; undo that first"
            )
    set_classes(classes)


def set_classes(classes: list[tuple[nn.Module, type[nn.Module]]]) -> None:
    """Set them all or, if one of them cannot be set, none."""
    before = [(module, type(module)) for module, _ in classes]
    try:
        for module, cls in classes:
            _set_class(module, cls)
    except TypeError:
        for module, cls in before:
            _set_class(module, cls)
        raise


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = cls
    if cls in _ORIGINAL:  # one of ours from the start has no mark
        module.__dict__[_MARK] = True
    else:
        module.__dict__.pop(_MARK, None)


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    return [(path or "(root)", module) for path, module in model.named_modules()]
