"""Names under which modules of this package are in pickles of earlier versions."""

from __future__ import annotations

import sys

from torch import fx

from .freezing import layers, region
from .graph import op_tables, report
from .patching import codegen

_MODULES = {"fusing": codegen, "prepacked": layers, "recognition": op_tables}


def register() -> None:
    """Let pickles find the modules that have moved."""
    for name, module in _MODULES.items():
        sys.modules.setdefault(f"pooling_ext.{name}", module)
    for package, classes in (
        ("pooling_ext.patching", {"PatchReport": report.FusionReport, "PatchEntry": report.FusionEntry}),
        ("pooling_ext.freezing", {"_Input": region.Input, "_Tracer": fx.Tracer}),
    ):
        for name, cls in classes.items():
            setattr(sys.modules[package], name, cls)
