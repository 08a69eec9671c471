"""What a sweep over operators found."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

FORWARD, TRAINING, BACKWARD = "forward", "training forward", "backward"
STEP = "forward + backward"


@dataclass(frozen=True)
class Row:
    """One case, dtype, layout and phase, timed on both.

    Attributes:
        torch_ms, ours_ms: medians of a call.
        torch_spread, ours_spread: interquartile range over the median.
        nbytes: what the call has to move: inputs and output (gradients of the output and of the inputs
            in backward), each once, and what we save for backward.
        copy_gb_s: rate at which this machine copies as many bytes.
        once_ms: time to read the input and write the output once; in the forward phase only.
        read_ms: time to read the input once; in the forward phase only.
        torch_saved, ours_saved: bytes kept for backward, in the phases that train; the suite says
            whether input and output are among them.
        torch_peak, ours_peak: bytes live at most, beyond the inputs, where the suite measures it.
    """

    case: str
    op: str
    dtype: str
    layout: str
    phase: str
    torch_ms: float
    ours_ms: float
    torch_spread: float
    ours_spread: float
    nbytes: int
    copy_gb_s: float
    once_ms: float | None = None
    read_ms: float | None = None
    torch_saved: int | None = None
    ours_saved: int | None = None
    torch_peak: int | None = None
    ours_peak: int | None = None

    @property
    def speedup(self) -> float:
        return self.torch_ms / self.ours_ms

    @property
    def gb_s(self) -> float:
        return self.nbytes / self.ours_ms / 1e6

    @property
    def copy_share(self) -> float:
        """Our rate over the copy's. It passes 1 where more is read than written: writing costs more."""
        return self.gb_s / self.copy_gb_s

    @property
    def label(self) -> str:
        return f"{self.case} {self.dtype} {self.layout} {self.phase}"


@dataclass(frozen=True)
class Overhead:
    """Microseconds of a call on a tiny tensor, where nothing but the call itself counts."""

    op: str
    grad: bool
    torch_us: float
    ours_us: float

    @property
    def ratio(self) -> float:
        return self.ours_us / self.torch_us


@dataclass
class Results:
    """A whole sweep.

    Attributes:
        facts: the machine, the software and the settings.
        wrong: what is wrong with our results, by case; such cases are not timed.
        alone: cases that PyTorch does not have, so that there is nothing to compare with.
    """

    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    overheads: list[Overhead] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)

    def select(self, *cases: str, **wanted: str) -> Iterator[Row]:
        """The rows of ``cases`` (all when none is given) whose attributes are ``wanted``."""
        for row in self.rows:
            if (not cases or row.case in cases) and all(getattr(row, k) == v for k, v in wanted.items()):
                yield row

    def geometric_mean(self, **wanted: str) -> float | None:
        """Of the speed-ups of the rows selected."""
        speedups = [row.speedup for row in self.select(**wanted)]
        return statistics.geometric_mean(speedups) if speedups else None

    def slowest(self, **wanted: str) -> Row | None:
        """The row of the smallest speed-up among those selected."""
        return min(self.select(**wanted), key=lambda row: row.speedup, default=None)

    def phases(self) -> list[str]:
        return list(dict.fromkeys(row.phase for row in self.rows))

    def as_json(self) -> dict[str, Any]:
        slowest = self.slowest()
        return {
            **self.facts,
            "geometric_mean": self.geometric_mean(),
            "minimum": slowest.speedup if slowest else None,
            "minimum_case": slowest.label if slowest else None,
            "wrong": self.wrong,
            "alone": self.alone,
            "overhead": [asdict(overhead) | {"ratio": overhead.ratio} for overhead in self.overheads],
            "rows": [
                asdict(row) | {"speedup": row.speedup, "gb_s": row.gb_s, "copy_share": row.copy_share}
                for row in self.rows
            ],
        }
