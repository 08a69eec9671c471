"""Global pooling of few large planes in CUDA: several blocks share a plane, and their sums are added up."""

from __future__ import annotations

import pytest
import torch
from helpers import dtype_id, integers

import pooling_ext.functional as F
from pooling_ext.backends import cuda_library
from pooling_ext.testing.cuda_counts import counted, thread_order
from pooling_ext.testing.tolerances import assert_close

CUDA = pytest.mark.parametrize(
    "backend", ["cuda", pytest.param("cuda-cuda", marks=pytest.mark.gpu)], indirect=True
)
FORMATS = pytest.mark.parametrize(
    "format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=dtype_id
)
#: Parts of one length; a last part that is shorter; sizes without vectors; a prime number of pixels, which
#: channels_last cannot be cut into equal parts; a plane that is no vector's multiple.
SHAPES = pytest.mark.parametrize(
    "shape",
    [(1, 2, 256, 512), (1, 3, 300, 300), (2, 16, 96, 96), (1, 4, 1, 40009), (1, 5, 251, 257)],
    ids=str,
)


@CUDA
@FORMATS
@DTYPES
@SHAPES
def test_add_relu_global_avg_pool(backend, shape, dtype, format):
    """Small integers, whose sums are exact."""
    x, residual = (integers(shape, dtype, -3, 3).contiguous(memory_format=format) for _ in range(2))
    grad = integers(shape[:2], dtype).view(*shape[:2], 1, 1)
    leaves = x.requires_grad_(), residual.requires_grad_()
    output = F.add_relu_global_avg_pool(*leaves)
    sums = (x.detach().double() + residual.detach().double()).relu()
    assert_close(output.detach(), sums.mean((2, 3), keepdim=True))
    shares = (grad.double() / (shape[2] * shape[3])).expand(shape).where(sums > 0, 0.0)
    for found in torch.autograd.grad(output, leaves, grad):
        assert_close(found, shares)


@CUDA
@FORMATS
@DTYPES
@SHAPES
def test_global_avg_pool(backend, shape, dtype, format):
    x = integers(shape, dtype, -3, 3).contiguous(memory_format=format)
    mean = x.double().mean((2, 3), keepdim=True)
    assert_close(F.global_avg_pool2d(x, keepdim=True), mean)
    assert_close(F.adaptive_avg_pool2d(x, 1), mean)
    assert_close(F.avg_pool2d(x, shape[2:], divisor_override=7), mean * (shape[2] * shape[3] / 7))


@CUDA
@pytest.mark.parametrize("pad", [True, False])
def test_what_an_average_counts(backend, pad):
    """Windows with padding are the whole plane only without it."""
    x = integers((1, 2, 300, 300), torch.float32, -3, 3)
    expected = torch.nn.functional.avg_pool2d(x.double(), 300, 300, 10, count_include_pad=pad)
    assert_close(F.avg_pool2d(x, 300, 300, 10, count_include_pad=pad), expected)


@CUDA
@FORMATS
@SHAPES
def test_max(backend, shape, format):
    """With ties, whose first wins, and in the last plane NaNs, whose last does."""
    x = integers(shape, torch.float32, -3, 3).contiguous(memory_format=format)
    x[-1, -1, 0, [5, 9]] = x[-1, -1, -1, -3] = float("nan")
    expected, indices = torch.nn.functional.max_pool2d(x.contiguous(), shape[2:], return_indices=True)
    for function in (F.max_pool2d, lambda x, _, **options: F.adaptive_max_pool2d(x, 1, **options)):
        values, ours = function(x, shape[2:], return_indices=True)
        torch.testing.assert_close(values.contiguous(), expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(ours.contiguous(), indices)
        assert torch.equal(function(x, shape[2:]).nan_to_num(9), values.nan_to_num(9))
    x = integers(shape, torch.int8, -100, 100).contiguous(memory_format=format)
    assert torch.equal(F.max_pool2d(x, shape[2:]), x.amax((2, 3), keepdim=True))


@CUDA
@FORMATS
@DTYPES
@SHAPES
def test_lp(backend, shape, dtype, format):
    x = integers(shape, dtype, -3, 3).contiguous(memory_format=format)
    sums = x.double().square().sum((2, 3), keepdim=True)
    assert_close(F.lp_pool2d(x, 2, shape[2:]), sums.sqrt())


@pytest.mark.skipif(not cuda_library.on_cpu(), reason="counted where the CUDA kernels run on the CPU")
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@FORMATS
@pytest.mark.parametrize("name", ["max", "max with indices", "lp"])
def test_many_blocks_share_a_window(backend, name, format):
    x = torch.randn(1, 64, 256, 256).contiguous(memory_format=format)
    calls = {
        "max": lambda: F.max_pool2d(x, 256),
        "max with indices": lambda: torch.stack(F.max_pool2d(x, 256, return_indices=True)),
        "lp": lambda: F.lp_pool2d(x, 2, 256),
    }
    with counted() as counts:
        first = calls[name]()
    kernels = sorted(counts, key=lambda kernel: "merge_parts" in kernel.kernel)
    assert ["merge_parts" in kernel.kernel for kernel in kernels] == [False, True]
    assert kernels[0].blocks == x.nbytes // 2**16  # as much as is worth a block
    assert sum(sum(kernel.moved) for kernel in counts) <= 1.02 * x.nbytes
    with thread_order(3):
        assert torch.equal(first, calls[name]())


@pytest.mark.skipif(not cuda_library.on_cpu(), reason="counted where the CUDA kernels run on the CPU")
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_many_blocks_read_each_element_once(backend, dtype, format):
    x, residual = (torch.randn(1, 64, 256, 256).to(dtype).contiguous(memory_format=format) for _ in range(2))
    for tensors, call in (
        (1, lambda: F.global_avg_pool2d(x)),
        (2, lambda: F.add_relu_global_avg_pool(x, residual)),
    ):
        with counted() as counts:
            first = call()
        names = [kernel.kernel.partition("<")[0].rpartition(":")[2] for kernel in counts]
        assert names == ["plane_means", "total_means"]
        assert counts[0].blocks == x.nbytes // 2**16  # as much as is worth a block
        assert sum(sum(kernel.moved) for kernel in counts) <= 1.02 * tensors * x.nbytes
        with thread_order(3):
            assert torch.equal(first, call())


@pytest.mark.skipif(not cuda_library.on_cpu(), reason="counted where the CUDA kernels run on the CPU")
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@FORMATS
def test_many_planes_take_one_kernel(backend, format):
    x = torch.randn(256, 96, 7, 7).contiguous(memory_format=format)
    for call in (
        lambda: F.global_avg_pool2d(x),
        lambda: F.add_relu_global_avg_pool(x, x),
        lambda: F.max_pool2d(x, 7),
        lambda: F.lp_pool2d(x, 2, 7),
    ):
        with counted() as counts:
            call()
        assert len(counts) == 1
