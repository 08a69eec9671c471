"""reuse_cpu_memory, and what a training step holds: in processes of their own."""

from __future__ import annotations

import json
import platform

import pytest
from helpers import run_python

import pooling_ext

FAULTS = """
import ctypes, resource, torch, pooling_ext
from pooling_ext import memory

# Huge pages, which a system has at times and then not, would make a few faults of many.
PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)

def faults(tensors=5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(tensors):
        torch.empty(64 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
memory.stop_reusing_cpu_memory()  # nothing to undo
assert not memory.is_cpu_memory_reused()
before = faults()
result = pooling_ext.reuse_cpu_memory()
assert result and result.enabled and result.reason
assert pooling_ext.reuse_cpu_memory()
# Aligned allocations leave holes a little too small at first; they grow together within a dozen.
faults(tensors=40)
after = faults()
assert memory.is_cpu_memory_reused()
memory.stop_reusing_cpu_memory()
assert not memory.is_cpu_memory_reused()
stopped = faults(tensors=1)
assert pooling_ext.reuse_cpu_memory()
faults(tensors=40)
print(before, after, stopped, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's mallopt")
def test_large_tensors_reuse_memory():
    """Page faults of five 64 MiB tensors, before, after and when redone; of one when undone."""
    result = run_python(FAULTS)
    assert result.returncode == 0, result.stderr
    before, after, stopped, again = map(int, result.stdout.split()[-4:])
    assert after * 20 < before, f"{before} page faults before, {after} after"
    # The freed memory was given back. Later tensors may lie in what the first leaves in the heap.
    assert stopped * 6 > before, f"{before} page faults before, {stopped} once undone"
    assert again * 20 < before, f"{before} page faults before, {again} once redone"


@pytest.mark.parametrize("library", ["musl", ""])
def test_other_c_libraries(monkeypatch, library):
    monkeypatch.setattr(platform, "libc_ver", lambda *args: (library, ""))
    result = pooling_ext.reuse_cpu_memory()
    assert not result and not result.enabled
    assert "glibc" in result.reason


STEP = """
import json, sys, torch, torchvision
import pooling_ext
from benchmarks.harness.memory import peak_bytes, resident
from benchmarks.suites.model_training import Trainer
from training_cases import preferring_ours, ran

torch.set_num_threads(1)
torch.manual_seed(0)
model = torchvision.models.resnet18().to(memory_format=torch.channels_last)
if {patched}:
    pooling_ext.patch(model)
step = Trainer(model, torch.randn(8, 3, 112, 112).to(memory_format=torch.channels_last), "float32")
with preferring_ours():
    before = resident()
    step()
    step()
    process = None if before is None else resident(peak=True) - before
    live, (_, kernels) = peak_bytes(step), ran(step)
print(json.dumps([live, process, kernels]))
"""


@pytest.mark.slow
@pytest.mark.native
def test_a_training_step_holds_no_more_than_eagers():
    """ResNet-18 with all of its 3x3 convolutions by Winograd, whose scratch memory only the process shows."""
    found = []
    for patched in (False, True):
        result = run_python(STEP.format(patched=patched))
        assert result.returncode == 0, result.stderr[-4000:]
        found.append(json.loads(result.stdout.splitlines()[-1]))
    (live, process, none), (our_live, our_process, kernels) = found
    assert not none and kernels["winograd_conv_stats"] == kernels["winograd_weight_grad"] == 13
    assert our_live <= live
    if process is not None:
        assert our_process <= 1.05 * process
