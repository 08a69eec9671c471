"""The CUDA kernels of max pooling for the windows that CNNs use, at borders and with special values."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_max_pool_cases import DTYPES, INF, VALUES, draw, dtypes, formats, windows
from helpers import dtype_id

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.backends import cuda_library
from pooling_ext.testing.cuda_counts import counted

pytestmark = pytest.mark.skipif(
    not cuda_library.on_cpu(), reason="needs the CUDA kernels as a library for the CPU"
)


def agree(x: torch.Tensor, kernel: int, stride: int, padding, ceil_mode: bool) -> None:
    """Values with the signs of zeros, indices, and the gradient by the bytes kept in training."""
    expected, indices = torch.nn.functional.max_pool2d(
        x.contiguous(), kernel, stride, padding, 1, ceil_mode, return_indices=True
    )
    with pooling_ext.use_backend("cuda"), counted() as counts:
        actual, ours = F.max_pool2d(x, kernel, stride, padding, 1, ceil_mode, return_indices=True)
        plain = F.max_pool2d(x, kernel, stride, padding, 1, ceil_mode)
        leaf = x.detach().clone().requires_grad_()
        trained = F.max_pool2d(leaf, kernel, stride, padding, 1, ceil_mode)
        grad = torch.arange(trained.numel(), dtype=torch.float32).reshape(trained.shape).remainder(8)
        trained.backward(grad.to(x.dtype))
    assert any("max_pool_rows" in kernel.kernel for kernel in counts)
    for result in (actual, plain, trained.detach()):
        torch.testing.assert_close(result.contiguous(), expected, rtol=0, atol=0, equal_nan=True)
        number = ~expected.isnan()
        assert torch.equal(result.signbit()[number], expected.signbit()[number])
    assert torch.equal(ours.contiguous(), indices)
    expected = torch.zeros(*x.shape[:2], x[0, 0].numel())
    expected.scatter_add_(2, indices.flatten(2), grad.to(x.dtype).float().flatten(2))
    torch.testing.assert_close(leaf.grad.contiguous().float(), expected.reshape(x.shape), rtol=0, atol=0)


@dtypes
@formats
@windows
@pytest.mark.parametrize("values", VALUES)
def test_values_indices_and_gradients_are_pytorchs(window, dtype, format, values):
    # Vectors of 16 bytes, of 8, and none; more rows than a thread walks; rows and columns left over.
    for channels, height, width in [(16, 37, 16), (8, 6, 24), (3, 5, 7), (16, 4, 9), (1, 20, 8)]:
        for ceil_mode in (False, True):
            agree(draw(values, (2, channels, height, width), dtype, format), *window, ceil_mode)


@formats
@windows
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
def test_the_smallest_planes(window, dtype, format):
    for height, width, ceil_mode in itertools.product(range(1, 6), (1, 2, 3, 5, 8), (False, True)):
        if not ceil_mode and min(height, width) + 2 * window[2] < window[0]:
            continue
        if min(height, width) < window[0] - window[2]:
            continue
        agree(draw("ties", (1, 8, height, width), dtype, format), *window, ceil_mode)


@dtypes
@formats
def test_windows_in_the_padding_alone_are_empty(dtype, format):
    """They are the general kernel's, since clamped addresses would find an element."""
    x = draw("ties", (1, 8, 5, 8), dtype, format)
    with pooling_ext.use_backend("cuda"), counted() as counts:
        result = torch.ops.pooling_ext.max_pool(x, [8, 11], [3, 3], [1, 1], [1, 4, 1, 4], [1, 1])
    assert not any("max_pool_rows" in kernel.kernel for kernel in counts)
    padded = torch.nn.functional.pad(x.contiguous(), (1, 4, 1, 4), value=-INF)
    expected = torch.nn.functional.max_pool2d(padded, 3, 1)
    assert torch.equal(result.contiguous(), expected) and bool((expected == -INF).any())
