"""The specs of every operator: each module of this folder has some, in a list of its own."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..opspec import OpSpec

#: Every operator's.
SPECS: tuple[OpSpec, ...] = tuple(
    spec
    for module in sorted(found.name for found in iter_modules(__path__))
    for spec in import_module(f"{__name__}.{module}").SPECS
)
