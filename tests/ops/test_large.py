"""More than 2 ** 31 elements: every index and offset must be 64 bits wide."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers import gradient, on_gpus, our_op
from torch import Tensor

import pooling_ext.functional as F

# Filling gigabytes with NaN first would take longer than the tests.
pytestmark = [pytest.mark.large, pytest.mark.native, pytest.mark.no_poison, on_gpus("default")]

#: One plane of more than 2 ** 31 elements, and as many over several channels.
SHAPES = {"contiguous": (1, 1, 2**16 + 8, 2**15), "channels_last": (1, 8, 2**14 + 2, 2**14)}
GIB = 2**30


def available_bytes() -> int:
    """What the default device can still give, by the kernel's estimate; 0 where it cannot be known."""
    if torch.get_default_device().type == "cuda":
        return torch.cuda.mem_get_info()[0]
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


class Marked(NamedTuple):
    """Zeros in bfloat16 with 1, 2, 3, ... at ``marks``, each in a window of its own."""

    x: Tensor
    marks: list[tuple[int, int, int, int]]


@pytest.fixture(params=sorted(SHAPES))
def marked(request, backend) -> Marked:
    needed = 13 * GIB
    if available_bytes() < needed:
        pytest.skip(f"needs {needed // GIB} GiB of free memory, has {available_bytes() / GIB:.1f}")
    shape = SHAPES[request.param]
    memory_format = getattr(
        torch, f"{request.param}_format" if request.param == "contiguous" else request.param
    )
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=memory_format).zero_()
    assert x.numel() > 2**31
    _, channels, height, width = shape
    marks = [
        (0, 0, 0, 0),
        (0, channels - 1, height - 1, width - 1),
        (0, channels - 1, height - 200, 5),
        (0, channels // 2, height - 500, width // 2),
        (0, channels // 3, 1007, 909),
    ]
    for value, mark in enumerate(marks, 1):
        x[mark] = value
    return Marked(x, marks)


def test_forward(marked):
    x, marks = marked
    largest = F.max_pool2d(x, 2)
    for value, (n, c, i, j) in enumerate(marks, 1):
        assert largest[n, c, i // 2, j // 2] == value
    assert largest.count_nonzero() == len(marks)
    del largest
    mean = F.avg_pool2d(x, 2)
    for value, (n, c, i, j) in enumerate(marks, 1):
        assert mean[n, c, i // 2, j // 2] == value / 4
    assert mean.count_nonzero() == len(marks)


def test_indices(marked):
    """Indices in the plane; past 2 ** 31 where there is one plane."""
    x, marks = marked
    width = x.shape[3]
    largest, indices = F.max_pool2d(x, 128, ceil_mode=True, return_indices=True)
    for value, (n, c, i, j) in enumerate(marks, 1):
        assert largest[n, c, i // 128, j // 128] == value
        assert indices[n, c, i // 128, j // 128] == i * width + j
    largest, indices = F.adaptive_max_pool2d(x, 1, return_indices=True)
    for c in {mark[1] for mark in marks}:
        value, (_, _, i, j) = max((value, mark) for value, mark in enumerate(marks, 1) if mark[1] == c)
        assert largest[0, c] == value
        assert indices[0, c] == i * width + j


def test_global_average(marked):
    x, marks = marked
    sums = [sum(value for value, mark in enumerate(marks, 1) if mark[1] == c) for c in range(x.shape[1])]
    expected = torch.tensor(sums, device=x.device) / (x.shape[2] * x.shape[3])
    torch.testing.assert_close(F.global_avg_pool2d(x, False)[0].float(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
def test_backward(name, marked):
    """A gradient for the windows of the marks, and none elsewhere."""
    x, marks = marked
    grad = torch.zeros_like(x[..., ::2, ::2])
    for value, (n, c, i, j) in enumerate(marks, 1):
        grad[n, c, i // 2, j // 2] = 4 * value
    _, actual = gradient(lambda x: our_op(name)(x, 2), x, grad)
    for value, mark in enumerate(marks, 1):
        assert actual[mark] == (4 * value if name == "max_pool2d" else value)
    assert actual.count_nonzero() == len(marks) * (1 if name == "max_pool2d" else 4)


def test_many_planes(backend):
    """Many small planes: the offset of a plane is what passes 2 ** 31."""
    if available_bytes() < 10 * GIB:
        pytest.skip(f"needs 10 GiB of free memory, has {available_bytes() / GIB:.1f}")
    x = torch.zeros(2**13 + 1, 2**10, 16, 16, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-1, -1, 5, 9] = 3
    x[-1, 0, 0, 0] = 2
    x[0, 0, 15, 15] = 1
    for output, scale in ((F.max_pool2d(x, 4), 1), (F.avg_pool2d(x, 4), 16), (F.lp_pool2d(x, 2, 4), 1)):
        assert output[-1, -1, 1, 2] == 3 / scale
        assert output[-1, 0, 0, 0] == 2 / scale
        assert output[0, 0, 3, 3] == 1 / scale
        assert output.count_nonzero() == 3
