"""Names under which earlier versions had modules of this package, in pickles and in imports."""

from __future__ import annotations

import sys

from torch import fx

from .backends import autotune, cpu_library, cuda_library
from .freezing import layers, region
from .graph import op_tables, report
from .ops import conv_autotune, prologue_norm
from .patching import codegen

_MODULES = {
    "_native": cpu_library,
    "cuda": cuda_library,
    "fusing": codegen,
    "ops.deferred_norm": prologue_norm,
    "ops.tuned_conv": conv_autotune,
    "prepacked": layers,
    "recognition": op_tables,
    "tuning": autotune,
}


def register() -> None:
    """Let pickles and imports find the modules that have moved."""
    for name, module in _MODULES.items():
        sys.modules.setdefault(f"pooling_ext.{name}", module)
    for package, classes in (
        ("pooling_ext.patching", {"PatchReport": report.FusionReport, "PatchEntry": report.FusionEntry}),
        ("pooling_ext.ops.prologue_norm", {"Deferred": prologue_norm.PrologueNorm}),
        ("pooling_ext.freezing", {"_Input": region.Input, "_Tracer": fx.Tracer}),
    ):
        for name, cls in classes.items():
            setattr(sys.modules[package], name, cls)
