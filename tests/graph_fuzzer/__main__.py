"""Random models, compared eager, patched and frozen; ``python -m tests.graph_fuzzer`` in the repository."""

from __future__ import annotations

import argparse
import sys
import warnings

import torch

from .campaign import check_seed, run
from .compare import SIDES, Fault, check, strict
from .minimize import minimize
from .source import Rejected, Source


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.graph_fuzzer", description=__doc__)
    parser.add_argument("--graphs", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first; the next ones count up")
    parser.add_argument(
        "--one", type=int, metavar="SEED", help="print one model's source and its differences"
    )
    parser.add_argument("--minimize", type=int, metavar="SEED", help="the same, made as small as possible")
    parser.add_argument("--layout", action="store_true", help="compare the strides of outputs too")
    parser.add_argument("--only", choices=SIDES, help="compare one of them with eager (default: both)")
    args = parser.parse_args()
    sides = SIDES if args.only is None else (args.only,)
    torch.set_num_threads(1)
    if args.one is None and args.minimize is None:
        summary = run(range(args.seed, args.seed + args.graphs), args.layout, sides)
        print(summary)
        return bool(summary.faults or summary.refused_without_cause)
    warnings.simplefilter("ignore")
    seed = args.minimize if args.one is None else args.one
    with strict():
        source, _, verdict = check_seed(seed, args.layout, sides)
        faults = (
            verdict.faults or [Fault("freeze", "refuses", verdict.refused)]
            if verdict.refused
            else verdict.faults
        )
        if not faults:
            print(source.script(seed, "freeze"))
            print("# no difference")
            return 0
        if args.one is None:
            source = minimize(source, lambda candidate: shows(candidate, seed, faults[0], args.layout))
            verdict = check(source, seed, args.layout)
    print(source.script(seed, faults[0].stage))
    for fault in verdict.faults or faults:
        print(f"# {fault}")
    return 1


def shows(source: Source, seed: int, fault: Fault, layout: bool = False) -> bool:
    """Whether a program still has a fault."""
    sides = ("patched",) if fault.stage.startswith("patch") else ("frozen",)
    try:
        verdict = check(source, seed, layout, sides)
    except Rejected:
        return False
    return fault in verdict.faults or (fault.what == "refuses" and verdict.refused is not None)


if __name__ == "__main__":
    sys.exit(main())
