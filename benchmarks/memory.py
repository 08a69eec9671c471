"""What calls allocate and what they keep for backward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that are live at once among those that torch's CPU allocator gives out in ``call``.

    The profiler sees every allocation and release of that allocator, those inside of operators and of
    backward too. What was live before counts nothing. What oneDNN and C++ allocate by themselves is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def peak_rss() -> int | None:
    """The most bytes that this process has held in memory so far; None where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        import resource
    except (OSError, ImportError):
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def saved_bytes(call: Callable[[], Tensor], inputs: Iterable[Tensor]) -> tuple[Tensor, tuple[int, int]]:
    """Run ``call`` and count what it keeps for backward.

    Returns:
        the output, and two counts of bytes: without ``inputs`` and the output, and in all. The first
        is what a layer adds to a network's memory whose other layers keep its input and output anyway.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    total = sum(kept.values())
    for tensor in (*inputs, output):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return output, (sum(kept.values()), total)
