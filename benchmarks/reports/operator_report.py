"""The tables of a sweep over operators."""

from __future__ import annotations

from collections.abc import Iterator

from .report import SLOWER, Grid, milliseconds, ratio, size
from .results import BACKWARD, FORWARD, TRAINING, Results, Row


def summary(results: Results) -> Grid:
    """Geometric means, by dtype, layout and phase."""
    phases = results.phases()

    def row(name: str, **wanted: str) -> list[str]:
        means = [results.geometric_mean(phase=phase, **wanted) for phase in phases]
        return [name] + [ratio(mean) if mean else "" for mean in (*means, results.geometric_mean(**wanted))]

    rows = [row(f"{dtype} {layout}", dtype=dtype, layout=layout) for dtype, layout in _variants(results)]
    header = ("geometric mean of speed-ups", *phases, "all")
    return Grid("Speed-up over PyTorch", header, [*rows, row("all")])


def operators(results: Results) -> Grid:
    """The geometric mean and the slowest case of each operator, phase, dtype and layout."""
    rows, pairs = [], _variants(results)
    for op, phase in dict.fromkeys((row.op, row.phase) for row in results.rows):
        cells = [op, phase]
        for dtype, layout in pairs:
            wanted = {"op": op, "phase": phase, "dtype": dtype, "layout": layout}
            mean, slowest = results.geometric_mean(**wanted), results.slowest(**wanted)
            cells += [ratio(mean), ratio(slowest.speedup)] if mean and slowest else ["", ""]
        rows.append(cells)
    names = [cell for dtype, layout in pairs for cell in (f"{dtype} {layout}", "slowest")]
    return Grid("Speed-up over PyTorch: geometric means", ("operator", "", *names), rows, left=2)


def _variants(results: Results) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.dtype, row.layout) for row in results.rows))


def overheads(results: Results) -> Grid:
    """What a call costs that computes next to nothing."""
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


def slow(results: Results) -> Grid:
    """What is slower than PyTorch."""
    found = sorted((row for row in results.rows if row.speedup < 1), key=lambda row: row.speedup)
    rows = [
        (
            row.label,
            milliseconds(row.torch_ms),
            milliseconds(row.ours_ms),
            ratio(row.speedup),
            f"{row.torch_spread:.0%}, {row.ours_spread:.0%}",
        )
        for row in found
    ]
    return Grid("Under 1x", ("", "PyTorch, ms", "ours, ms", "speed-up", "spreads"), rows)


def _grouped(results: Results) -> Iterator[dict[str, Row]]:
    """The rows of each case, dtype and layout, by phase."""
    groups: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in results.rows:
        groups.setdefault((row.case, row.dtype, row.layout), {})[row.phase] = row
    return iter(groups.values())


def by_phases(results: Results) -> Grid:
    """A case, dtype and layout in a row, its phases side by side."""
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
        cells.append(_change(size(training.torch_saved), size(training.ours_saved)))
        rows.append(cells)
    return Grid("Cases, PyTorch → ours", header, rows, left=3)


def by_phases_short(results: Results) -> Grid:
    """:func:`by_phases` again, as far as a terminal is wide."""
    rows = []
    for phases in _grouped(results):
        first = phases[FORWARD]
        ratios = [ratio(phases[phase].speedup) for phase in (FORWARD, TRAINING, BACKWARD)]
        rate = [f"{first.gb_s:.0f}", f"{first.copy_share:.0%}"]
        rows.append([first.case, f"{first.dtype} {first.layout}", *ratios, *rate])
    header = ("speed-up over PyTorch", "", "forward", "train", "back", "GB/s", "copy")
    return Grid("Cases", header, rows, left=2)


def by_steps(results: Results) -> Grid:
    """A measurement in a row."""
    header = ("case", "phase", "dtype", "layout", "ms", "speed-up", "GB/s", "of a copy", "peak", "saved")
    rows = []
    for row in results.rows:
        cells = [row.case, row.phase, row.dtype, row.layout]
        cells += [f"{milliseconds(row.torch_ms)} → {milliseconds(row.ours_ms)}", ratio(row.speedup)]
        cells += [f"{row.gb_s:.0f}", f"{row.copy_share:.0%}"]
        for theirs, ours in ((row.torch_peak, row.ours_peak), (row.torch_saved, row.ours_saved)):
            cells.append(_change(size(theirs), size(ours)))
        rows.append(cells)
    return Grid("Cases, PyTorch → ours", header, rows, left=4)


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def headline(results: Results) -> str:
    """The run in a sentence."""
    slowest = results.slowest()
    mean = results.geometric_mean()
    if slowest is None or mean is None:
        return "No case was measured."
    slower = sum(row.speedup < SLOWER for row in results.rows)
    return (
        f"{len(results.rows)} measurements: {mean:.2f}x in the geometric mean, {slower} under {SLOWER}x; "
        f"the slowest is {slowest.speedup:.2f}x ({slowest.label})."
    )


def alone(results: Results) -> list[str]:
    """What could not be compared."""
    if not results.alone:
        return []
    return [f"Left out, since PyTorch does not implement it: {', '.join(results.alone)}."]
