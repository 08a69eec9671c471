"""Adaptive pooling: hand-computed tables, output sizes, layouts and dtypes."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    FLOATS,
    NATIVE,
    POOLING_BACKENDS,
    RANKS,
    assert_same,
    gradient,
    here,
    in_format_of,
    integers,
    interpreted,
    our_op,
    shape_of,
    strides,
    sweep,
    torch_op,
    with_layout,
)

import pooling_ext.functional as F
from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close
from pooling_ext.windows import adaptive_windows

SPATIAL = {1: (75,), 2: (5, 38), 3: (3, 4, 21)}
LINE = torch.tensor([[1.0, 2.0, 6.0, 4.0, 5.0]])

#: Equal windows, overlapping ones, one, as many as elements, more than elements, none.
OUTPUTS = {
    "one": {1: 1, 2: 1, 3: 1},
    "overlapping": {1: 7, 2: (3, 7), 3: (2, 3, 5)},
    "equal": {1: 25, 2: (None, 19), 3: (None, 2, 7)},
    "more-than-elements": {1: 80, 2: (7, 40), 3: (4, 5, 22)},
    "none": {1: 0, 2: (0, 3), 3: (2, 0, 3)},
}
#: The same for smaller inputs.
FEW_OUTPUTS = OUTPUTS | {
    "overlapping": {1: 7, 2: (3, 4), 3: (2, 1, 3)},
    "equal": {1: 19, 2: (2, None), 3: (None, 1, 5)},
    "more-than-elements": {1: 20, 2: (7, 12), 3: (4, 3, 6)},
}


@POOLING_BACKENDS
@pytest.mark.parametrize(
    "out, averages, maxima, indices",
    [
        # Windows [0, 3) and [2, 5) share the middle element.
        pytest.param(2, [3.0, 5.0], [6, 6], [2, 2], id="overlapping"),
        # [0, 2), [1, 4), [3, 5).
        pytest.param(3, [1.5, 4.0, 4.5], [2, 6, 5], [1, 2, 4], id="uneven"),
        pytest.param(1, [3.6], [6], [2], id="one"),
        pytest.param(None, [1.0, 2.0, 6.0, 4.0, 5.0], [1, 2, 6, 4, 5], [0, 1, 2, 3, 4], id="identity"),
        # [0, 1), [0, 2), [1, 3), [2, 3), [2, 4), ...: outputs beyond the input repeat elements.
        pytest.param(
            7,
            [1.0, 1.5, 4.0, 6.0, 5.0, 4.5, 5.0],
            [1, 2, 6, 6, 6, 5, 5],
            [0, 1, 2, 2, 2, 4, 4],
            id="more-than-elements",
        ),
    ],
)
def test_table(backend, out, averages, maxima, indices):
    line = here(LINE)
    torch.testing.assert_close(F.adaptive_avg_pool1d(line, out).tolist(), [averages])
    output, found = F.adaptive_max_pool1d(line, out, return_indices=True)
    assert output.tolist() == [maxima]
    assert found.tolist() == [indices]
    assert F.adaptive_max_pool1d(line, out).tolist() == [maxima]


@sweep(rank=RANKS, out=list(OUTPUTS), layout=["contiguous", "channels_last"])
def test_average(backend, rank, out, layout):
    numbers = integers(shape_of(backend, rank), torch.float64)
    out = (FEW_OUTPUTS if interpreted(backend) else OUTPUTS)[out]
    x = with_layout(numbers, layout)
    windows = adaptive_windows(rank, x.shape, out[rank])
    expected = reference.avg_pool(x, windows)
    expected_grad = reference.avg_pool_backward(torch.ones_like(expected), x.shape[2:], windows)
    pool = our_op(f"adaptive_avg_pool{rank}d")
    for dtype in FLOATS:
        x = with_layout(numbers.to(dtype), layout)
        actual = pool(x, out[rank])
        assert actual.dtype == dtype
        assert_close(actual, expected, what=f"{dtype}")
        # PyTorch itself loses the memory format in 3-d.
        if rank == 2 or (rank == 3 and (NATIVE or backend != "default")):
            assert strides(actual) == strides(in_format_of(x, expected))
        if actual.numel():
            _, grad = gradient(lambda x: pool(x, out[rank]), x)
            assert grad.dtype == dtype
            assert_close(grad, expected_grad, what=f"gradient in {dtype}")


@sweep(rank=RANKS, out=list(OUTPUTS), layout=["contiguous", "channels_last"])
def test_maximum(backend, rank, out, layout):
    numbers = integers(shape_of(backend, rank), torch.float64)
    out = (FEW_OUTPUTS if interpreted(backend) else OUTPUTS)[out]
    x = with_layout(numbers, layout)
    windows = adaptive_windows(rank, x.shape, out[rank])
    expected, indices = reference.max_pool(x, windows)
    expected_grad = reference.max_pool_backward(torch.ones_like(expected), indices, x.shape[2:])
    pool = our_op(f"adaptive_max_pool{rank}d")
    for dtype in FLOATS:
        x = with_layout(numbers.to(dtype), layout)
        output, found = pool(x, out[rank], return_indices=True)
        assert output.dtype == dtype
        assert_close(output, expected, exact=True, what=f"{dtype}")
        assert torch.equal(found, indices)
        assert torch.equal(pool(x, out[rank]), output)
        # PyTorch itself loses the memory format in 3-d.
        if rank == 2 or (rank == 3 and (NATIVE or backend != "default")):
            assert strides(output) == strides(in_format_of(x, expected))
        if output.numel():
            _, grad = gradient(lambda x: pool(x, out[rank]), x)
            assert_close(grad, expected_grad, exact=True, what=f"gradient in {dtype}")


@pytest.mark.parametrize("name", ["adaptive_max_pool2d", "adaptive_avg_pool2d"])
def test_large_windows(name):
    """More than 255 elements in a window, and windows of unlike size."""
    x = torch.randperm(2 * 3 * 100 * 107).to(torch.float64).reshape(2, 3, 100, 107)
    actual = gradient(lambda x: our_op(name)(x, (3, 4)), x)
    torch.testing.assert_close(actual, gradient(lambda x: torch_op(name)(x, (3, 4)), x))


@pytest.mark.no_poison
def test_max_unpool_takes_our_indices():
    x = torch.randn(2, 3, 8, 8)
    pooled, indices = F.adaptive_max_pool2d(x, 4, return_indices=True)
    expected = torch_op("max_unpool2d")(*torch_op("adaptive_max_pool2d")(x, 4, return_indices=True), 2)
    assert_same(torch_op("max_unpool2d")(pooled, indices, 2), expected)


@pytest.mark.parametrize("name", ["adaptive_avg_pool", "adaptive_max_pool"])
@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}d".format)
def test_unbatched_equals_batched(name, rank):
    x = torch.randn(3, *SPATIAL[rank])
    pool = our_op(f"{name}{rank}d")
    assert_same(pool(x, 3), pool(x[None], 3)[0], check_strides=False)
