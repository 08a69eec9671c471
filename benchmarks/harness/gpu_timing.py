"""Times on a GPU by its own clock, and without Python where a call can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import timing
from .timing import Timing

#: Calls before a capture: what is compiled, chosen or allocated once is so then.
_WARM_UP = 3
#: Events are recorded around calls that take this long together (seconds).
SHORTEST = 5e-3


def measure(
    rivals: Mapping[str, Callable[[], Any]], budget: float, device: str, capture: bool
) -> dict[str, tuple[Timing, bool]]:
    """Time ``rivals`` in turn: for each its time, and whether a CUDA graph of it was replayed.

    Args:
        rivals: name -> a call without arguments.
        budget: seconds to spend on all of them together.
        device: "cuda", or "cpu" for a dry run, by Python's clock.
        capture: whether to capture each in a CUDA graph where that is possible. Small calls would measure
            Python, which a graph leaves out; whole models are timed as they are called.
    """
    if device == "cpu":
        found = timing.measure(rivals, budget, shortest=SHORTEST)
        return {name: (time, False) for name, time in found.items()}
    graphs = {name: captured(call) if capture else None for name, call in rivals.items()}
    calls = {name: graphs[name] or call for name, call in rivals.items()}
    times = timing.measure(calls, budget, shortest=SHORTEST, sample=_by_events)
    return {name: (time, graphs[name] is not None) for name, time in times.items()}


def captured(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """What replays ``call`` as a CUDA graph, or None where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # it waits for the GPU somewhere
        torch.cuda.synchronize()
        return None
    return graph.replay


def _by_events(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of a call, between events before and after ``repeats`` of them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats / 1e3
