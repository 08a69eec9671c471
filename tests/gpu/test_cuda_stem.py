"""The CUDA kernels of batch norm, ReLU and max pooling: which win, to the bit, and what is kept of them."""

from __future__ import annotations

import pytest
import torch
from cuda_max_pool_cases import DTYPES, VALUES, draw, formats, windows
from helpers import dtype_id

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.backends import cuda_library
from pooling_ext.ops.activations import IDENTITY
from pooling_ext.testing.cuda_counts import counted
from pooling_ext.windows import Windows, fixed_windows

pytestmark = pytest.mark.skipif(
    not cuda_library.on_cpu(), reason="needs the CUDA kernels as a library for the CPU"
)
ops = torch.ops.pooling_ext
#: Vectors of 16 bytes, of 8, and none; more rows than a thread walks; rows and columns left over.
SHAPES = [(16, 37, 16), (8, 6, 24), (3, 5, 7), (1, 20, 8)]


def norm_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Statistics, weight and bias of each channel, of either sign and zero, and eps."""
    channels = torch.arange(x.shape[1], dtype=torch.float64)
    stats = torch.stack((channels / 8 - 0.5, 1 + channels / 4))
    weight = torch.tensor([1.5, -0.75, 0.3, -2.0, 0.0])[torch.arange(x.shape[1]) % 5]
    return stats, weight, (channels / 16 - 0.25).float(), 1e-3


def agree(x: torch.Tensor, window: Windows, kernel: str) -> None:
    """With the operators in turn: the output, whose element it is, and that element."""
    stats, weight, bias, eps = norm_of(x)
    with pooling_ext.use_backend("cuda"):
        normal = ops.batch_norm_act_elemt(x, stats, weight, bias, None, eps, *IDENTITY.arguments)
        largest, offsets = ops.max_pool_with_offsets(normal, *window, False)
        elements = ops.max_pool_gather(x, offsets, *window)
        with counted() as counts:
            plain = ops.batch_norm_relu_max_pool(x, stats, weight, bias, eps, *window)
            found = ops.batch_norm_relu_max_pool_winners(x, stats, weight, bias, eps, *window)
    names = [count.kernel.replace("{anonymous}::", "") for count in counts]
    assert len([name for name in names if kernel in name]) == 2, names
    output = torch.where(largest < 0, 0, largest)
    for actual, expected in zip((plain, *found), (output, output, offsets, elements), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        number = ~expected.isnan()
        assert torch.equal(actual.signbit()[number], expected.signbit()[number])


@formats
@windows
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("values", ["random", *VALUES])
def test_winners_are_those_of_two_operators(window, dtype, format, values):
    for ceil_mode, shape in enumerate(SHAPES):
        if values == "random":
            x = torch.randn(2, *shape).to(dtype).contiguous(memory_format=format)
        else:
            x = draw(values, (2, *shape), dtype, format)
        agree(x, fixed_windows(2, x.shape, *window, 1, ceil_mode % 2 == 0), "max_pool_rows<Normalized")


@formats
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=dtype_id)
def test_other_windows(dtype, format):
    for channels in (16, 5):
        x = torch.randn(2, channels, 14, 19).to(dtype).contiguous(memory_format=format)
        agree(x, fixed_windows(2, x.shape, (2, 5), (3, 2), (1, 2), 1, False), "pool_pixels<NormalMaxOp")


@formats
def test_backward_reads_no_input_by_its_offsets(format):
    """The sums are those of a batch norm of what won."""
    x = torch.randn(2, 16, 24, 32).contiguous(memory_format=format).requires_grad_()
    weight = torch.rand(16, requires_grad=True)
    with pooling_ext.use_backend("cuda"):
        output = F.batch_norm_relu_max_pool(x, None, None, weight, training=True)
        with counted() as counts:
            torch.autograd.grad(output, (x, weight), torch.ones_like(output))
    read = {count.kernel.partition("<")[0].rpartition(":")[2]: count.moved[0] for count in counts}
    assert set(read) == {"sums_parts", "total_sums", "write_coefficients", "max_pool_cells"}
    assert 2 * output.nbytes <= read["sums_parts"] <= 2.2 * output.nbytes
