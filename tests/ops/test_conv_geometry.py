"""Convolutions of random geometry, with what is fused into them, by our kernels for GPUs."""

from __future__ import annotations

import pytest
import torch
from conv_cases import (
    EPS,
    KERNELS,
    Conv,
    assert_rounded,
    assert_stats,
    exact_norm,
    input_grad,
    kernels,
    normalize,
    weight_grad,
)

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from pooling_ext.ops.conv import conv_input_grad, conv_weight_grad

pytestmark = pytest.mark.usefixtures("allow_tf32")


@KERNELS
@settings(max_examples=10)
@given(data=st.data())
def test_any_geometry(backend, data):
    def pair(low: int, high: int) -> tuple[int, int]:
        return data.draw(st.integers(low, high)), data.draw(st.integers(low, high))

    kernel_size, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 3), pair(1, 3)
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for k, p, d in zip(kernel_size, padding, dilation, strict=True)]
    size = [least[axis] + data.draw(st.integers(0, 6)) for axis in (0, 1)]
    batch, channels, features = (data.draw(st.integers(1, most)) for most in (3, 20, 20))
    conv = Conv((batch, channels, *size), features, kernel_size, stride, padding, dilation)
    x, weight, norm = conv.input(torch.float32), conv.weight(torch.float32), exact_norm(channels)
    ops = kernels(backend)
    actual, stats = ops.conv_stats(x, weight, None, *norm.values(), EPS, True, *conv.window)
    assert_rounded(actual, conv.expected(normalize(x, norm, True), weight))
    assert_stats(stats, actual)
    if backend == "cuda":
        return  # the gradient is Triton's
    grad = conv.output(torch.float32)
    actual, sums = conv_input_grad(grad, weight, x.shape, x, *norm.values(), EPS, True, *conv.window)
    expected, expected_sums = input_grad(conv, grad, weight, x, relu=True, **norm)
    assert_rounded(actual, expected)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-6, atol=1e-3)
    actual = conv_weight_grad(grad, x, weight.shape, *norm.values(), EPS, True, *conv.window)
    assert_rounded(actual, weight_grad(conv, grad, x, norm, relu=True))
