"""A compact check of the CPU kernels, for one instruction set: test_isa.py runs it in a process of its own.

Prints the instruction set in use, then a digest of every result's bits.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Iterator

import torch
from helpers import FLOATS, INTEGERS, gradient, integers, our_op, torch_op, with_layout
from torch import Tensor

from pooling_ext.backends import cpu_library
from pooling_ext.testing.tolerances import assert_close

LAYOUTS = ("contiguous", "channels_last", "sliced", "offset")
#: Wide enough for AVX-512 vectors and a tail of each dtype, along channels and along rows.
SHAPES = {2: (2, 67, 5, 69), 3: (1, 35, 3, 4, 35)}
FORWARD = [("max_pool", (3, 2, 1)), ("max_pool", (2, 2)), ("max_pool", (3, 1, 1)), ("max_pool", (2, 3))]
TRAINING = [
    ("max_pool", (3, 2, 1)),
    ("max_pool", (2, 2)),
    ("avg_pool", (3, 2, 1)),
    ("avg_pool", (3, 1, 1)),
    ("avg_pool", (2, 2)),
    ("lp_pool", (2, 2)),
    ("adaptive_max_pool", (3,)),
    ("adaptive_avg_pool", (3,)),
    ("adaptive_avg_pool", (1,)),
]


def results(rank: int, layout: str, dtype: torch.dtype, compare: bool) -> Iterator[Tensor]:
    """Every operator's outputs, indices and gradients, compared with PyTorch's in float64 if asked."""
    x = with_layout(integers(SHAPES[rank], dtype, 1, 7), layout)
    for kind, args in FORWARD:
        name = f"{kind}{rank}d"
        output, indices = our_op(name)(x, *args, return_indices=True)
        plain = our_op(name)(x, *args)
        yield from (output, indices, plain)
        if compare:
            expected, places = torch_op(name)(x.double(), *args, return_indices=True)
            assert_close(output, expected, exact=True, what=name)
            assert torch.equal(plain, output) and torch.equal(indices, places), name
    for kind, args in TRAINING if dtype.is_floating_point else ():
        name = f"{kind}{rank}d"
        grad = integers(our_op(name)(x, *args).shape, dtype)
        ours = gradient(lambda x, name=name, args=args: our_op(name)(x, *args), x, grad)
        yield from ours
        if compare:
            wide = (x.double(), grad.double())
            theirs = gradient(lambda x, name=name, args=args: torch_op(name)(x, *args), *wide)
            for one, other in zip(ours, theirs, strict=True):
                assert_close(one, other, exact="max" in name, scale=16 if "lp" in name else 2, what=name)


def digest(threads: int, compare: bool) -> str:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    bits = hashlib.sha256()
    for rank in SHAPES:
        for layout in LAYOUTS:
            for dtype in FLOATS + INTEGERS:
                for result in results(rank, layout, dtype, compare):
                    bits.update(result.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


def main() -> None:
    if cpu_library.module is None:
        sys.exit(f"no compiled kernels: {cpu_library.why_not}")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    print(cpu_library.module.isa)
    one, two = digest(1, compare=True), digest(2, compare=False)
    assert one == two, "one thread and two give different bits"
    print(one)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
