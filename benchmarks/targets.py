"""What pooling sets out to reach on two AVX-512 cores, as data, and whether it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .results import BACKWARD, FORWARD, TRAINING, Results

STEM, STEM_AVG = "resnet-stem", "resnet-stem-avg"


@dataclass(frozen=True)
class Target:
    """One goal.

    Attributes:
        what: the measured quantity, in words.
        goal: its bound.
        value: reads it from a sweep; None when its cases were not part of the sweep.
        at_least: whether ``goal`` is a lower bound or an upper one.
    """

    what: str
    goal: float
    value: Callable[[Results], float | None]
    at_least: bool = True

    def met(self, value: float) -> bool:
        return value >= self.goal if self.at_least else value <= self.goal

    @property
    def bound(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.goal:g}x"


def _speedup(*cases: str, **wanted: str) -> Callable[[Results], float | None]:
    """The smallest speed-up among the rows selected."""
    return lambda results: min((row.speedup for row in results.select(*cases, **wanted)), default=None)


def _over_once(results: Results) -> float | None:
    """The largest time over that of reading the input and writing the output once."""
    rows = results.select(STEM, STEM_AVG, layout="NCHW", phase=FORWARD)
    return max((row.ours_ms / row.once_ms for row in rows if row.once_ms), default=None)


def _saved(results: Results) -> float | None:
    rows = results.select(STEM, phase=TRAINING)
    return min(
        (row.torch_saved / row.ours_saved for row in rows if row.torch_saved and row.ours_saved), default=None
    )


def _overhead(results: Results) -> float | None:
    return max((overhead.ratio for overhead in results.overheads if not overhead.grad), default=None)


def _slowest(results: Results) -> float | None:
    row = results.slowest()
    return row.speedup if row else None


_NCHW32 = {"layout": "NCHW", "dtype": "float32"}
_NCHW16 = {"layout": "NCHW", "dtype": "bfloat16"}
_GAPS = ("resnet-gap", "large-gap")

TARGETS: tuple[Target, ...] = (
    Target("ResNet stem max forward, NCHW float32", 30, _speedup(STEM, phase=FORWARD, **_NCHW32)),
    Target("ResNet stem max forward, NCHW bfloat16", 30, _speedup(STEM, phase=FORWARD, **_NCHW16)),
    Target("ResNet stem average forward, NCHW float32", 8, _speedup(STEM_AVG, phase=FORWARD, **_NCHW32)),
    Target("ResNet stem average forward, NCHW bfloat16", 8, _speedup(STEM_AVG, phase=FORWARD, **_NCHW16)),
    Target("ResNet stem average backward, NCHW float32", 4, _speedup(STEM_AVG, phase=BACKWARD, **_NCHW32)),
    Target("ResNet stem average backward, NCHW bfloat16", 4, _speedup(STEM_AVG, phase=BACKWARD, **_NCHW16)),
    Target("ResNet stem forward, time over reading and writing once, NCHW", 1.5, _over_once, at_least=False),
    Target("ResNet stem max forward, NHWC", 2, _speedup(STEM, phase=FORWARD, layout="NHWC")),
    Target("global average forward, NCHW bfloat16", 3, _speedup(*_GAPS, phase=FORWARD, **_NCHW16)),
    Target("global average forward, NCHW float32", 1, _speedup(*_GAPS, phase=FORWARD, **_NCHW32)),
    Target("geometric mean of the sweep", 4, lambda results: results.geometric_mean()),
    Target("slowest of the sweep", 0.95, _slowest),
    Target("ResNet stem max, PyTorch's saved bytes over ours", 8, _saved),
    Target("no-grad call on a tiny tensor, time over PyTorch's", 3, _overhead, at_least=False),
)


def verdicts(results: Results) -> list[tuple[Target, float, bool]]:
    """Each target that the sweep measured, with its value and whether it is met."""
    found = [(target, target.value(results)) for target in TARGETS]
    return [(target, value, target.met(value)) for target, value in found if value is not None]
