"""Show a sweep: tables in the terminal and in markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .results import BACKWARD, FORWARD, TRAINING, Results, Row
from .targets import verdicts

#: Under it a call counts as slower than PyTorch's; between it and 1 lies the noise of the clock.
SLOWER = 0.95


@dataclass(frozen=True)
class Grid:
    """A table of cells, for the terminal and for markdown; ``left`` columns are aligned to the left."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def markdown(self) -> str:
        rule = ["---" if column < self.left else "---:" for column in range(len(self.header))]
        lines = [f"| {' | '.join(cells)} |" for cells in (self.header, rule, *self.rows)]
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n"

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column, name in enumerate(self.header):
            table.add_column(name, justify="left" if column < self.left else "right", no_wrap=True)
        for cells in self.rows:
            table.add_row(*(Text(cell, style=_style(cell)) for cell in cells))
        return table


def _style(cell: str) -> str:
    if cell in ("met", "not met"):
        return "green" if cell == "met" else "bold red"
    if not cell.endswith("x") or not cell[:-1].replace(".", "").isdigit():
        return ""
    ratio = float(cell[:-1])
    return "bold red" if ratio < SLOWER else "green" if ratio >= 1.5 else ""


def ratio(value: float) -> str:
    """``41x``, ``4.1x`` or ``0.97x``."""
    return f"{value:.0f}x" if value >= 20 else f"{value:.1f}x" if value >= 2 else f"{value:.2f}x"


def milliseconds(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def size(nbytes: int | None) -> str:
    """``25.7 MB``; decimal units."""
    if nbytes is None:
        return ""
    if nbytes < 1000:
        return f"{nbytes} B"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"


def _verdicts(results: Results) -> Grid:
    rows = [
        (target.what, target.bound, ratio(value), "met" if met else "not met")
        for target, value, met in verdicts(results)
    ]
    return Grid("Targets", ("measured against PyTorch", "target", "measured", ""), rows)


def _summary(results: Results) -> Grid:
    def row(name: str, **wanted: str) -> list[str]:
        means = [results.geometric_mean(phase=phase, **wanted) for phase in (FORWARD, TRAINING, BACKWARD)]
        return [name] + [ratio(mean) if mean else "" for mean in (*means, results.geometric_mean(**wanted))]

    rows = [
        row(f"{dtype} {layout}", dtype=dtype, layout=layout)
        for dtype, layout in dict.fromkeys((row.dtype, row.layout) for row in results.rows)
    ]
    header = ("geometric mean of speed-ups", "forward", "training forward", "backward", "all")
    return Grid("Speed-up over PyTorch", header, [*rows, row("all")])


def _overheads(results: Results) -> Grid:
    rows = [
        (
            overhead.op,
            "with" if overhead.grad else "without",
            f"{overhead.torch_us:.1f}",
            f"{overhead.ours_us:.1f}",
            f"{overhead.ratio:.2f}",
        )
        for overhead in results.overheads
    ]
    header = ("call on a (1, 1, 4, 4) tensor", "gradient", "PyTorch, us", "ours, us", "ours / PyTorch")
    return Grid("Overhead of a call", header, rows, left=2)


def _slow(results: Results) -> Grid:
    slow = sorted((row for row in results.rows if row.speedup < 1), key=lambda row: row.speedup)
    rows = [
        (
            row.label,
            milliseconds(row.torch_ms),
            milliseconds(row.ours_ms),
            ratio(row.speedup),
            f"{row.torch_spread:.0%}, {row.ours_spread:.0%}",
        )
        for row in slow
    ]
    return Grid("Under 1x", ("", "PyTorch, ms", "ours, ms", "speed-up", "spreads"), rows)


def _grouped(results: Results) -> Iterator[dict[str, Row]]:
    """The rows of each case, dtype and layout, by phase."""
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in results.rows:
        groups.setdefault((row.case, row.dtype, row.layout), {})[row.phase] = row
    return iter(groups.values())


def _cases(results: Results) -> Grid:
    header = ["case", "dtype", "layout"]
    for phase in ("forward", "training", "backward"):
        header += [f"{phase}, ms", "speed-up"]
    header += ["forward GB/s", "of a copy", "saved for backward"]
    rows = []
    for phases in _grouped(results):
        first = phases[FORWARD]
        cells = [first.case, first.dtype, first.layout]
        for phase in (FORWARD, TRAINING, BACKWARD):
            row = phases[phase]
            cells += [f"{milliseconds(row.torch_ms)} → {milliseconds(row.ours_ms)}", ratio(row.speedup)]
        cells += [f"{first.gb_s:.0f}", f"{first.copy_share:.0%}"]
        training = phases[TRAINING]
        theirs, ours = size(training.torch_saved), size(training.ours_saved)
        cells.append(theirs if theirs == ours else f"{theirs} → {ours}")
        rows.append(cells)
    return Grid("Cases, PyTorch → ours", header, rows, left=3)


def _speedups(results: Results) -> Grid:
    """The cases again, as far as a terminal is wide."""
    rows = []
    for phases in _grouped(results):
        first = phases[FORWARD]
        ratios = [ratio(phases[phase].speedup) for phase in (FORWARD, TRAINING, BACKWARD)]
        rate = [f"{first.gb_s:.0f}", f"{first.copy_share:.0%}"]
        rows.append([first.case, f"{first.dtype} {first.layout}", *ratios, *rate])
    header = ("speed-up over PyTorch", "", "forward", "train", "back", "GB/s", "copy")
    return Grid("Cases", header, rows, left=2)


def _grids(results: Results, cases: Callable[[Results], Grid]) -> list[Grid]:
    """The tables, the most important first."""
    makers = (_verdicts, _summary, _overheads, _slow, cases)
    return [grid for grid in (make(results) for make in makers) if grid.rows]


def _setting(results: Results) -> str:
    facts = results.facts
    isa = facts["isa"] or "PyTorch's own operators: no native kernels"
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {isa}; torch {facts['torch']}, "
        f"pooling_ext {facts['pooling_ext']}, Python {facts['python']}; {facts['date']}. "
        f"A copy of 256 MB runs at {facts['copy_gb_s']:.0f} GB/s, read and written bytes counted."
    )


