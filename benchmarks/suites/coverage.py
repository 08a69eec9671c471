"""How many batch norms of other people's models patch and freeze fuse: no times are measured."""

from __future__ import annotations

import argparse
import gc
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from torch.nn.modules.batchnorm import _BatchNorm

import pooling_ext
from pooling_ext.graph.report import FusionReport

from ..harness import suite
from .coverage_models import CoverageCase, cases

HELP = "the share of batch norms that patch and freeze fuse, of models of torchvision, timm and others"
#: What each model is to reach.
GOAL = 0.95


@dataclass
class Row:
    """One model: batch norms that are fused and all, for patch and for freeze, and why others are left.

    Attributes:
        alone: those that patch fuses without their neighbors, of which it knows nothing.
    """

    case: CoverageCase
    patched: tuple[int, int] = (0, 0)
    alone: int = 0
    frozen: tuple[int, int] = (0, 0)
    left: list[str] = field(default_factory=list)

    @property
    def is_met(self) -> bool:
        return all(fused >= GOAL * all_ for fused, all_ in (self.patched, self.frozen))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", metavar="GLOB", action="append", help="only these models; may be repeated")
    parser.add_argument("--list", action="store_true", help="list the models and stop")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the table here; default: docs/coverage.md"
    )


def run(args: argparse.Namespace) -> int:
    chosen = [case for case in cases() if any(fnmatchcase(case.name, glob) for glob in args.cases or ["*"])]
    if args.list:
        print("\n".join(f"{case.library}: {case.name}" for case in chosen))
        return 0
    console = suite.make_console()
    rows = []
    with suite.steps(console, len(chosen)) as begin:
        for case in chosen:
            begin(f"{case.library} {case.name}")
            rows.append(count(case))
            _show(console, rows[-1])
            gc.collect()
    out = args.out or (None if args.cases else suite.ROOT / "docs" / "coverage.md")
    if out is not None:
        out.write_text(table(rows))
        console.print(f"wrote {out}")
    return 0 if all(row.is_met for row in rows) else 1


def count(case: CoverageCase) -> Row:
    """Patch and freeze one model."""
    row = Row(case)
    model, example = case.build()
    frozen = pooling_ext.freeze(model, example, check=False).report
    row.frozen = _counts(frozen)
    del model
    # Frozen first: what is patched is made unpatched again, which takes time.
    model, _ = case.build()
    patched = pooling_ext.patch(model)
    norms = {path for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    row.patched, row.alone = _counts(patched), sum(entry.path in norms for entry in patched.replaced)
    for name, report in (("patch", patched), ("freeze", frozen)):
        reasons: dict[tuple[str, str], list[str]] = {}
        for entry in report.batch_norms_left:
            reasons.setdefault((entry.what, entry.why), []).append(entry.path)
        row.left += [
            f"{name} leaves {len(paths)} ({what} {paths[0]}{', ...' if len(paths) > 1 else ''}): {why}"
            for (what, why), paths in reasons.items()
        ]
    return row


def _counts(report: FusionReport) -> tuple[int, int]:
    return report.batch_norms_fused, report.batch_norms


def _show(console: Console, row: Row) -> None:
    color = "green" if row.is_met else "red"
    counts = f"{_share(row.patched)} patched ({row.alone} alone), {_share(row.frozen)} frozen"
    console.print(f"[{color}]{row.case.library} {row.case.name}[/]: {counts}", *row.left, sep="\n    ")


def _share(counts: tuple[int, int]) -> str:
    return "none" if not counts[1] else f"{counts[0]} of {counts[1]}"


def table(rows: list[Row]) -> str:
    """The page of the documentation."""
    libraries = dict.fromkeys(row.case.library for row in rows)
    versions = ", ".join(f"{name} {version(name.replace('_', '-'))}" for name in libraries)
    missed = sum(not row.is_met for row in rows)
    lines = [
        "# Batch norms that are fused",
        "",
        "`python -m benchmarks coverage` writes this page. It counts the batch norms that `patch` takes",
        "together with their neighbors, or alone where the forward around them cannot be traced, in training",
        "and evaluation; and those that `freeze` folds into a convolution or does in one pass. Models have",
        "random weights. Batch norms that a model does not call in eval mode do not count for `freeze`.",
        "",
        "`BatchNorm1d` counts too where it is given features alone, `(N, C)`, which PyTorch's operator does.",
        "",
        f"{len(rows) - missed} of {len(rows)} models have {GOAL:.0%} or more. PyTorch {torch.__version__},",
        f"{versions}.",
    ]
    for library in libraries:
        lines += ["", f"## {library}", "", "| model | patch | of these alone | freeze |", "|---|---|---|---|"]
        mine = [row for row in rows if row.case.library == library]
        for row in mine:
            lines.append(f"| {row.case.name} | {_share(row.patched)} | {row.alone} | {_share(row.frozen)} |")
        left = [f"- {row.case.name}: {reason}." for row in mine for reason in row.left]
        lines += ["", *left] if left else []
    return "\n".join(lines) + "\n"
