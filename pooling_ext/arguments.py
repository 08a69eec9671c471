"""Numbers as callers may write them: Python's, NumPy's, and tensors of one element.

PyTorch's operators take them all.
"""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def as_int(value: Any, booleans: bool = False) -> Any:
    """The int that ``value`` stands for; None where it stands for none.

    Args:
        booleans: whether True and False stand for 1 and 0.
    """
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) and not booleans:
        return None
    try:
        return operator.index(value)
    except (TypeError, NotImplementedError):  # the second from a tensor without data
        return None


def as_float(value: Any, name: str) -> Any:
    """The float that ``value`` stands for.

    Raises:
        TypeError: it stands for none.
    """
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, Tensor):
        number = value.dim() == 0 and not value.requires_grad and not value.is_complex() and not value.is_meta
    else:
        number = isinstance(value, Real) or _is_numpy_bool(value)
    if not number:
        raise TypeError(f"{name} must be a number, but got {value!r} ({type(value).__name__})")
    return float(value)


def as_bool(value: Any, name: str) -> bool:
    """``value``, which must be a bool, as PyTorch's operators ask.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{name} must be a bool, but got {value!r}")
    return value  # type: ignore[return-value]


def _is_numpy_bool(value: Any) -> bool:
    return getattr(getattr(value, "dtype", None), "kind", "") == "b" and value.ndim == 0