def _noise(results: Results) -> str:
    """A warning when the machine was not ours alone."""
    others = results.facts["cores_busy_with_others"]
    if others is None or others < 0.1:
        return ""
    return f"Other processes kept {others:.1f} cores busy meanwhile, so these times are noisy."


_METHOD = (
    "Both operators run in one process, in turn, on the same tensors, after our result was checked against "
    "PyTorch's; times are medians of a call. Memory is reused (`pooling_ext.reuse_cpu_memory()`), so neither "
    "pays for fresh pages. A rate counts what has to move: input and output once, and what is saved for "
    'backward; "of a copy" compares it with a copy of as many bytes, which reading more than writing can '
    "beat. Saved bytes leave out the input and the output, which the neighbouring layers keep anyway."
)


def _headline(results: Results) -> str:
    slowest = results.slowest()
    mean = results.geometric_mean()
    if slowest is None or mean is None:
        return "No case was measured."
    slower = sum(row.speedup < SLOWER for row in results.rows)
    return (
        f"{len(results.rows)} measurements: {mean:.2f}x in the geometric mean, {slower} under {SLOWER}x; "
        f"the slowest is {slowest.speedup:.2f}x ({slowest.label})."
    )


def _alone(results: Results) -> str:
    if not results.alone:
        return ""
    return f"Left out, since PyTorch does not implement it: {', '.join(results.alone)}."


def show(results: Results, console: Console) -> None:
    """Print the sweep."""
    for grid in reversed(_grids(results, _speedups)):
        console.print(grid.rich())
    console.print(_setting(results), highlight=False, style="dim")
    if warning := _noise(results):
        console.print(warning, highlight=False, style="yellow")
    console.print(_headline(results), highlight=False, style="bold")
    if alone := _alone(results):
        console.print(alone, highlight=False)
    for label, why in results.wrong.items():
        console.print(Text(f"WRONG RESULT, not timed: {label}: {why}", style="bold red"))


def markdown(results: Results) -> str:
    """The sweep as a markdown document."""
    parts = ["# Pooling on the CPU", _setting(results), _noise(results), _METHOD, f"**{_headline(results)}**"]
    parts.append(_alone(results))
    parts += [
        f"Wrong result, not timed: {label}: {why.splitlines()[0]}" for label, why in results.wrong.items()
    ]
    parts += [grid.markdown().rstrip("\n") for grid in _grids(results, _cases)]
    return "\n\n".join(filter(None, parts)) + "\n"
