"""Winograd's operators for one instruction set: test_winograd.py runs it in a process of its own.

Prints the instruction set in use, once results were compared with float64's and are the same bits for 1, 2, 3
and 64 threads.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as TF
from helpers import FLOATS
from torch import Tensor

from pooling_ext.backends import cpu_library
from pooling_ext.ops import winograd

THREADS = (1, 2, 3, 64)
#: Batch, channels and features of a group, groups, planes, size, padding, stride, dilation: tails of every
#: vector, few tiles of many channels, and the reverse.
CASES = (
    (2, 20, 37, 1, 1, (13, 10), (1, 1, 1, 1), (1, 1), (1, 1)),
    (1, 70, 48, 1, 1, (7, 7), (0, 2, 3, 1), (1, 1), (1, 1)),
    (3, 16, 16, 3, 1, (9, 22), (2, 0, 0, 2), (1, 1), (1, 1)),
    (5, 33, 17, 1, 1, (26, 30), (1, 1, 1, 1), (1, 1), (1, 1)),
    (2, 20, 37, 1, 1, (13, 10), (1, 1, 1, 1), (2, 2), (1, 1)),
    (1, 16, 24, 2, 1, (25, 29), (1, 3, 0, 2), (2, 2), (1, 1)),
    (2, 17, 32, 1, 1, (13, 20), (2, 3, 2, 3), (1, 1), (2, 3)),
    (2, 20, 18, 1, 3, (5, 9, 10), (1, 1, 1, 1, 1, 1), (1, 1, 1), (1, 1, 1)),
    (1, 16, 33, 1, 2, (6, 9, 7), (1, 1, 1, 0, 1, 1), (1, 2, 2), (2, 1, 1)),
)
#: Largest error of a result, relative to its largest element.
ERRORS = {torch.float32: 2e-5, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def results(case: tuple, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Each operator's result and what it should be."""
    batch, channels, features, groups, planes, size, padding, *steps = case
    rank = len(size)
    format = torch.channels_last if rank == 2 else torch.channels_last_3d
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x = normal(batch, channels * groups, *size).to(memory_format=format)
    weight = normal(features * groups, channels, *(planes, 3, 3)[3 - rank :]) / (9 * planes * channels) ** 0.5
    bias = normal(features * groups)
    wide = [value.double().requires_grad_() for value in (x, weight)]
    sides = [side for axis in reversed(range(rank)) for side in (padding[axis], padding[rank + axis])]
    convolution = TF.conv2d if rank == 2 else TF.conv3d
    expected = convolution(TF.pad(wide[0], sides), wide[1], bias.double(), steps[0], 0, steps[1], groups)
    grad = normal(*expected.shape)
    of_x, of_weight = torch.autograd.grad(expected, wide, grad.double())
    transformed = winograd.winograd_weight(weight, groups, False, steps[0][-1])
    out = features * groups
    yield (
        winograd.winograd_conv(x, transformed, bias, None, padding, out, groups, 1, 0.0, *steps),
        expected.detach().relu(),
    )
    # The weight as it is: it is transformed inside, in as many parts as the number of threads asks for.
    output, stats = winograd.winograd_conv_stats(x, weight, bias, padding, out, groups, *steps)
    stored = output.double()
    var, mean = torch.var_mean(stored, (0, *range(2, stored.dim())), correction=0)
    yield output, expected.detach()
    yield stats, torch.stack((mean, var))
    yield winograd.winograd_input_grad(grad, weight, padding, groups, *steps, x.shape), of_x
    yield winograd.winograd_weight_grad(x, grad, padding, groups, *steps, weight.shape), of_weight


def main() -> None:
    if cpu_library.module is None:
        sys.exit(f"no compiled kernels: {cpu_library.why_not}")
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    for dtype in FLOATS:
        for case in CASES:
            first: list[Tensor] = []
            for threads in THREADS:
                torch.set_num_threads(threads)
                found = list(results(case, dtype))
                if not first:
                    first = [actual for actual, _ in found]
                    for i, (actual, expected) in enumerate(found):
                        error = (actual.double() - expected).abs().max() / expected.abs().max()
                        bound = 1e-5 if i == 2 else ERRORS[dtype]
                        assert error <= bound, f"{dtype} {case} result {i}: off by {float(error):.2g}"
                for i, (one, (other, _)) in enumerate(zip(first, found, strict=True)):
                    assert torch.equal(one, other), f"{dtype} {case} result {i}: {threads} threads differ"
    print(cpu_library.module.isa)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
