"""What calls allocate and what they keep for backward."""

from __future__ import annotations

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


def resident(peak: bool = False) -> int | None:
    """Bytes that this process holds in memory, or at most held; None where the system does not tell."""
    field = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


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
