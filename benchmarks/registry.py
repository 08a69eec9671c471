"""The benchmark suites: modules with ``HELP``, ``add_arguments(parser)`` and ``run(args) -> int``."""

from __future__ import annotations

import argparse
import importlib
from typing import Protocol, cast

#: Command-line name -> module. A new suite is one file and one line here.
SUITES: dict[str, str] = {
    "pool": "benchmarks.suites.pool",
    "block": "benchmarks.suites.block",
    "conv": "benchmarks.suites.conv",
    "depthwise": "benchmarks.suites.depthwise",
    "model": "benchmarks.suites.model",
    "bytes": "benchmarks.suites.memory_traffic",
    "gpu": "benchmarks.suites.gpu",
    "coverage": "benchmarks.suites.coverage",
}


class Suite(Protocol):
    """What a suite's module offers."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def load(name: str) -> Suite:
    """Import the suite called ``name``."""
    return cast(Suite, importlib.import_module(SUITES[name]))
