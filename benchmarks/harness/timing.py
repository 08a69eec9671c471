"""Time rival functions in turn in one process.

The rivals take turns call by call, so that a slow spell of the machine hits them all, and the
median over the turns is reported with its spread.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any

import torch

#: A sample shorter than this repeats the call, so that reading the clock does not count (seconds).
SHORTEST_SAMPLE = 1e-4
_FEWEST_TURNS = 3
_MOST_TURNS = 400
#: Fewer ratios than these say nothing about their spread.
_FEWEST_RATIOS = 5
#: Turns go on, up to _PATIENCE budgets, until each median is known to within this fraction.
_PRECISION = 0.01
_PATIENCE = 2.5


@dataclass(frozen=True)
class Timing:
    """What one call takes.

    Attributes:
        ms: median, in milliseconds.
        spread: interquartile range over the median.
        samples: how many samples were taken.
    """

    ms: float
    spread: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        median = statistics.median(seconds)
        if len(seconds) < 4:
            return cls(median * 1e3, (max(seconds) - min(seconds)) / median, len(seconds))
        low, _, high = statistics.quantiles(seconds, n=4)
        return cls(median * 1e3, (high - low) / median, len(seconds))

    @property
    def uncertainty(self) -> float:
        """Roughly the standard error of the median, as a fraction of it."""
        return self.spread / self.samples**0.5


def measure(
    rivals: Mapping[str, Callable[[], Any]],
    budget: float,
    settled: Callable[[Mapping[str, list[float]]], bool] | None = None,
    shortest: float = SHORTEST_SAMPLE,
    sample: Callable[[Callable[[], Any], int], float] | None = None,
) -> dict[str, Timing]:
    """Time each of ``rivals`` in turn.

    Args:
        rivals: name -> a call without arguments.
        budget: seconds to spend on all of them together. It may be overrun: 2.5 times where the
            medians are still uncertain, and as needed for three turns of slow calls.
        settled: whether the seconds taken so far tell enough; then it ends before the budget, and at the
            budget whatever the medians are. Those of one turn are at one index of each list.
        shortest: seconds; a call that takes less is repeated for a sample.
        sample: the seconds of a call that is repeated so many times; by Python's clock unless given.
    """
    sample = sample or _sample
    repeats: dict[str, int] = {}
    for name, call in rivals.items():
        took = sample(call, 1)
        if took < budget:
            # The first call also warms up caches and allocator; a short one needs a better guess.
            took = sample(call, 1)
        repeats[name] = max(1, round(shortest / max(took, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    order = list(rivals)
    start = perf_counter()
    for turn in range(_MOST_TURNS):
        for name in order:
            samples[name].append(sample(rivals[name], repeats[name]))
        # Nobody always goes first: the caches are not as one's own last call left them.
        order.reverse()
        if turn + 1 < _FEWEST_TURNS:
            continue
        spent = perf_counter() - start
        if settled is not None:
            if spent > budget or settled(samples):
                break
            continue
        if spent < budget:
            continue
        uncertain = max(Timing.of(taken).uncertainty for taken in samples.values())
        if spent > _PATIENCE * budget or uncertain < _PRECISION:
            break
    return {name: Timing.of(taken) for name, taken in samples.items()}


def ratio_is_settled(theirs: Sequence[float], ours: Sequence[float], within: float, at_least: float) -> bool:
    """Whether the ratio of two rivals' times, taken in turn, is known well enough.

    That is to ``within``, as a fraction, or to be over ``at_least``.
    """
    ratios = [one / other for one, other in zip(theirs, ours, strict=True)]
    if len(ratios) < _FEWEST_RATIOS:
        return False
    error = Timing.of(ratios).uncertainty
    return error < within or statistics.median(ratios) * (1 - 3 * error) > at_least


def _sample(call: Callable[[], Any], repeats: int) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else _nothing
    wait()
    start = perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (perf_counter() - start) / repeats


def _nothing() -> None:
    """There is nothing to wait for."""


def copy_rate(nbytes: int) -> float:
    """GB/s at which torch copies, counting ``nbytes`` in all: half of them read, half written.

    It is measured at the next power of the square root of 2, once for all sizes that share one.
    """
    return _copy_rate(2 ** (math.ceil(2 * math.log2(max(nbytes, 64))) / 2))


@cache
def _copy_rate(nbytes: float) -> float:
    source = torch.zeros(int(nbytes) // 8)
    target = torch.empty_like(source)
    ms = measure({"copy": lambda: target.copy_(source)}, 0.1)["copy"].ms
    return 2 * source.nbytes / ms / 1e6


@cache
def once_ms(read: int, written: int) -> float:
    """Milliseconds that it takes to read ``read`` bytes and write ``written`` others, once each."""
    source, target = torch.zeros(max(read // 4, 1)), torch.empty(max(written // 4, 1))

    def once() -> None:
        source.sum()
        target.fill_(0)

    return measure({"once": once}, 0.1)["once"].ms
