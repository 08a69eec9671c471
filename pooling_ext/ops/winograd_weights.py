"""Weights transformed for Winograd's convolution, kept between calls of inference until they change.

A weight can change without a trace: through ``.data``, in inference mode, in memory shared with
another process. So what is kept goes with a fingerprint of the values that it was made of, which every call
takes anew; that reads the weight once, where transforming reads it once and writes four times as much.

What is kept belongs to no module: it is in no ``state_dict``, copy or pickle, and ends with its weight. It
takes at most :func:`limit` bytes in all; what would exceed that is transformed at each call.
"""

from __future__ import annotations

import math
import os
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from ..errors import ArgumentError
from . import _library, batch_norm_running
from .winograd import winograd_weight

#: What transformed weights may take, in MiB; POOLING_EXT_WINOGRAD_MIB overrides it.
WINOGRAD_MIB = 1024.0

# A hash of values, memory format included.
_fingerprint = _library.define(
    "fingerprint(Tensor weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, "
    "Tensor? norm_weight, Tensor? norm_bias)",
    "int",
    lambda *_: 0,
    vmap=False,
)


def limit() -> int:
    """What transformed weights may take, in bytes: those of a frozen model, or all that are kept here.

    Raises:
        ArgumentError: POOLING_EXT_WINOGRAD_MIB is not a number of at least 0.
    """
    text = os.environ.get("POOLING_EXT_WINOGRAD_MIB", "")
    try:
        mib = float(text) if text else WINOGRAD_MIB
    except ValueError:
        mib = math.nan
    if not 0 <= mib < math.inf:
        raise ArgumentError(f"POOLING_EXT_WINOGRAD_MIB must be a number of at least 0, but got {text!r}")
    return int(mib * (1 << 20))


class Norm(NamedTuple):
    """A batch norm by constants."""

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class Transformed(NamedTuple):
    """What is kept: a transformed weight, the bias with it, and what they were made of."""

    key: tuple[Any, ...]
    weight: Tensor
    bias: Tensor | None


_kept: WeakIdKeyDictionary = WeakTensorKeyDictionary()
_lock = threading.Lock()


def transformed(
    weight: Tensor, bias: Tensor | None, norm: Norm | None, groups: int, stride: int = 1
) -> tuple[Tensor, Tensor | None]:
    """The weight for ``winograd_conv``, and its bias, with ``norm`` folded into both.

    Args:
        weight: ``(O, C / groups, [[D,] kH,] kW)``, of a floating dtype.
        bias: ``(O,)`` or None.
        stride: of rows and columns.
    """
    vectors = (None, None, None, None) if norm is None else norm[:4]
    key = _fingerprint(weight, bias, *vectors), None if norm is None else norm.eps, groups, stride
    found = _kept.get(weight)
    if found is not None and found.key == key:
        return found.weight, found.bias
    made = Transformed(key, *_transform(weight, bias, norm, groups, stride))
    with _lock:
        _kept.pop(weight, None)
        if kept_bytes() + made.weight.nbytes <= limit():
            _kept[weight] = made
    return made.weight, made.bias


def _transform(
    weight: Tensor, bias: Tensor | None, norm: Norm | None, groups: int, stride: int
) -> tuple[Tensor, Tensor | None]:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.inference_mode(False), torch.no_grad():  # for calls under any mode
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if norm is not None:
            weight, bias = batch_norm_running.fold(weight, bias, *norm, wide)
        if weight.dim() == 3:  # of sequences, which are images of one row
            weight = weight.unsqueeze(2)
        return winograd_weight(weight, groups, False, stride), bias


def forget(weight: Tensor) -> None:
    """Keep nothing for a weight that is being trained."""
    if _kept:
        with _lock:
            _kept.pop(weight, None)


def kept_bytes() -> int:
    """What all that is kept takes."""
    return sum(entry.weight.nbytes for entry in list(_kept.values()))
