"""Faster CNNs in PyTorch: pooling and fused convolution, BatchNorm, addition and activation.

For a model that exists: :func:`patch` for training and evaluation, :func:`freeze` for inference, or
:func:`accelerate`, which tries them on an example. For a model of your own: the modules of
:mod:`pooling_ext.nn`, which are here too, and the functions of :mod:`pooling_ext.functional`.
"""

from . import _renamed, functional, nn
from .accelerating import AccelerateReport, accelerate
from .backends import explain, use_backend
from .capturing import CapturedStep, capture_step
from .errors import ArgumentError, NativeUnavailableWarning
from .freezing import Frozen, freeze, load
from .graph.report import FusionReport
from .memory import reuse_cpu_memory
from .nn import *  # noqa: F403
from .patching import patch, unpatch

_renamed.register()
PatchReport = FusionReport  # its name before freeze had a report of the same class

__version__ = "0.2.0"

__all__ = [
    "AccelerateReport",
    "ArgumentError",
    "CapturedStep",
    "Frozen",
    "FusionReport",
    "NativeUnavailableWarning",
    "PatchReport",
    "accelerate",
    "capture_step",
    "explain",
    "freeze",
    "functional",
    "load",
    "nn",
    "patch",
    "reuse_cpu_memory",
    "unpatch",
    "use_backend",
]
__all__ += nn.__all__
