"""Lp pooling: hand-computed tables, PyTorch's formula and the safe one, every norm."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import (
    POOLING_BACKENDS,
    dtype_id,
    gradient,
    here,
    integers,
    our_op,
    torch_op,
)

import pooling_ext.functional as F
from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close
from pooling_ext.windows import fixed_windows

INF = math.inf
PLANE = torch.tensor([[[3.0, 4.0, 0.0], [0.0, 0.0, 12.0], [-6.0, 8.0, 0.0]]])
SPATIAL = {1: (75,), 2: (5, 38), 3: (3, 4, 21)}


@POOLING_BACKENDS
@pytest.mark.parametrize(
    "norm, kwargs, values",
    [
        pytest.param(2, {"kernel_size": (1, 2)}, [[5], [0], [10]], id="euclidean"),
        pytest.param(1, {"kernel_size": (1, 2)}, [[7], [0], [2]], id="sum-keeps-its-sign"),
        pytest.param(1, {"kernel_size": (1, 2), "safe": True}, [[7], [0], [14]], id="safe-sum-of-magnitudes"),
        pytest.param(INF, {"kernel_size": (1, 2)}, [[4], [0], [8]], id="inf-is-the-largest"),
        pytest.param(-INF, {"kernel_size": (1, 2)}, [[3], [0], [6]], id="minus-inf-is-the-smallest"),
        pytest.param(2, {"kernel_size": (3, 1)}, [[45**0.5, 80**0.5, 12]], id="columns"),
        # The second window holds one element of two, and is scaled up to a whole one.
        pytest.param(
            2,
            {"kernel_size": (1, 2), "ceil_mode": True},
            [[5, 0], [0, 288**0.5], [10, 0]],
            id="ceil-scales-up",
        ),
        pytest.param(2, {"kernel_size": 2, "padding": (1, 0, 1, 0)}, [[3, 4], [6, 208**0.5]], id="per-side"),
    ],
)
def test_table(backend, norm, kwargs, values):
    expected = torch.tensor([values], dtype=torch.float32)
    torch.testing.assert_close(F.lp_pool2d(here(PLANE), norm, **kwargs), expected, rtol=1e-6, atol=0)


@POOLING_BACKENDS
def test_odd_norm_of_a_negative_sum_is_nan_unless_safe(backend):
    x = torch.tensor([[-1.0, -2.0]])
    assert math.isnan(F.lp_pool1d(x, 3, 2).item())
    torch.testing.assert_close(F.lp_pool1d(x, 3, 2, safe=True).item(), 9 ** (1 / 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", [1, 2, 2.0, 3, 4, 5, 8, 9, 0.5, 1.5, 2.5, -1, -2, INF, -INF], ids=str)
@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}d".format)
def test_every_norm_against_torch(rank, ceil_mode, norm):
    """Positive inputs, where every norm is defined; values and gradients."""
    x = torch.rand(2, 3, *SPATIAL[rank], dtype=torch.float64) + 0.1
    name = f"lp_pool{rank}d"
    actual, grad = gradient(lambda x: our_op(name)(x, norm, 3, 2, ceil_mode), x)
    expected, expected_grad = gradient(lambda x: torch_op(name)(x, norm, 3, 2, ceil_mode), x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(our_op(name)(x, norm, 3, 2, ceil_mode, safe=True), expected)


@pytest.mark.parametrize("norm", [1, 2, 3, 4], ids=str)
def test_signs_against_torch(norm):
    """Inputs of both signs, zeros among them: the same NaN in the same positions, and the same gradients."""
    x = integers((2, 3, 12, 12), torch.float64, -2, 2)
    actual = gradient(lambda x: F.lp_pool2d(x, norm, 2), x)
    expected = gradient(lambda x: torch_op("lp_pool2d")(x, norm, 2), x)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@POOLING_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=dtype_id)
def test_safe_squares_do_not_overflow(backend, dtype):
    """300 ** 2 is past float16's largest number, the norm is not."""
    x = torch.full((1, 1, 4, 4), 300.0, dtype=dtype)
    output = F.lp_pool2d(x, 2, 2, safe=True)
    assert output.dtype == dtype
    assert torch.equal(output, torch.full((1, 1, 2, 2), 600.0, dtype=dtype))


@POOLING_BACKENDS
@pytest.mark.parametrize("norm", [1, 2, 3, 4, 1.5, 2.5, INF], ids=str)
def test_safe_gradient_is_finite_at_zero(backend, norm):
    x = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    x[:, 0] = integers((4, 4), torch.float64, -2, 2)
    output, grad = gradient(lambda x: F.lp_pool2d(x, norm, 2, safe=True), x)
    assert output.isfinite().all() and grad.isfinite().all()
    assert (output[:, 1] == 0).all()
    if norm != INF:
        assert (grad[:, 1] == 0).all()


@pytest.mark.parametrize("norm", [1, 2, 3, 1.5], ids=str)
@pytest.mark.parametrize("padding", ["same", "valid", (2, 0, 1, 2)], ids=str)
def test_padding_beyond_pytorch(padding, norm):
    x = torch.rand(2, 3, 11, 38, dtype=torch.float64)
    windows = fixed_windows(2, x.shape, 3, 2, padding, 1, False)
    expected = reference.lp_pool(x, norm, windows)
    assert_close(F.lp_pool2d(x, norm, 3, 2, padding=padding), expected)
    assert_close(F.lp_pool2d(-x, norm, 3, 2, padding=padding, safe=True), expected)
