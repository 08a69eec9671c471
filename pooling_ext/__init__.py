"""Faster CNNs for PyTorch: pooling and fused batch norm, patched into models or used directly; and freeze."""

from . import functional, nn
from .backends import explain, use_backend
from .errors import ArgumentError, NativeUnavailableWarning
from .freezing import Frozen, freeze
from .memory import reuse_cpu_memory
from .nn import *  # noqa: F403
from .patching import PatchReport, patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Frozen",
    "NativeUnavailableWarning",
    "PatchReport",
    "explain",
    "freeze",
    "functional",
    "nn",
    "patch",
    "reuse_cpu_memory",
    "unpatch",
    "use_backend",
]
__all__ += nn.__all__
