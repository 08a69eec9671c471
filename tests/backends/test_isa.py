"""Every instruction set that the kernels are compiled for and the CPU has, each in a process of its own."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
from helpers import run_python

#: What /proc/cpuinfo must list.
NEEDS = {
    "baseline": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
}


def cpu_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


@pytest.mark.native
@pytest.mark.parametrize("isa", sorted(NEEDS))
def test_instruction_set(isa):
    """Values, gradients and indices over layouts and dtypes, and equal bits for one thread and two."""
    if not NEEDS[isa] <= cpu_flags():
        pytest.skip(f"this CPU has no {isa}: {sorted(NEEDS[isa] - cpu_flags())}")
    script = "import isa_worker; isa_worker.main()"
    result = run_python(script, POOLING_EXT_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.split()[0] == isa


@pytest.mark.native
def test_the_best_instruction_set_is_chosen():
    from pooling_ext import _native

    assert _native.module is not None
    if platform.machine() == "x86_64":
        assert set(_native.module.isas) == {isa for isa, flags in NEEDS.items() if flags <= cpu_flags()}
    result = run_python(
        "from pooling_ext import _native as n; print(n.module.isa, n.module.isas[-1])",
        POOLING_EXT_CPU_ISA=None,
    )
    chosen, best = result.stdout.split()
    assert chosen == best


@pytest.mark.native
def test_an_unknown_instruction_set_is_named():
    """In an error or a warning: a typing error must not silently run something else."""
    script = (
        "import torch, pooling_ext.functional as F; print(F.max_pool1d(torch.ones(1, 4), 2).sum().item())"
    )
    result = run_python(script, POOLING_EXT_CPU_ISA="avx1024")
    assert "avx1024" in result.stderr
    if result.returncode == 0:
        assert result.stdout.strip() == "2.0"
