"""What every suite does alike: options, the choice of cases, settings, progress, and the files written."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import pooling_ext
from pooling_ext.backends import cpu_library

from . import machine
from .timing import copy_rate

if TYPE_CHECKING:
    from ..reports.report import Document

ROOT = Path(__file__).resolve().parents[2]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
#: The copy that gives the machine's bandwidth reads and writes this many bytes each.
_LARGE_COPY = 256 * 2**20


class Named(Protocol):
    """A case."""

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """The options of every suite; ``name`` is that of the files it writes."""
    parser.set_defaults(error=parser.error)
    parser.add_argument(
        "--quick", action="store_true", help="fewer cases and repetitions, well under a minute"
    )
    parser.add_argument(
        "--cases", metavar="GLOB", action="append", help="only cases of these names; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads for all rivals; default: torch's own choice"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"write {name}.json, {name}.md and {name}.png here. Without it a whole run goes to "
        "benchmarks/results/ and docs/, a partial one nowhere",
    )


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=150)


def choose(cases: Sequence[C], default: Sequence[str], args: argparse.Namespace) -> tuple[C, ...]:
    """The cases that ``--cases`` names or, without it, those that ``default`` does (shell globs).

    Where there are none, or ``--threads`` is out of range, the program ends as for any bad option.
    """
    if args.threads is not None and args.threads < 1:
        args.error(f"--threads must be at least 1, but got {args.threads}")
    globs = args.cases or default
    chosen = tuple(case for case in cases if any(fnmatchcase(case.name, glob) for glob in globs))
    if not chosen:
        names = ", ".join(case.name for case in cases)
        args.error(f"no case matches {' or '.join(globs)}; there are: {names}")
    return chosen


def is_whole(args: argparse.Namespace, cases: Sequence[C], all: Sequence[C]) -> bool:
    """Whether the ``cases`` that were chosen are all, each measured as long as it takes."""
    return not args.quick and len(cases) == len(all)


@contextmanager
def settings(args: argparse.Namespace, console: Console, **more: Any) -> Iterator[dict[str, Any]]:
    """Set threads and memory for the measurements made inside; gives their facts, completed at the end."""
    memory = pooling_ext.reuse_cpu_memory()
    # Pinned, so that nothing in the process changes its mind half-way.
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if cpu_library.module is None:
        console.print(
            f"[yellow]No native kernels ({cpu_library.why_not}): this compares PyTorch with itself.[/]"
        )
    start, others = time.perf_counter(), machine.OtherLoad()
    facts = machine.facts() | {
        "memory_reused": memory.reason,
        **more,
        "copy_gb_s": copy_rate(2 * _LARGE_COPY),
    }
    yield facts
    facts["seconds"] = round(time.perf_counter() - start, 1)
    facts["cores_busy_with_others"] = others.cores()


@contextmanager
def steps(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar of ``total`` steps; the function it gives is called as each begins."""
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        begun = 0

        def begin(what: str) -> None:
            nonlocal begun
            progress.update(task, description=what, completed=begun)
            begun += 1

        yield begin


def finish(
    name: str,
    document: Document,
    data: dict[str, Any],
    whole: bool,
    args: argparse.Namespace,
    console: Console,
    draw: Callable[[Path], None] = lambda path: None,
) -> None:
    """Show a run, and write its files if it is whole or ``--out`` says where.

    Args:
        name: that of the files.
        data: the results.
        whole: whether all was measured that the files in the repository have.
        draw: writes a picture, where there is one.
    """
    document.show(console)
    if args.out is not None or whole:
        written = write(name, document.facts, args.out, data, document.markdown(), draw)
        console.print(f"wrote {', '.join(map(str, written))}", highlight=False)


def write(
    name: str,
    facts: dict[str, Any],
    out: Path | None,
    data: dict[str, Any],
    markdown: str,
    draw: Callable[[Path], None],
) -> list[Path]:
    """Write a run's files into ``out``, or where the repository keeps them; returns their paths."""
    folder = out or ROOT / "benchmarks" / "results" / str(facts["machine"])
    folder.mkdir(parents=True, exist_ok=True)
    image = (out or ROOT / "docs") / f"{name}.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md", image]
    paths[0].write_text(json.dumps(data, indent=1) + "\n")
    paths[1].write_text(markdown)
    draw(image)
    return [path for path in paths if path.exists()]  # not every table has a picture
