"""Statistics over two processes: the same as the whole batch in one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers import NATIVE
from processes import results_of
from sync_worker import CASES, SPLITS, run

WORLD = 2

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo"),
    # Without kernels PyTorch's own SyncBatchNorm stands in, which takes GPUs only.
    pytest.mark.skipif(not NATIVE, reason="needs the compiled kernels"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What each process got, case by case."""
    return results_of("sync_worker.py", tmp_path_factory.mktemp("sync"), WORLD, timeout=200)


def label(case) -> str:
    op, dtype, layout, split, wanted = case
    return f"{op}-{str(dtype)[6:]}-{layout}-{split}-{'+'.join(wanted)}"


@pytest.mark.parametrize("number", range(len(CASES)), ids=[label(case) for case in CASES])
def test_as_the_whole_batch(shared, number):
    op, dtype, layout, split, wanted = CASES[number]
    whole = run(op, dtype, layout, wanted, slice(None), None)
    first, second = parts = [found[number] for found in shared]
    assert [len(part["output"]) for part in parts] == list(SPLITS[split])
    tight = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for name, expected in whole.items():
        if name.startswith("running"):
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
            joined = first[name]
        elif name in ("grad of weight", "grad of bias"):
            # Each process has the sum over its own part, as DistributedDataParallel expects.
            joined = first[name] + second[name]
        else:
            joined = torch.cat((first[name], second[name]))
        torch.testing.assert_close(
            joined, expected, rtol=tight, atol=tight, check_stride=False, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_one_value_in_each_process(shared):
    """Enough for statistics: 0 and 1 have the mean 1/2 and the deviation 1/2."""
    for part, value in zip(shared, (-1.0, 1.0), strict=True):
        torch.testing.assert_close(part[-1]["output"], torch.full((1, 2), value), rtol=1e-4, atol=0)
