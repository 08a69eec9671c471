"""accelerate: patch or freeze, memory format and memory reuse, each kept where it pays."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..arguments import as_bool
from ..errors import ArgumentError
from ..freezing import Frozen
from ..freezing.signature import call_arguments
from ..patching import patch
from .report import PATCHED, AccelerateReport
from .trial import Trial, device_of, reuse_memory

_AUTOCAST = (torch.float32, torch.bfloat16, torch.float16)
_COMPUTE = (*_AUTOCAST, torch.float64)


def accelerate(
    model: nn.Module, example: Any = None, *, training: bool = True, dtype: torch.dtype | None = None
) -> nn.Module:
    """Patch or freeze ``model``, measure it on an example, and keep the changes that save time.

    For training ``model`` is patched in place (:func:`patch`), in its own memory format or in another
    (channels_last, contiguous). For inference it is frozen (:func:`freeze`), and ``model`` stays as it is. On
    the CPU freed memory is reused (:func:`reuse_cpu_memory`). These ways take turns on ``example``, and the
    fastest is kept. A change that saves less than 2% of the time is undone, down to the model as it was.

    Measuring takes 1.5 seconds for each of up to four ways, and up to twice as much where times vary. Calls
    that take longer than half a second are measured three times. The model's forward hooks run too.
    Afterwards parameters, buffers, gradients, modes, hooks and the random state are as they were, to the bit.

    Without an example the model is patched, its memory format stays, and nothing is measured. The same goes
    for training in several processes, as they must not decide differently.

    Args:
        model: any torch.nn.Module, in either mode, on the device where it will run. Training is measured in
            training mode; if ``model`` is in that mode, those of its children that are in eval mode stay so.
        example: an input like those to come; a tuple holds several positional arguments, and a dictionary
            whose keys are parameters of ``model``'s forward holds keyword arguments.
        training: True makes it faster for training; a forward and the backward of the sum of all outputs is
            measured. False makes it faster for inference alone.
        dtype: for inference, the dtype that :func:`freeze` is to compute in (float32, bfloat16, float16 or
            float64), None for the model's own; the time before is that of ``model`` as it is. For training,
            the dtype of the ``torch.autocast`` that ``model`` will be trained under (bfloat16 or float16;
            float32 for no autocast), None for what is in effect at this call. It is used for measuring, and
            changes nothing in ``model``.

    Returns:
        For training ``model``. For inference a :class:`Frozen`; or ``model``, where freezing does not pay or
        is not possible, or without an example. Its attribute ``accelerate_report`` is an
        :class:`AccelerateReport`, which is copied and pickled with it and is no part of its ``state_dict``.

    Raises:
        TypeError: an argument has the wrong type.
        ArgumentError: ``dtype`` is not one of those above; or ``model`` is frozen already, has no data, or
            does not run on ``example``.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = pooling_ext.accelerate(model, torch.randn(2, 3, 32, 32))
        >>> model.accelerate_report.measured
        'training step, float32 (2, 3, 32, 32)'
        >>> model.accelerate_report.speedup >= 1
        True
    """
    _check(model, training, dtype)
    report = AccelerateReport()
    together = training and _processes() > 1
    if example is None or together:
        if not training and dtype is not None:
            raise ArgumentError(f"example must be given where dtype is ({dtype}) and training is False")
        report.notes.append(
            "not measured, as several processes train together"
            if together
            else "not measured without an example"
        )
        _accelerate_unmeasured(model, report)
        made = model
    else:
        made = Trial(model, example, call_arguments(model, example), training, dtype, report).run()
    made.__dict__["accelerate_report"] = report
    return made


def _check(model: Any, training: Any, dtype: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if isinstance(model, Frozen):
        raise ArgumentError("model is frozen already")
    as_bool(training, "training")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None, but got {type(dtype).__name__}")
    allowed = _AUTOCAST if training else _COMPUTE
    if dtype is not None and dtype not in allowed:
        purpose = "training" if training else "inference"
        raise ArgumentError(f"dtype must be one of {allowed} or None for {purpose}, but got {dtype}")


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _accelerate_unmeasured(model: nn.Module, report: AccelerateReport) -> None:
    report.fusion = patch(model)
    report.chosen = PATCHED
    if device_of(model).type == "cpu":
        reuse_memory(report)
