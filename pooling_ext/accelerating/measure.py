"""Times ways of running a model in turn, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: Seconds for each way. Rounds go on up to PATIENCE times as long where a median is not known to PRECISION.
SECONDS, PATIENCE, PRECISION = 1.5, 2.0, 0.005
FEWEST_ROUNDS, MOST_ROUNDS = 3, 100

clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Way:
    """One way to run the model.

    Attributes:
        name: the row's, in the report.
        prepare: gets everything ready for a call, whose time does not count; returns the call.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]


def in_turn(ways: Sequence[Way], device: torch.device) -> tuple[dict[str, float], int]:
    """The median milliseconds of each way, and the number of rounds.

    The ways take turns, so that a slow spell of the machine hits them all, and nobody always goes first. All
    have run before.
    """
    taken: dict[str, list[float]] = {way.name: [] for way in ways}
    order = list(ways)
    start = clock()
    for rounds in range(1, MOST_ROUNDS + 1):
        for way in order:
            taken[way.name].append(_seconds(way, device))
        order.reverse()
        spent = (clock() - start) / (SECONDS * len(ways))
        if rounds < FEWEST_ROUNDS or spent < 1:
            continue
        if spent >= PATIENCE or max(map(_uncertainty, taken.values())) <= PRECISION:
            break
    return {name: 1e3 * statistics.median(times) for name, times in taken.items()}, rounds


def _seconds(way: Way, device: torch.device) -> float:
    call = way.prepare()
    _wait(device)
    start = clock()
    call()
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _uncertainty(times: list[float]) -> float:
    """Roughly the standard error of the median, as a fraction of it."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / middle / len(times) ** 0.5 if middle else 0.0
