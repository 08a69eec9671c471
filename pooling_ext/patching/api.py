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
_ALREADY = "is one of ours already"


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
        exact: leave out Winograd's convolution, whose results and gradients are off by some 1e-5 of their
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
    report = FusionReport()
    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    known: dict[Any, list[Fusion]] = {}
    convs: list[tuple[str, nn.Module]] = []  # that ours may take the place of
    norms: list[tuple[str, nn.Module]] = []
    chained: set[nn.Module] = set()  # convolutions and batch norms
    for path, module in _modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            if module.original_name in _SCRIPTED:
                report.skipped.append(
                    FusionEntry(path, str(module.original_name), "is compiled by torch.jit")
                )
            continue
        what = type(module).__name__
        ours = REPLACES.get(type(module))
        if ours is not None:
            classes.append((module, ours))
            report.replace(path, what, f"{ours.__module__}.{ours.__qualname__}")
        elif (theirs := stands_for(module)) in CONVOLUTIONS:
            if _may_be_ours(module, exact):
                convs.append((path, module))
            elif module.__dict__.get(_MARK):  # it was ours by another patch
                classes.append((module, theirs))
        elif type(module) in _ORIGINAL:
            report.skip(path, what, _ALREADY)
        elif isinstance(module, _POOLING_BASES):
            why = "has no counterpart here" if type(module) in _POOLING_BASES else "has a class of its own"
            report.skip(path, what, why)
        elif isinstance(module, _BatchNorm):
            norms.append((path, module))
        else:
            try:
                fusion = plan(module, known, exact)
            except Untraceable as error:
                if worth_fusing(module):
                    report.skip(path, what, str(error))
                continue
            if fusion is not None:
                _tell(report, classes, path, module, fusion, chained)
    for path, module in norms:
        if module not in chained or not calls_only_forward(module):
            try:
                _tell(report, classes, path, module, plan(module, exact=exact), chained)
            except Untraceable as error:
                report.leave_norm(path, type(module).__name__, str(error))
    report.batch_norms = len(norms)
    for path, module in convs:
        cls = CONVOLUTIONS[stands_for(module)]
        ours = type(module) is cls
        if not ours:
            classes.append((module, cls))
        if module not in chained:
            entry = FusionEntry(path, cls.__name__, _ALREADY if ours else f"{cls.__module__}.{cls.__name__}")
            (report.skipped if ours else report.replaced).append(entry)
    failed = [entry for entry in report.skipped if entry.why != _ALREADY]
    if strict and failed:
        listed = "; ".join(f"{entry.path} ({entry.what}) {entry.why}" for entry in failed)
        raise ArgumentError(f"patch(strict=True) cannot replace everything in model: {listed}")
    set_classes(classes)
    return report


def _tell(
    report: FusionReport,
    classes: list[tuple[nn.Module, type[nn.Module]]],
    path: str,
    module: nn.Module,
    fusion: Any,
    chained: set[nn.Module],
) -> None:
    """Note what is fused in ``module``; what is in a chain of another module already is not told again."""
    already = type(module) is fusion.cls
    if not already:
        classes.append((module, fusion.cls))
    for part in fusion.parts:
        taken = [module.get_submodule(name) for name in (part.conv, part.norm) if name is not None]
        if part.norm is not None and taken[-1] in chained and taken[-1] is not module:
            continue
        chained.update(taken)
        if already:
            report.skip(path, part.steps, _ALREADY)
        else:
            report.replace(path, part.steps, f"pooling_ext.functional.{part.operator}")


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
