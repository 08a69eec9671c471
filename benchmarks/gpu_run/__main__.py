"""``python -m benchmarks.gpu_run first|second [--out DIR] [--libraries DIR]``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .runner import RESULTS, ROOT, Runner
from .steps import RUNS
from .summary import write


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0 where every step that could be taken ended well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=__doc__)
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: build/gpu/<run>")
    parser.add_argument(
        "--libraries", type=Path, metavar="DIR", help="another run's folder: take what it built"
    )
    parser.add_argument("--dry", action="store_true", help="small inputs on the CPU, to try the run itself")
    args = parser.parse_args(argv)
    folder = (args.out or ROOT / "build" / "gpu" / args.run).resolve()
    if (folder / RESULTS).exists():
        parser.error(f"--out: there is a run in {folder} already")
    if args.dry:
        # The CUDA kernels as a library for the CPU, and Triton's interpreter.
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ.setdefault("POOLING_EXT_CUDA_ON_CPU", str(ROOT / "build" / "cuda_on_cpu.so"))
    _, make = RUNS[args.run]
    steps = make(folder, "cpu" if args.dry else "cuda", args.dry, args.libraries and args.libraries.resolve())
    well = Runner(folder, partial(write, folder)).run(steps)
    print((folder / "summary.md").read_text())
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
