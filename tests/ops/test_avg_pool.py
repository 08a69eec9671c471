"""Average pooling: hand-computed tables, divisors, layouts and dtypes, padding beyond PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from helpers import (
    POOLING_BACKENDS,
    RANKS,
    assert_same,
    dtype_id,
    gradient,
    here,
    integers,
    our_op,
    shape_of,
    sweep,
)

import pooling_ext.functional as F
from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close
from pooling_ext.windows import fixed_windows

PLANE = torch.tensor([[[1.0, 5.0, 2.0], [3.0, 4.0, 9.0], [7.0, 8.0, 6.0]]])
SPATIAL = {1: (75,), 2: (5, 38), 3: (3, 4, 21)}


@POOLING_BACKENDS
@pytest.mark.parametrize(
    "kwargs, values",
    [
        pytest.param({"kernel_size": 2, "stride": 1}, [[3.25, 5.0], [5.5, 6.75]], id="2x2"),
        pytest.param({"kernel_size": 3}, [[5.0]], id="3x3"),
        pytest.param({"kernel_size": 2, "padding": 1}, [[0.25, 1.75], [2.5, 6.75]], id="padding-counts"),
        pytest.param(
            {"kernel_size": 2, "padding": 1, "count_include_pad": False},
            [[1.0, 3.5], [5.0, 6.75]],
            id="padding-left-out",
        ),
        # What ceil_mode adds past the padding is in no divisor.
        pytest.param({"kernel_size": 2, "ceil_mode": True}, [[3.25, 5.5], [7.5, 6.0]], id="ceil"),
        pytest.param(
            {"kernel_size": 2, "padding": 1, "ceil_mode": True},
            [[0.25, 1.75], [2.5, 6.75]],
            id="ceil-drops-last-window",
        ),
        pytest.param({"kernel_size": 3, "divisor_override": 1}, [[45.0]], id="sum"),
        pytest.param({"kernel_size": 3, "divisor_override": -5}, [[-9.0]], id="negative-divisor"),
        # (left, right, top, bottom): one column on the left, one row below.
        pytest.param({"kernel_size": 2, "padding": (1, 0, 0, 1)}, [[1.0, 5.0], [1.75, 3.5]], id="per-side"),
        pytest.param(
            {"kernel_size": 2, "padding": (1, 0, 0, 1), "count_include_pad": False},
            [[2.0, 5.0], [7.0, 7.0]],
            id="per-side-left-out",
        ),
        pytest.param({"kernel_size": 2, "padding": "same"}, [[3.25, 2.75], [3.75, 1.5]], id="same"),
        pytest.param(
            {"kernel_size": 2, "padding": "same", "count_include_pad": False},
            [[3.25, 5.5], [7.5, 6.0]],
            id="same-left-out",
        ),
    ],
)
def test_table(backend, kwargs, values):
    assert F.avg_pool2d(here(PLANE), **kwargs).tolist() == [values]


@POOLING_BACKENDS
def test_table_1d_and_3d(backend):
    line = torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0]])
    assert F.avg_pool1d(line, 2, 2, 1).tolist() == [[1.5, 2.5, 3.0]]
    assert F.avg_pool1d(line, 2, 2, 1, count_include_pad=False).tolist() == [[3.0, 2.5, 3.0]]
    cube = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert F.avg_pool3d(cube, 2).item() == 3.5
    assert F.avg_pool3d(cube, 2, divisor_override=7).item() == 4.0


@POOLING_BACKENDS
def test_table_backward(backend):
    incoming = torch.tensor([[[4.0, 8.0], [12.0, 16.0]]])
    _, grad = gradient(lambda x: F.avg_pool2d(x, 2, 1), here(PLANE), incoming)
    assert grad.tolist() == [[[1, 3, 2], [4, 10, 6], [3, 7, 4]]]


@POOLING_BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_sums_are_accumulated_in_float32(backend, dtype):
    """2048 + 63 ones: in 16 bits every addition of one to 2048 is lost."""
    x = torch.ones(1, 1, 8, 8, dtype=dtype)
    x[..., 0, 0] = 2048
    assert F.avg_pool2d(x, 8).item() == torch.tensor(2111 / 64).to(dtype).item()


@sweep(
    rank=RANKS,
    padding=["same", "valid", "per-side"],
    count_include_pad=[True, False],
    divisor=[None, 5],
    dtype=[torch.float32, torch.float64],
)
def test_padding_beyond_pytorch(backend, rank, padding, count_include_pad, divisor, dtype):
    x = integers(shape_of(backend, rank), dtype)
    pads = (2, 0, 1, 2, 0, 1)[: 2 * rank] if padding == "per-side" else padding
    extra = {} if rank == 1 else {"divisor_override": divisor}
    divisor = extra.get("divisor_override")
    windows = fixed_windows(rank, x.shape, 3, 2, pads, 1, False)

    def pool(x):
        return our_op(f"avg_pool{rank}d")(x, 3, 2, pads, count_include_pad=count_include_pad, **extra)

    output, grad = gradient(pool, x)
    assert_close(output, reference.avg_pool(x, windows, count_include_pad, divisor))
    ones = torch.ones_like(output)
    assert_close(grad, reference.avg_pool_backward(ones, x.shape[2:], windows, count_include_pad, divisor))


@POOLING_BACKENDS
@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
def test_per_side_padding_with_ceil_mode(backend, ceil_mode):
    x = integers((2, 3, 10, 13), torch.float64)
    windows = fixed_windows(2, x.shape, 4, 3, (3, 1, 0, 2), 1, ceil_mode)
    output = F.avg_pool2d(x, 4, 3, (3, 1, 0, 2), ceil_mode)
    assert_close(output, reference.avg_pool(x, windows))


@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}d".format)
@pytest.mark.parametrize("padding", [1, "same", (1, 0, 0, 1, 1, 1)], ids=["symmetric", "same", "per-side"])
def test_integers_keep_their_dtype(rank, padding):
    """PyTorch averages int64 too and rounds toward zero; padding must not change the dtype."""
    x = integers((2, 3, *SPATIAL[rank]), torch.int64)
    pads = padding[: 2 * rank] if isinstance(padding, tuple) else padding
    output = our_op(f"avg_pool{rank}d")(x, 2, 2, pads)
    windows = fixed_windows(rank, x.shape, 2, 2, pads, 1, False)
    assert output.dtype == torch.int64
    assert torch.equal(output, reference.avg_pool(x.double(), windows).trunc().to(torch.int64))


def test_gradient_is_exact_under_padding_in_channels_last():
    """A place where other libraries' channels_last gradients have been silently wrong."""
    x = torch.randn(2, 19, 9, 10, dtype=torch.float64)
    for kwargs in (
        {"padding": 1},
        {"padding": 1, "ceil_mode": True},
        {"padding": 1, "count_include_pad": False},
    ):
        _, expected = gradient(lambda x, kwargs=kwargs: TF.avg_pool2d(x, 3, 2, **kwargs), x)
        channels_last = x.to(memory_format=torch.channels_last)
        _, actual = gradient(lambda x, kwargs=kwargs: F.avg_pool2d(x, 3, 2, **kwargs), channels_last)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(actual, expected, check_stride=False)


@POOLING_BACKENDS
def test_unbatched_equals_batched(backend):
    x = torch.randn(3, 9, 9)
    assert_same(F.avg_pool2d(x, 3, 2, 1), F.avg_pool2d(x[None], 3, 2, 1)[0])
    _, one = gradient(lambda x: F.avg_pool2d(x, 3, 2, 1), x)
    _, many = gradient(lambda x: F.avg_pool2d(x, 3, 2, 1), x[None])
    assert_same(one, many[0])
