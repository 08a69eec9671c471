"""``python -m benchmarks SUITE [options]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from .registry import SUITES, load


def main(argv: Sequence[str] | None = None) -> int:
    """Run one suite; returns the exit status."""
    missing = [name for name in ("rich", "matplotlib") if find_spec(name) is None]
    if missing:
        print(
            f"python -m benchmarks needs {' and '.join(missing)}: pip install 'pooling-ext[bench]'",
            file=sys.stderr,
        )
        return 2
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure pooling_ext against PyTorch."
    )
    commands = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for name in SUITES:
        suite = load(name)
        suite.add_arguments(commands.add_parser(name, help=suite.HELP, description=suite.HELP))
    args = parser.parse_args(argv)
    return load(args.suite).run(args)


if __name__ == "__main__":
    sys.exit(main())
