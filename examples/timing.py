"""Timings that can be compared, because what is timed takes turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def in_turn(calls: Sequence[Callable[[], Any]], seconds: float, least: int = 3) -> list[float]:
    """Median milliseconds of each call, over as many turns as fit into ``seconds``, ``least`` at least."""
    for call in calls:
        call()
    taken: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(taken[0]) < least or time.perf_counter() < end:
        for call, times in zip(calls, taken, strict=True):
            _finish()
            start = time.perf_counter()
            call()
            _finish()
            times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
