"""Draw a sweep: speed-up of every case, forward and backward."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .results import BACKWARD, FORWARD, Results

INK, FAINT = "#1f2933", "#d9dee4"
COLOURS = {FORWARD: "#0b7285", BACKWARD: "#f08c00"}
_BAR = 0.38
_TITLES = {"NCHW": "NCHW (contiguous)", "NHWC": "NHWC (channels last)"}


def draw(results: Results, path: Path) -> None:
    """Write a picture with one panel a layout; bars are geometric means over the dtypes.

    The axis is logarithmic, so that twice as fast and half as fast are equally far from 1.
    """
    cases = list(dict.fromkeys(row.case for row in results.rows))
    layouts = list(dict.fromkeys(row.layout for row in results.rows))
    if not cases:
        return
    means = {
        (case, layout, phase): statistics.geometric_mean(speedups)
        for case in cases
        for layout in layouts
        for phase in COLOURS
        if (speedups := [row.speedup for row in results.select(case, layout=layout, phase=phase)])
    }
    cases.sort(key=lambda case: -means.get((case, layouts[0], FORWARD), 0))
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": FAINT,
    }
    with rc_context(style):
        height = 1.7 + 0.34 * len(cases)
        figure = Figure(figsize=(5.4 * len(layouts), height), layout="constrained")
        axes = figure.subplots(1, len(layouts), sharey=True, squeeze=False)
        low = min(0.8, *means.values()) * 0.9
        high = max(2.0, *means.values()) * 1.7
        for axis, layout in zip(axes[0], layouts, strict=True):
            _panel(axis, cases, {key[::2]: mean for key, mean in means.items() if key[1] == layout})
            axis.set_xlim(low, high)
            axis.set_title(
                {"NCHW": "NCHW (contiguous)", "NHWC": "NHWC (channels last)"}[layout], loc="left", pad=8
            )
        axes[0][0].set_yticks(range(len(cases)), cases)
        axes[0][0].set_ylim(len(cases) - 0.4, -0.6)
        facts = results.facts
        figure.suptitle(
            "Pooling on the CPU: speed-up over PyTorch's own operators",
            x=0.01,
            ha="left",
            weight="bold",
            size=13,
        )
        dtypes = " and ".join(dict.fromkeys(row.dtype for row in results.rows))
        isa = facts["isa"] or "no native kernels"
        setting = f"{facts['cpu']}, {facts['threads']} threads, {isa}, torch {facts['torch']}"
        figure.supxlabel(f"geometric mean of {dtypes}; {setting}", size=8.5, color="#52606d")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper right", ncols=2, frameon=False)
        figure.savefig(path, dpi=130, facecolor="white")


def _panel(axis: Axes, cases: list[str], means: dict[tuple[str, ...], float]) -> None:
    axis.set_xscale("log", base=2)
    for offset, (phase, colour) in zip((-_BAR / 2, _BAR / 2), COLOURS.items(), strict=True):
        places = [place for place, case in enumerate(cases) if (case, phase) in means]
        values = [means[cases[place], phase] for place in places]
        heights = [place + offset for place in places]
        # On a logarithmic axis a bar from 1 starts at no speed-up, and goes left for a slow-down.
        axis.barh(heights, [value - 1 for value in values], _BAR, left=1, color=colour, label=phase)
        for height, value in zip(heights, values, strict=True):
            text = f"{value:.0f}x" if value >= 9.95 else f"{value:.1f}x" if value >= 1.05 else f"{value:.2f}x"
            axis.annotate(
                text,
                (max(value, 1), height),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                size=7.5,
            )
    axis.axvline(1, color=INK, linewidth=1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(axis="x", color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
