"""Show a run: its tables and notes, in the terminal and in markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .targets import Target, verdicts

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


def targets(goals: Sequence[Target], results: Any) -> Grid:
    """Whether ``results`` reach the goals that they measured."""
    rows = [
        (goal.what, goal.bound, ratio(value), "met" if met else "not met")
        for goal, value, met in verdicts(goals, results)
    ]
    return Grid("Targets", ("measured against PyTorch", "target", "measured", ""), rows)


def setting(facts: dict[str, Any]) -> str:
    """On what machine and software a run was made."""
    isa = facts["isa"] or "PyTorch's own operators: no native kernels"
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {isa}; torch {facts['torch']}, "
        f"pooling_ext {facts['pooling_ext']}, Python {facts['python']}; {facts['date']}. "
        f"A copy of 256 MB runs at {facts['copy_gb_s']:.0f} GB/s, read and written bytes counted."
    )


def noise(facts: dict[str, Any]) -> list[str]:
    """A warning when the machine was not ours alone."""
    others = facts["cores_busy_with_others"]
    if others is None or others < 0.1:
        return []
    return [f"Other processes kept {others:.1f} cores busy meanwhile, so these times are noisy."]


@dataclass(frozen=True)
class Document:
    """A run as it is shown.

    Attributes:
        facts: the machine, the software and the settings.
        method: how it was measured; for the reader of the file.
        grids: the most important first; empty ones are left out.
        short: what takes the last grid's place in the terminal, as far as that is wide.
        notes: what else a reader has to know.
        wrong: what gave a wrong result, and why.
    """

    title: str
    facts: dict[str, Any]
    method: str
    headline: str
    grids: Sequence[Grid]
    short: Sequence[Grid] = ()
    notes: Sequence[str] = ()
    wrong: dict[str, str] = field(default_factory=dict)

    def show(self, console: Console) -> None:
        grids = [*self.grids[:-1], *self.short] if self.short else self.grids
        for grid in reversed(grids):
            if grid.rows:
                console.print(grid.rich())
        console.print(setting(self.facts), highlight=False, style="dim")
        for warning in noise(self.facts):
            console.print(warning, highlight=False, style="yellow")
        console.print(self.headline, highlight=False, style="bold")
        for note in self.notes:
            console.print(note, highlight=False, markup=False)
        for label, why in self.wrong.items():
            console.print(Text(f"WRONG RESULT, not timed: {label}: {why}", style="bold red"))

    def markdown(self) -> str:
        parts = [f"# {self.title}", setting(self.facts), *noise(self.facts), self.method]
        parts += [f"**{self.headline}**", *self.notes]
        parts += [
            f"Wrong result, not timed: {label}: {why.splitlines()[0]}" for label, why in self.wrong.items()
        ]
        parts += [grid.markdown().rstrip("\n") for grid in self.grids if grid.rows]
        return "\n\n".join(parts) + "\n"
