"""The suite "bytes": what the Triton kernels read and write against what they have to; needs no GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

import torch

from pooling_ext.backends import explain, use_backend
from pooling_ext.backends.triton_library import interpreted
from pooling_ext.testing.launches import CASES, PHASES, LaunchCase
from pooling_ext.triton.launching import watched

from ..harness.suite import DTYPES, LAYOUTS, ROOT, make_console
from ..harness.traffic import SECTOR, Traffic, counted
from ..reports.report import Grid, ratio, size

HELP = "bytes that the Triton kernels move, counted in the interpreter, against the least possible"

#: How far above the least possible a pool, the stem or batch_norm_act may be.
LIMIT = 1.1


@dataclass(frozen=True)
class Count:
    """One case, dtype, layout and phase.

    Attributes:
        least: the bytes that must be read and written.
        moved: what the kernels read and wrote.
        sectors: the same in whole sectors of 32 bytes.
    """

    case: str
    dtype: str
    layout: str
    phase: str
    batch: int
    least: int
    moved: int
    sectors: int

    @property
    def ratio(self) -> float:
        return self.moved / self.least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(error=parser.error)
    parser.add_argument("--cases", metavar="GLOB", action="append", help="only these; may be repeated")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write bytes.json and bytes.md here; without it a whole run goes to benchmarks/results/triton",
    )


def run(args: argparse.Namespace) -> int:
    """Count, print, write; 1 if one of the kernels is above the limit."""
    chosen = [case for case in CASES if any(fnmatchcase(case.name, glob) for glob in args.cases or ["*"])]
    if not chosen:
        names = ", ".join(map(str, CASES))
        args.error(f"no case matches {' or '.join(args.cases)}; there are: {names}")
    console = make_console()
    if args.list:
        for case in chosen:
            console.print(case.name, highlight=False)
        return 0
    if not interpreted():  # which Triton asks once, when it is imported
        command = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
        return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    counts = []
    for case in chosen:
        for dtype in args.dtypes:
            for layout in args.layouts:
                console.print(f"{case} {dtype} {layout}", style="dim", highlight=False)
                counts += measure(case, dtype, layout)
    console.print(table(counts).rich())
    worst = max(counts, key=lambda count: count.ratio)
    headline = f"at most {worst.ratio:.3f} times the least possible, in {worst.case} {worst.phase}"
    console.print(headline, style="bold", highlight=False)
    whole = not args.cases and len(args.dtypes) == len(DTYPES) and len(args.layouts) == len(LAYOUTS)
    if args.out is not None or whole:
        folder = args.out or ROOT / "benchmarks" / "results" / "triton"
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"torch": torch.__version__, "triton": version("triton"), "python": sys.version.split()[0]}
        rows = [asdict(count) | {"ratio": count.ratio} for count in counts]
        (folder / "bytes.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
        (folder / "bytes.md").write_text(markdown(counts, headline, facts))
        console.print(f"wrote {folder}/bytes.json, bytes.md", highlight=False)
    return 1 if worst.ratio > LIMIT else 0


def measure(case: LaunchCase, dtype: str, layout: str, batch: int | None = None) -> Iterator[Count]:
    """Count every phase of ``case``, run by Triton's interpreter on a batch of ``batch`` images."""
    batch = batch or case.batch
    tensors = case.tensors(batch, DTYPES[dtype], LAYOUTS[layout], "cpu")
    with _skipped():
        pooled = case.run(PHASES[0], tensors)()
    with use_backend("triton"):
        with _skipped():
            found = explain(case.run(PHASES[0], tensors))
        if {decision.backend for decision in found.decisions} != {"triton"}:
            raise RuntimeError(f"{case}: there is no Triton kernel for it:\n{found}")
        for phase in PHASES:
            # What goes before is not counted, nor needed: no access depends on data.
            with _skipped():
                call = case.run(phase, tensors)
            with counted() as traffic:
                call()
            yield _count(case, dtype, layout, phase, batch, int(case.least(phase, tensors, pooled)), traffic)


@contextmanager
def _skipped() -> Iterator[None]:
    """Make outputs without computing them."""
    with use_backend("triton"), watched(lambda launch: True):
        yield


def _count(
    case: LaunchCase, dtype: str, layout: str, phase: str, batch: int, least: int, traffic: Traffic
) -> Count:
    moved, sectors = round(traffic.nbytes), round(traffic.sector_bytes)
    return Count(case.name, dtype, layout, phase, batch, least, moved, sectors)


def table(counts: list[Count]) -> Grid:
    rows = [
        (
            count.case,
            count.phase,
            count.dtype,
            count.layout,
            str(count.batch),
            size(count.least),
            size(count.moved),
            ratio(count.ratio),
            ratio(count.sectors / count.least),
        )
        for count in counts
    ]
    header = (
        "case",
        "phase",
        "dtype",
        "layout",
        "batch",
        "least",
        "moved",
        "ratio",
        f"in {SECTOR} B sectors",
    )
    return Grid("Bytes read and written", header, rows, left=4)


def summary(counts: list[Count]) -> Grid:
    """For each case and phase the most above the least possible, over dtypes and layouts."""
    cases = dict.fromkeys(count.case for count in counts)
    rows = []
    for case in cases:
        cells = [case]
        for phase in PHASES:
            of_phase = [count for count in counts if (count.case, count.phase) == (case, phase)]
            in_bytes = max(count.ratio for count in of_phase)
            in_sectors = max(count.sectors / count.least for count in of_phase)
            cells.append(f"{in_bytes:.3f}" + (f" ({in_sectors:.2f})" if in_sectors > LIMIT else ""))
        rows.append(tuple(cells))
    return Grid("The most over dtypes and layouts", ("case", *PHASES), rows, left=1)


def markdown(counts: list[Count], headline: str, facts: dict[str, str]) -> str:
    method = (
        "Counted in Triton's interpreter from each program's own accesses; a program is taken to have a "
        "small cache, and nothing is shared between programs. The least possible is every input read and "
        "every output written once in each of the passes that the operator cannot do without."
    )
    versions = ", ".join(f"{name} {value}" for name, value in facts.items())
    method += f" In brackets: in whole sectors of {SECTOR} bytes, where that is above {LIMIT}."
    grids = (summary(counts).markdown(), table(counts).markdown())
    parts = ["# Traffic of the Triton kernels", versions, method, f"**{headline}**", *grids]
    return "\n\n".join(parts)
