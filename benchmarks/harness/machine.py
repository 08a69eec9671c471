"""Facts about the machine and the software that a result depends on."""

from __future__ import annotations

import datetime
import os
import platform
import re
import time
from pathlib import Path

import torch

import pooling_ext
from pooling_ext.backends import cpu_library
from pooling_ext.cli import cpu_model


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def slug() -> str:
    """Names the machine in a path, such as ``amd-epyc-9654-2-cores``."""
    name = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*", " ", cpu_model().lower())
    words = re.findall(r"[a-z0-9]+", name)
    return "-".join([*words, str(cores()), "cores" if cores() > 1 else "core"])


class OtherLoad:
    """Watches, from its making on, what other processes take of the cores."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), _busy_seconds(), time.process_time()

    def cores(self) -> float | None:
        """How many cores others kept busy on average; None where the system does not tell."""
        start, busy, own = self._start
        now = _busy_seconds()
        if busy is None or now is None:
            return None
        others = now - busy - (time.process_time() - own)
        return round(max(others, 0.0) / (time.perf_counter() - start), 2)


def _busy_seconds() -> float | None:
    """Seconds that all cores together have been busy since the system started."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        # user, nice, system, idle, iowait, irq, softirq, steal
        ticks = [int(field) for field in fields[:8]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None


def facts() -> dict[str, object]:
    """The facts, as JSON takes them."""
    return {
        "machine": slug(),
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "isa": getattr(cpu_library.module, "isa", None),
        "native": cpu_library.module is not None,
        "why_not_native": cpu_library.why_not,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "pooling_ext": pooling_ext.__version__,
        "date": datetime.date.today().isoformat(),
    }
