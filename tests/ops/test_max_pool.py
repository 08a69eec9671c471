"""Max pooling: hand-computed tables, layouts and dtypes, padding beyond PyTorch, what autograd sees."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from helpers import (
    POOLING_BACKENDS,
    RANKS,
    assert_same,
    gradient,
    here,
    integers,
    our_op,
    shape_of,
    sweep,
    torch_op,
)

import pooling_ext.functional as F
from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close
from pooling_ext.windows import fixed_windows

PLANE = torch.tensor(
    [[[1.0, 5.0, 2.0, 0.0], [3.0, 4.0, 9.0, 8.0], [7.0, 7.0, 6.0, 6.0], [-1.0, 2.0, 6.0, 6.5]]]
)
SPATIAL = {1: (75,), 2: (5, 38), 3: (3, 4, 21)}


@POOLING_BACKENDS
@pytest.mark.parametrize(
    "kwargs, values, indices",
    [
        pytest.param({"kernel_size": 2}, [[5, 9], [7, 6.5]], [[1, 6], [8, 15]], id="2x2"),
        pytest.param(
            {"kernel_size": 3, "stride": 2, "padding": 1},
            [[5, 9], [7, 9]],
            [[1, 6], [8, 6]],
            id="3x3-stride-2-padded",
        ),
        pytest.param(
            {"kernel_size": 3, "stride": 2, "ceil_mode": True},
            [[9, 9], [7, 6.5]],
            [[6, 6], [8, 15]],
            id="ceil",
        ),
        pytest.param(
            {"kernel_size": 2, "stride": 1, "dilation": 2}, [[7, 7], [9, 8]], [[8, 9], [6, 7]], id="dilated"
        ),
        pytest.param({"kernel_size": (1, 4)}, [[5], [9], [7], [6.5]], [[1], [6], [8], [15]], id="rows"),
        # (left, right, top, bottom): columns from -1, rows to 4.
        pytest.param(
            {"kernel_size": 2, "padding": (1, 0, 0, 1)}, [[3, 9], [7, 7]], [[4, 6], [8, 9]], id="per-side"
        ),
        pytest.param(
            {"kernel_size": 3, "stride": 3, "padding": "same"},
            [[5, 9], [7, 6.5]],
            [[1, 6], [8, 15]],
            id="same",
        ),
        pytest.param({"kernel_size": 3, "padding": "valid"}, [[9]], [[6]], id="valid"),
    ],
)
def test_table(backend, kwargs, values, indices):
    output, found = F.max_pool2d(here(PLANE), **kwargs, return_indices=True)
    assert output.tolist() == [values]
    assert found.tolist() == [indices]
    assert F.max_pool2d(here(PLANE), **kwargs).tolist() == [values]


@POOLING_BACKENDS
def test_table_backward(backend):
    _, grad = gradient(
        lambda x: F.max_pool2d(x, 3, 2, 1), here(PLANE), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    )
    assert grad.tolist() == [[[0, 1, 0, 0], [0, 0, 6, 0], [3, 0, 0, 0], [0, 0, 0, 0]]]


@POOLING_BACKENDS
def test_table_1d_and_3d(backend):
    line = torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]])
    assert F.max_pool1d(line, 3, 2, 1).tolist() == [[3, 4, 9, 9]]
    cube = torch.arange(8.0).reshape(1, 2, 2, 2)
    output, indices = F.max_pool3d(cube, 2, return_indices=True)
    assert (output.item(), indices.item()) == (7, 7)


@pytest.mark.parametrize("kernel", [(15, 17), (16, 16), (1, 255), (20, 20)], ids=str)
def test_windows_around_one_byte_of_offsets(kernel):
    """255 elements are the most that one saved byte can tell apart."""
    x = torch.randperm(2 * 40 * 300).to(torch.float64).reshape(1, 2, 40, 300)
    # The last element of the first window is its winner, the highest offset there is.
    x[..., kernel[0] - 1, kernel[1] - 1] = 1e6
    actual = gradient(lambda x: F.max_pool2d(x, kernel, 1), x)
    assert_same(actual, gradient(lambda x: TF.max_pool2d(x, kernel, 1), x))


@sweep(rank=RANKS, padding=["same", "valid", "per-side"], dtype=[torch.float32, torch.bfloat16, torch.int32])
def test_padding_beyond_pytorch(backend, rank, padding, dtype):
    x = integers(shape_of(backend, rank), dtype)
    pads = (2, 0, 1, 2, 0, 1)[: 2 * rank] if padding == "per-side" else padding
    windows = fixed_windows(rank, x.shape, 3, 2, pads, 1, False)
    expected, indices = reference.max_pool(x, windows)
    output, found = our_op(f"max_pool{rank}d")(x, 3, 2, pads, return_indices=True)
    assert_close(output, expected, exact=True)
    assert output.dtype == dtype
    assert torch.equal(found, indices)
    if padding == "same":
        assert output.shape[2:] == tuple(-(-size // 2) for size in x.shape[2:])


def test_same_padding_is_asymmetric_when_it_must_be():
    """An odd total goes to the end, as in convolutions."""
    assert F.max_pool1d(torch.tensor([[4.0, 1.0, 2.0, 3.0]]), 2, 1, "same").tolist() == [[4, 2, 3, 3]]


@pytest.mark.no_poison
@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}d".format)
def test_max_unpool_takes_our_indices(rank):
    x = torch.randn(2, 3, *SPATIAL[rank])
    unpool = torch_op(f"max_unpool{rank}d")
    pooled, indices = our_op(f"max_pool{rank}d")(x, 2, return_indices=True)
    expected = unpool(*torch_op(f"max_pool{rank}d")(x, 2, return_indices=True), 2, output_size=x.shape)
    assert_same(unpool(pooled, indices, 2, output_size=x.shape), expected)


def test_indices_are_not_differentiable():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    output, indices = F.max_pool2d(x, 2, return_indices=True)
    assert output.requires_grad and not indices.requires_grad
    assert indices.dtype == torch.int64


@POOLING_BACKENDS
def test_unbatched_equals_batched(backend):
    x = torch.randn(3, 9, 9)
    assert_same(F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x[None], 3, 2, 1)[0])
    _, one = gradient(lambda x: F.max_pool2d(x, 3, 2, 1), x)
    _, many = gradient(lambda x: F.max_pool2d(x, 3, 2, 1), x[None])
    assert_same(one, many[0])
