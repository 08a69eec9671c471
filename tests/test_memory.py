"""reuse_cpu_memory: in a process of its own, since it cannot be undone."""

from __future__ import annotations

import platform

import pytest
from helpers import run_python

import pooling_ext

FAULTS = """
import resource, torch, pooling_ext

def faults(tensors=5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(tensors):
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
result = pooling_ext.reuse_cpu_memory()
assert result and result.enabled and result.reason
assert pooling_ext.reuse_cpu_memory()
# Aligned allocations leave holes a little too small at first; they grow together within a dozen.
faults(tensors=40)
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's mallopt")
def test_large_tensors_reuse_memory():
    """Page faults of five 64 MiB tensors, before and after."""
    result = run_python(FAULTS)
    assert result.returncode == 0, result.stderr
    before, after = map(int, result.stdout.split()[-2:])
    assert after * 20 < before, f"{before} page faults before, {after} after"


@pytest.mark.parametrize("library", ["musl", ""])
def test_other_c_libraries(monkeypatch, library):
    monkeypatch.setattr(platform, "libc_ver", lambda *args: (library, ""))
    result = pooling_ext.reuse_cpu_memory()
    assert not result and not result.enabled
    assert "glibc" in result.reason
