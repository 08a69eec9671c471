"""Every instruction set that the kernels are compiled for and the CPU has, each in a process of its own."""

from __future__ import annotations

import platform

import pytest
from helpers import run_python
from instruction_sets import EVERY_ISA, NEEDS, cpu_flags, run_on


@pytest.mark.native
@EVERY_ISA
def test_instruction_set(isa):
    """Values, gradients and indices over layouts and dtypes, and equal bits for one thread and two."""
    assert run_on(isa, "import isa_worker; isa_worker.main()")[0] == isa


@pytest.mark.native
def test_the_best_instruction_set_is_chosen():
    from pooling_ext.backends import cpu_library

    assert cpu_library.module is not None
    if platform.machine() == "x86_64":
        assert set(cpu_library.module.isas) == {isa for isa, flags in NEEDS.items() if flags <= cpu_flags()}
    result = run_python(
        "from pooling_ext.backends import cpu_library as n; print(n.module.isa, n.module.isas[-1])",
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
