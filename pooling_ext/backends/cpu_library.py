"""Loads the CPU kernels, or says why they are not there."""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType

import torch  # noqa: F401  (its libraries must be in the process before ours)

from ..errors import NativeUnavailableWarning

module: ModuleType | None = None
why_not: str | None = None

if os.environ.get("POOLING_EXT_NO_NATIVE", "0") not in ("", "0"):
    why_not = "POOLING_EXT_NO_NATIVE is set"
else:
    try:
        module = importlib.import_module("pooling_ext._C")
    except ImportError as error:
        why_not = f"the compiled kernels could not be loaded ({error})"

if module is None:
    warnings.warn(
        f"pooling_ext runs on PyTorch's own operators: {why_not}.", NativeUnavailableWarning, stacklevel=2
    )
