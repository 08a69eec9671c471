"""The CPU's instruction sets that kernels are compiled for, and Python on one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import run_python

#: What /proc/cpuinfo must list.
NEEDS = {
    "baseline": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
}
EVERY_ISA = pytest.mark.parametrize("isa", sorted(NEEDS))


def cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def run_on(isa: str, code: str) -> list[str]:
    """The words that ``code`` prints, in a process that uses ``isa``; skips on a CPU without it."""
    if not NEEDS[isa] <= cpu_flags():
        pytest.skip(f"this CPU has no {isa}: {sorted(NEEDS[isa] - cpu_flags())}")
    result = run_python(code, POOLING_EXT_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.split()
