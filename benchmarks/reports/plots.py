"""Draw a run as horizontal bars of speed-ups on a logarithmic axis.

Twice as fast and half as fast are then equally far from 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .model_results import EAGER, FROZEN, INFERENCE, PATCHED, TRAINING, Models
from .results import BACKWARD, FORWARD, STEP, Results

INK, FAINT = "#1f2933", "#d9dee4"
TEAL, ORANGE, GRAYS = "#0b7285", "#f08c00", ("#adb5bd", "#868e96", "#495057")
_GROUP = 0.76  # of the space for a row, what its bars take
_OURS = "pooling_ext"
_TITLES = {"NCHW": "NCHW (contiguous)", "NHWC": "NHWC (channels last)"}


@dataclass(frozen=True)
class Panel:
    """Bars: what a row is called and, for each series that it has, how long its bar is."""

    title: str
    rows: dict[str, dict[str, float]]


def draw_phases(results: Results, path: Path) -> None:
    """Pooling: forward and backward, geometric means over the dtypes."""
    colors = {FORWARD: TEAL, BACKWARD: ORANGE}
    title = "Pooling on the CPU: speed-up over PyTorch's own operators"
    dtypes = " and ".join(dict.fromkeys(row.dtype for row in results.rows))
    panels = _operator_panels(results, "phase", list(colors))
    bars(panels, colors, title, f"geometric mean of {dtypes}; {_setting(results.facts)}", path)


def draw_dtypes(results: Results, path: Path) -> None:
    """Fused operators: the dtypes of a training step, or of a call where none is measured."""
    colors = {"float32": TEAL, "bfloat16": ORANGE}
    trained = {row.case for row in results.select(phase=STEP)}
    rows = [row for row in results.rows if row.phase == STEP or row.case not in trained]
    shown = Results(results.facts, rows)
    title = "Fused operators at ResNet-50's shapes: speed-up over PyTorch's operators"
    note = f"forward and backward, conv: inference; batch 16; {_setting(results.facts)}"
    bars(_operator_panels(shown, "dtype", list(colors)), colors, title, note, path)


def _operator_panels(results: Results, by: str, series: Sequence[str]) -> list[Panel]:
    """A panel a layout, a row a case, the largest of the first panel's first series on top."""
    layouts = [layout for layout in _TITLES if any(row.layout == layout for row in results.rows)]
    panels = []
    for layout in layouts:
        rows: dict[str, dict[str, float]] = {}
        for row in results.rows:
            rows.setdefault(row.case, {})
        for case, name in ((case, name) for case in rows for name in series):
            found = [row.speedup for row in results.select(case, layout=layout, **{by: name})]
            if found:
                rows[case][name] = statistics.geometric_mean(found)
        panels.append(Panel(_TITLES[layout], rows))
    if not panels:
        return []
    first = panels[0].rows
    order = sorted(first, key=lambda case: -first[case].get(series[0], 0))
    return [Panel(panel.title, {case: panel.rows[case] for case in order}) for panel in panels]


def draw_models(models: Models, path: Path) -> None:
    """Whole models: ours and the other engines over eager."""
    panels, others = [], []
    for part, ours, title in ((TRAINING, PATCHED, "training step"), (INFERENCE, FROZEN, "inference")):
        rows: dict[str, dict[str, float]] = {}
        for setup, rivals in models.best(part=part).items():
            if EAGER in rivals:
                name = f"{setup.model}, batch {setup.batch}, {setup.dtype}"
                speedups = {rival: rivals[EAGER].ms / entry.ms for rival, entry in rivals.items()}
                del speedups[EAGER]
                others += [rival for rival in speedups if rival != ours]
                rows[name] = {_OURS if rival == ours else rival: x for rival, x in speedups.items()}
        if rows:
            panels.append(Panel(f"{title}, {ours}", rows))
    colors = {_OURS: TEAL} | dict(zip(dict.fromkeys(others), GRAYS, strict=False))
    bars(
        panels,
        colors,
        "Whole models on the CPU: speed-up over eager PyTorch, channels last",
        _setting(models.facts),
        path,
    )


def _setting(facts: dict[str, Any]) -> str:
    isa = facts["isa"] or "no native kernels"
    return f"{facts['cpu']}, {facts['threads']} threads, {isa}, torch {facts['torch']}"


def bars(panels: Sequence[Panel], colors: dict[str, str], title: str, note: str, path: Path) -> None:
    """Write a picture of ``panels`` side by side; they share the names of rows where these are the same."""
    values = [value for panel in panels for row in panel.rows.values() for value in row.values()]
    if not values:
        return
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": FAINT,
    }
    shared = all(list(panel.rows) == list(panels[0].rows) for panel in panels)
    with rc_context(style):
        height = 1.9 + 0.34 * max(len(panel.rows) for panel in panels)
        # Wide enough for the title, whatever there is to draw.
        figure = Figure(figsize=(max(10.8, 5.4 * len(panels)), height), layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=shared, squeeze=False)[0]
        low, high = min(0.8, *values) * 0.9, max(2.0, *values) * 1.7
        labeled: dict[str, Any] = {}
        for axis, panel in zip(axes, panels, strict=True):
            _panel(axis, panel, colors)
            axis.set_xlim(low, high)
            axis.set_title(panel.title, loc="left", pad=8)
            handles, labels = axis.get_legend_handles_labels()
            labeled |= dict(zip(labels, handles, strict=True))
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=13)
        figure.supxlabel(note, x=0.01, ha="left", size=8.5, color="#52606d")
        where: dict[str, Any] = {"loc": "outside lower right", "frameon": False, "ncols": len(labeled)}
        figure.legend(list(labeled.values()), list(labeled), **where)
        figure.savefig(path, dpi=130, facecolor="white")


def _panel(axis: Axes, panel: Panel, colors: dict[str, str]) -> None:
    series = [name for name in colors if any(name in row for row in panel.rows.values())]
    thickness = _GROUP / max(len(series), 1)
    axis.set_xscale("log", base=2)
    for name in series:
        found = []
        for y, row in enumerate(panel.rows.values()):
            present = [other for other in series if other in row]
            if name in row:
                offset = (present.index(name) - (len(present) - 1) / 2) * thickness
                found.append((y + offset, row[name]))
        # On a logarithmic axis a bar from 1 starts at no speed-up, and goes left for a slow-down.
        heights, values = [y for y, _ in found], [value for _, value in found]
        lengths = [value - 1 for value in values]
        axis.barh(heights, lengths, thickness, left=1, color=colors[name], label=name)
        for height, value in found:
            text = f"{value:.0f}x" if value >= 9.95 else f"{value:.1f}x" if value >= 2 else f"{value:.2f}x"
            axis.annotate(
                text,
                (max(value, 1), height),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                size=7.5 if len(series) < 3 else 6,
            )
    axis.set_yticks(range(len(panel.rows)), list(panel.rows))
    axis.set_ylim(len(panel.rows) - 0.4, -0.6)
    axis.axvline(1, color=INK, linewidth=1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(axis="x", color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
