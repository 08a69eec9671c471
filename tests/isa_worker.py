"""A compact check of the CPU kernels, for one instruction set: test_isa.py runs it in a process of its own.

Prints the instruction set in use, then a digest of every result's bits.
"""

from __future__ import annotations

import hashlib
import sys
import warnings

import torch
import torch.nn.functional as TF
from helpers import FLOATS, INTEGERS, gradient, integers, with_layout

import pooling_ext.functional as F
from pooling_ext import _native
from pooling_ext.testing.tolerances import assert_close

LAYOUTS = ("contiguous", "channels_last", "sliced", "offset")
#: Wide enough for several AVX-512 vectors and a tail, along channels and along rows.
SHAPES = {2: (2, 83, 7, 83), 3: (1, 35, 4, 5, 35)}


def check(rank: int, layout: str, dtype: torch.dtype, digest) -> None:
    """Every operator against PyTorch's in float64, forward and backward."""
    x = with_layout(integers(SHAPES[rank], dtype, 1, 7), layout)
    suffix = f"{rank}d"
    for kernel, stride, padding in ((3, 2, 1), (2, 2, 0), (3, 1, 1), ((2,) * (rank - 1) + (5,), 3, 1)):
        max_pool, theirs = getattr(F, f"max_pool{suffix}"), getattr(TF, f"max_pool{suffix}")
        expected, indices = theirs(x.double(), kernel, stride, padding, return_indices=True)
        actual = max_pool(x, kernel, stride, padding)
        assert_close(actual, expected, exact=True)
        output, places = max_pool(x, kernel, stride, padding, return_indices=True)
        assert torch.equal(output, actual) and torch.equal(places, indices)
        record(digest, actual, places)
    if not dtype.is_floating_point:
        return
    calls = [
        (f"max_pool{suffix}", (3, 2, 1)),
        (f"max_pool{suffix}", (2, 2)),
        (f"avg_pool{suffix}", (3, 2, 1)),
    ]
    calls += [(f"avg_pool{suffix}", (3, 1, 1)), (f"avg_pool{suffix}", (2, 2)), (f"lp_pool{suffix}", (2, 2))]
    calls += [(f"adaptive_avg_pool{suffix}", (3,)), (f"adaptive_avg_pool{suffix}", (1,))]
    calls += [(f"adaptive_max_pool{suffix}", (3,))]
    for name, args in calls:
        grad = integers(getattr(F, name)(x, *args).shape, dtype)
        result = gradient(lambda x, name=name, args=args: getattr(F, name)(x, *args), x, grad)
        exact = gradient(
            lambda x, name=name, args=args: getattr(TF, name)(x, *args), x.double(), grad.double()
        )
        for ours, theirs in zip(result, exact, strict=True):
            assert_close(ours, theirs, exact="max" in name, scale=16 if "lp" in name else 2, what=name)
        record(digest, *result)


def record(digest, *results: torch.Tensor) -> None:
    for result in results:
        digest.update(result.contiguous().view(torch.uint8).numpy().tobytes())


def main() -> None:
    if _native.module is None:
        sys.exit(f"no compiled kernels: {_native.why_not}")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    print(_native.module.isa)
    digests = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        digest = hashlib.sha256()
        for rank in SHAPES:
            for layout in LAYOUTS:
                for dtype in FLOATS + INTEGERS:
                    check(rank, layout, dtype, digest)
        digests.append(digest.hexdigest())
    assert len(set(digests)) == 1, f"the number of threads changes the result's bits: {digests}"
    print(digests[0])


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
