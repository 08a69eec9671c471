"""Global pooling: hand-computed tables, keepdim, layouts and dtypes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    FLOATS,
    POOLING_BACKENDS,
    gradient,
    here,
    integers,
    require_native,
    sweep,
    with_layout,
)

import pooling_ext.functional as F
from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close
from pooling_ext.windows import global_windows

PLANES = torch.tensor([[[3.0, -1.0], [0.0, 4.0]], [[1.0, 2.0], [2.0, 0.0]]])


@POOLING_BACKENDS
def test_table(backend):
    planes = here(PLANES)
    assert F.global_avg_pool2d(planes).tolist() == [[[1.5]], [[1.25]]]
    assert F.global_max_pool2d(planes).tolist() == [[[4]], [[2]]]
    torch.testing.assert_close(F.global_lp_pool2d(planes, 2).flatten().tolist(), [26**0.5, 3.0])
    assert F.global_lp_pool2d(planes, 1).flatten().tolist() == [6, 5]
    assert F.global_lp_pool2d(planes, 1, safe=True).flatten().tolist() == [8, 5]
    assert F.global_lp_pool2d(planes, math.inf).flatten().tolist() == [4, 2]


@pytest.mark.parametrize("keepdim", [True, False], ids=["keepdim", "flat"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_shapes(batched, keepdim):
    x = torch.rand((5, 3, 7, 6) if batched else (3, 7, 6))
    shape = (*x.shape[:-2], 1, 1) if keepdim else tuple(x.shape[:-2])
    for output in (
        F.global_avg_pool2d(x, keepdim),
        F.global_max_pool2d(x, keepdim=keepdim),
        F.global_lp_pool2d(x, 2, keepdim),
    ):
        assert output.shape == shape


@sweep(size=[(7, 7), (1, 1), (1, 40), (13, 18)], layout=["contiguous", "channels_last"])
def test_against_reference(backend, size, layout):
    numbers = integers((3, 37, *size), torch.float64)
    x = with_layout(numbers, layout)
    windows = global_windows(2, x.shape)
    mean = reference.avg_pool(x, windows)
    mean_grad = reference.avg_pool_backward(torch.ones_like(mean), size, windows)
    largest, indices = reference.max_pool(x, windows)
    largest_grad = reference.max_pool_backward(torch.ones_like(mean), indices, size)
    for dtype in FLOATS:
        x = with_layout(numbers.to(dtype), layout)
        output, grad = gradient(F.global_avg_pool2d, x)
        assert output.dtype == grad.dtype == dtype
        assert_close(output, mean, what=f"mean in {dtype}")
        assert_close(grad, mean_grad, what=f"gradient of the mean in {dtype}")
        output, grad = gradient(F.global_max_pool2d, x)
        assert_close(output, largest, exact=True, what=f"maximum in {dtype}")
        assert_close(grad, largest_grad, exact=True, what=f"gradient of the maximum in {dtype}")


@sweep(safe=[False, True], norm=[1, 2, 3, 2.5, math.inf], dtype=FLOATS)
def test_lp_against_reference(backend, safe, norm, dtype):
    if dtype in (torch.bfloat16, torch.float16) and not safe and backend == "default":
        # PyTorch's own composition rounds to 16 bits at every step.
        require_native()
    x = (torch.rand(3, 5, 9, 8) + 0.5).to(dtype)
    output, grad = gradient(lambda x: F.global_lp_pool2d(x, norm, safe=safe), x)
    assert output.dtype == dtype
    # 2.5 has no kernel of its own: its powers are rounded to the dtype one by one.
    scale = 8 if norm == 2.5 else 1
    assert_close(output, reference.lp_pool(x, norm, global_windows(2, x.shape), safe), scale=scale)
    if math.isfinite(norm):
        x = x.double()
        expected = (x / x.pow(norm).sum((-2, -1), keepdim=True).pow(1 / norm)).pow(norm - 1)
        assert_close(grad, expected, scale=8)


@POOLING_BACKENDS
def test_a_long_sum_stays_accurate(backend):
    """The mean of a plane with a large offset: errors must not grow with its size."""
    x = 1000 + torch.rand(1, 4, 512, 512)
    torch.testing.assert_close(
        F.global_avg_pool2d(x).double(), x.double().mean((-2, -1), True), rtol=1e-6, atol=0
    )
