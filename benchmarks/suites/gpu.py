"""The suite "gpu": operators and ResNet-50 on a GPU, against eager PyTorch and torch.compile."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

import pooling_ext
from pooling_ext.testing.launches import CASES

from ..harness import machine, suite
from ..harness.suite import DTYPES, LAYOUTS, ROOT
from ..harness.timing import copy_rate
from ..reports.gpu_report import AUTOTUNED, COMPILED, Run, markdown, models, operators
from .gpu_models import Sweep, measure_inference, measure_training
from .gpu_operators import measure_operator

HELP = "operators and ResNet-50 on a GPU, against eager PyTorch, torch.compile and a copy"

#: Seconds for each rival of one measurement.
BUDGET, QUICK_BUDGET = 0.4, 0.05
#: The copy that gives the card's bandwidth reads and writes this many bytes each.
_LARGE_COPY = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(error=parser.error)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, and no max-autotune")
    parser.add_argument("--cases", metavar="GLOB", action="append", help="only these operators and models")
    parser.add_argument("--batch", type=int, default=256, help="batch size of operators and training")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["NHWC"])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write; default: benchmarks/results/<GPU>"
    )
    parser.set_defaults(threads=None)


def run(args: argparse.Namespace, device: str = "cuda") -> int:
    """Measure, print, write; 1 if something of ours gave a wrong result, 2 without a GPU."""
    console = suite.make_console()
    named = [_Named(case.name) for case in CASES] + [_Named(name) for name in MODELS]
    chosen = {case.name for case in suite.choose(named, ["*"], args)}
    if args.list:
        for case in named:
            console.print(case.name, highlight=False)
        return 0
    if device == "cuda" and not torch.cuda.is_available():
        console.print("[red]There is no GPU that PyTorch can use, so nothing is measured.[/]")
        return 2
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # eager at its best
    start = perf_counter()
    with torch.device(device):
        found = Run(facts(device))
        folder = args.out or ROOT / "benchmarks" / "results" / found.facts["machine"]
        folder.mkdir(parents=True, exist_ok=True)
        for what, part in _parts(found, chosen, args, device):
            _try(found, what, console, part)
            # At once, so that what comes next can end the process and nothing measured is lost.
            found.facts["seconds"] = round(perf_counter() - start)
            _write(found, folder)
    for grid in (operators(found), models(found)):
        if grid.rows:
            console.print(grid.rich())
    for label, why in found.wrong.items():
        console.print(f"[red]WRONG, not timed:[/] {label}: {why}", highlight=False)
    console.print(f"wrote {folder}/gpu.json, gpu.md", highlight=False)
    return 1 if found.wrong else 0


def _parts(
    found: Run, chosen: set[str], args: argparse.Namespace, device: str
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What there is to measure: a name for each part and what measures it."""
    for case in CASES:
        for dtype in args.dtypes if case.name in chosen else ():
            for layout in args.layouts:
                options = dtype, layout, args.batch, _budget(args), device, not args.no_compile
                yield f"{case.name} {dtype} {layout}", partial(measure_operator, found, case, *options)
    for name, part in MODELS.items():
        if name in chosen:
            yield name, partial(part, found, name, args, device)


def _write(found: Run, folder: Path) -> None:
    data = {**found.facts, "wrong": found.wrong, "entries": [asdict(entry) for entry in found.entries]}
    (folder / "gpu.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(found))


@dataclass(frozen=True)
class _Named:
    name: str


def facts(device: str) -> dict[str, Any]:
    """The card and the software; the rate of a copy is measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else machine.slug()
    return {
        "machine": "-".join(re.findall(r"[a-z0-9]+", name.lower())),
        "gpu": name,
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "pooling_ext": pooling_ext.__version__,
        "date": machine.facts()["date"],
        "copy_gb_s": copy_rate(2 * _LARGE_COPY if device == "cuda" else 2**24),
    }


def _try(found: Run, what: str, console: Console, part: Callable[[], None]) -> None:
    """Measure one part; what is wrong, or fails in whatever way, does not end the others."""
    console.print(what, style="dim", highlight=False)
    try:
        part()
    except Exception as error:  # Triton's compiler has errors of its own
        found.wrong[what] = f"{type(error).__name__}: {str(error)[:300]}"


def _budget(args: argparse.Namespace) -> float:
    return QUICK_BUDGET if args.quick else BUDGET


def _modes(args: argparse.Namespace) -> list[str]:
    return [] if args.no_compile else [COMPILED] if args.quick else [COMPILED, AUTOTUNED]


def _training(found: Run, name: str, args: argparse.Namespace, device: str) -> None:
    for dtype in args.dtypes:
        sweep = Sweep(found, dtype, [args.batch], 4 * _budget(args), device, _modes(args))
        measure_training(sweep, name.split()[0])


def _inference(found: Run, name: str, args: argparse.Namespace, device: str) -> None:
    batches = sorted({1, min(32, args.batch), args.batch})
    for dtype in args.dtypes:
        sweep = Sweep(found, dtype, batches, 2 * _budget(args), device, _modes(args))
        measure_inference(sweep, name.split()[0])


MODELS: dict[str, Callable[[Run, str, argparse.Namespace, str], None]] = {
    "resnet50 training step": _training,
    "resnet50 inference": _inference,
}
