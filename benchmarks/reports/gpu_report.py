"""What was measured on a GPU: entries, and the tables made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .report import Grid, milliseconds, ratio

EAGER, COMPILED, AUTOTUNED = "eager", "torch.compile", "max-autotune"
PATCHED, FROZEN = "patched", "frozen"
#: Patched, with cuDNN's convolutions; and with the whole step in a CUDA graph.
UNTUNED, CAPTURED = "patched, untuned", "patched, captured"
OUR_MODELS = (PATCHED, UNTUNED, CAPTURED, FROZEN)
#: Our backends, those of them that take a call.
OURS = ("cuda", "triton")
STEP = "forward + backward"


@dataclass(frozen=True)
class Entry:
    """One rival's time.

    Attributes:
        what: the case and phase, or the model and task.
        least: bytes that must be moved; None for models.
        compile_s: seconds of the first call of a rival that compiles itself.
        captured: whether a CUDA graph was replayed, so that the time has no Python in it.
    """

    what: str
    dtype: str
    layout: str
    batch: int
    rival: str
    ms: float
    spread: float
    least: int | None = None
    compile_s: float | None = None
    captured: bool = False


@dataclass
class Run:
    facts: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)

    def groups(self) -> Iterator[dict[str, Entry]]:
        """The rivals of each measurement, by name."""
        found: dict[tuple, dict[str, Entry]] = {}
        for entry in self.entries:
            key = entry.what, entry.dtype, entry.layout, entry.batch
            found.setdefault(key, {})[entry.rival] = entry
        return iter(found.values())


def operators(found: Run) -> Grid:
    rows = []
    for rivals in found.groups():
        first = rivals[EAGER]
        ours = [rivals[name] for name in OURS if name in rivals]
        if first.least is None or not ours:
            continue
        best = min(ours, key=lambda entry: entry.ms)
        rate = first.least / best.ms / 1e6
        rows.append(
            (
                first.what,
                first.dtype,
                first.layout,
                str(first.batch),
                milliseconds(first.ms),
                _times(rivals, COMPILED),
                *(_times(rivals, name) for name in OURS),
                ratio(first.ms / best.ms),
                ratio(rivals[COMPILED].ms / best.ms) if COMPILED in rivals else "",
                f"{rate / found.facts['copy_gb_s']:.0%}",
            )
        )
    ours_ms = [f"{name}, ms" for name in OURS]
    header = ("operator", "dtype", "layout", "batch", "eager, ms", "torch.compile, ms", *ours_ms,
              "over eager", "over torch.compile", "of a copy's rate")  # fmt: skip
    return Grid("Operators", header, rows, left=3)


def _times(rivals: dict[str, Entry], name: str) -> str:
    return milliseconds(rivals[name].ms) if name in rivals else ""


def models(found: Run) -> Grid:
    rows = []
    for rivals in found.groups():
        others = [rivals[name].ms for name in (COMPILED, AUTOTUNED) if name in rivals]
        rows += [
            (
                f"{ours.what}, {ours.rival}",
                ours.dtype,
                str(ours.batch),
                milliseconds(rivals[EAGER].ms),
                _times(rivals, COMPILED),
                _times(rivals, AUTOTUNED),
                milliseconds(ours.ms),
                ratio(rivals[EAGER].ms / ours.ms),
                ratio(min(others) / ours.ms) if others else "",
                f"{ours.batch / ours.ms * 1e3:.0f}",
            )
            for ours in (rivals[name] for name in OUR_MODELS if name in rivals)
        ]
    header = ("ResNet-50", "dtype", "batch", "eager, ms", "torch.compile, ms", "max-autotune, ms", "ours, ms",
              "over eager", "over the best torch.compile", "images/s")  # fmt: skip
    return Grid("Models", header, rows, left=2)


def markdown(found: Run) -> str:
    facts = found.facts
    setting = (
        f"{facts['gpu']}, torch {facts['torch']}, Triton {facts['triton']}, CUDA {facts['cuda']}, cuDNN "
        f"{facts['cudnn']}, pooling_ext {facts['pooling_ext']}; {facts['date']}. A copy of 1 GB runs at "
        f"{facts['copy_gb_s']:.0f} GB/s, read and written bytes counted."
    )
    method = (
        "All rivals run in one process, in turn, after our results were compared with float64's; times are "
        "medians. The share of a copy's rate counts the bytes that have to be moved, not those that are."
    )
    parts = ["# On a GPU", setting, method]
    parts += [f"Wrong, not timed: {label}: {why}" for label, why in found.wrong.items()]
    parts += [grid.markdown().rstrip("\n") for grid in (operators(found), models(found)) if grid.rows]
    return "\n\n".join(parts) + "\n"
