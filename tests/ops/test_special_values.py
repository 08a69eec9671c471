"""NaN, infinities, ties, signed zeros; empty batches, channels and windows."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from helpers import (
    FLOATS,
    INTEGERS,
    NATIVE,
    POOLING_BACKENDS,
    RANKS,
    assert_same,
    gradient,
    here,
    interpreted,
    our_op,
    require_native,
    sweep,
    torch_op,
    with_layout,
)

import pooling_ext.functional as F
from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close
from pooling_ext.windows import fixed_windows

INF, NAN = math.inf, math.nan
SPECIAL = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 3e38])
OPERATORS = ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")


def special(shape, dtype):
    return here(SPECIAL)[torch.randint(len(SPECIAL), shape)].to(dtype)


def wide(backend):
    """A shape with vectors and a tail on the CPU."""
    return (2, 3, 6, 10) if interpreted(backend) else (2, 37, 6, 40)


@sweep(
    kwargs=[{"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}],
    layout=["contiguous", "channels_last", "sliced"],
    dtype=FLOATS,
)
def test_special_values_in_max_pool(backend, kwargs, layout, dtype):
    """Values and indices; the last NaN of several wins, as in PyTorch."""
    x = with_layout(special(wide(backend), dtype), layout)
    expected = torch_op("max_pool2d")(x, **kwargs, return_indices=True)
    actual = F.max_pool2d(x, **kwargs, return_indices=True)
    assert_same(actual, expected)
    assert_same(F.max_pool2d(x, **kwargs), expected[0])
    # A zero keeps its sign.
    winners = x.flatten(-2).gather(-1, actual[1].flatten(-2)).view_as(actual[0])
    zeros = winners == 0
    assert torch.equal(actual[0][zeros].signbit(), winners[zeros].signbit())


@sweep(out=[1, 3, (5, 7)], layout=["contiguous", "channels_last", "sliced"], dtype=FLOATS)
def test_special_values_in_adaptive_max_pool(backend, out, layout, dtype):
    x = with_layout(special(wide(backend), dtype), layout)
    expected = torch_op("adaptive_max_pool2d")(x.contiguous(), out, return_indices=True)
    assert_same(F.adaptive_max_pool2d(x, out, return_indices=True), expected, check_strides=False)
    assert_same(F.adaptive_max_pool2d(x, out), expected[0], check_strides=False)


@sweep(layout=["contiguous", "channels_last", "sliced"], dtype=FLOATS)
def test_special_values_in_averages(backend, layout, dtype):
    """NaN and infinities spread over the windows they are in, and no further."""
    values = torch.tensor([NAN, INF, -INF, 0.0, 1.0, -1.0, 2.0, 3.0, 4.0])
    x = with_layout(values[torch.randint(len(values), wide(backend))].to(dtype), layout)
    for kwargs in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}):
        assert_close(F.avg_pool2d(x, **kwargs), torch_op("avg_pool2d")(x.double(), **kwargs))
    assert_close(F.adaptive_avg_pool2d(x, (2, 7)), torch_op("adaptive_avg_pool2d")(x.double(), (2, 7)))


@POOLING_BACKENDS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_padding_never_enters_a_maximum(backend, layout):
    """All -inf, and all the lowest integer: the first element of the window wins, not the padding."""
    x = with_layout(torch.full(wide(backend), -INF), layout)
    expected = torch_op("max_pool2d")(x, 3, 2, 1, return_indices=True)
    assert_same(F.max_pool2d(x, 3, 2, 1, return_indices=True), expected)
    _, grad = gradient(lambda x: F.max_pool2d(x, 3, 2, 1), x)
    assert grad.sum() == expected[0].numel()
    for dtype in INTEGERS:
        x = with_layout(torch.full(wide(backend), torch.iinfo(dtype).min, dtype=dtype), layout)
        output, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)
        assert (output == torch.iinfo(dtype).min).all()
        assert torch.equal(indices, expected[1])


@POOLING_BACKENDS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_extreme_integers(backend, layout):
    for dtype in INTEGERS:
        info = torch.iinfo(dtype)
        choices = torch.tensor([info.min, info.max, info.max - 1, info.min + 1, 0], dtype=dtype)
        x = with_layout(choices[torch.randint(5, wide(backend))], layout)
        expected, indices = reference.max_pool(x, fixed_windows(2, x.shape, 3, 2, 1, 1, False))
        output, found = F.max_pool2d(x, 3, 2, 1, return_indices=True)
        assert torch.equal(output, expected.to(dtype))
        assert torch.equal(found, indices)


@sweep(layout=["contiguous", "channels_last"], dtype=FLOATS)
def test_ties_go_to_the_first(backend, layout, dtype):
    x = with_layout(torch.ones(wide(backend), dtype=dtype), layout)
    _, grad = gradient(lambda x: F.max_pool2d(x, 2), x)
    expected = torch.zeros(x.shape[2:], dtype=dtype)
    expected[::2, ::2] = 1
    assert torch.equal(grad, expected.expand(x.shape))


@POOLING_BACKENDS
def test_overflowing_sums(backend):
    """The sum of float16 and bfloat16 is accumulated in float32, so only the average must fit."""
    x = torch.full((1, 1, 8, 8), 60000.0, dtype=torch.float16)
    assert F.avg_pool2d(x, 8).item() == 60000.0
    assert F.avg_pool2d(x, 8, divisor_override=1).item() == INF


def outcome(function, x, *args):
    """The output, or the kind of error: RuntimeErrors of PyTorch are ValueErrors of ours."""
    try:
        return function(x, *args)
    except (RuntimeError, ValueError):
        return "error"


@sweep(rank=RANKS, name=OPERATORS, leading=[(0, 3), (2, 0), (0, 0), (0,)], requires_grad=[False, True])
def test_empty_batch_and_channels(backend, rank, name, leading, requires_grad):
    """Accepted and refused where PyTorch accepts and refuses."""
    x = torch.zeros(*leading, *(4,) * rank, requires_grad=requires_grad)
    actual = outcome(our_op(f"{name}{rank}d"), x, 2)
    expected = outcome(torch_op(f"{name}{rank}d"), x, 2)
    if isinstance(expected, str):
        assert isinstance(actual, str), f"PyTorch refuses {list(x.shape)}, this gives {list(actual.shape)}"
        return
    assert not isinstance(actual, str), f"PyTorch accepts {list(x.shape)}"
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if not requires_grad:
        return
    # PyTorch's own backward of empty channels raises; ours does for adaptive pools alone.
    if "adaptive" in name and outcome(lambda y: y.sum().backward(), expected) == "error":
        with pytest.raises(RuntimeError, match="non-zero size"):
            actual.sum().backward()
    elif NATIVE or backend != "default" or 0 not in x.shape[1:]:
        x.grad = None
        actual.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_empty_batch_keeps_the_memory_format(layout):
    x = with_layout(torch.zeros(0, 3, 4, 4), layout)
    assert F.max_pool2d(x, 2).shape == (0, 3, 2, 2)
    assert F.global_avg_pool2d(x, keepdim=False).shape == (0, 3)


@POOLING_BACKENDS
@pytest.mark.parametrize("rank", RANKS, ids="{}d".format)
@pytest.mark.parametrize("name", ["adaptive_max_pool", "adaptive_avg_pool"])
def test_no_outputs(backend, name, rank):
    """An output size of 0 along an axis: an empty output, and backward raises as PyTorch's does."""
    for out in product((0, 2), repeat=rank):
        x = torch.randn(2, 3, *(5,) * rank)
        if 0 in out:
            assert_same(our_op(f"{name}{rank}d")(x, out), torch_op(f"{name}{rank}d")(x, out))
    if backend == "default":
        require_native()
    for pool in (torch_op(f"{name}{rank}d"), our_op(f"{name}{rank}d")):
        with pytest.raises(RuntimeError, match="non-zero size"):
            gradient(partial(pool, output_size=(0,) * rank), x)


@POOLING_BACKENDS
@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
def test_window_larger_than_the_input(backend, name):
    """Padding can make room for a window that the input alone has not; its elements count once each."""
    x = torch.tensor([[[[3.0, -1.0], [2.0, 5.0]]]])
    kwargs = {"kernel_size": 4, "stride": 1, "padding": 2}
    actual = gradient(lambda x: our_op(name)(x, **kwargs), x)
    assert_same(actual, gradient(lambda x: torch_op(name)(x, **kwargs), x))


@sweep(
    size=[(1, 1), (1, 2), (2, 1), (3, 2)],
    layout=["contiguous", "channels_last"],
    dtype=[*FLOATS, torch.int32],
)
def test_windows_without_elements(backend, size, layout, dtype):
    """Dilation can step over a small input: lowest value, index -1, no gradient, no stray write."""
    planes = (2, 3) if interpreted(backend) else (64, 64)
    x = with_layout(torch.randint(1, 9, (*planes, *size)).to(dtype), layout)
    kwargs = {"kernel_size": 2, "stride": 1, "padding": (0, 1) if size[0] > 1 else 1, "dilation": (1, 2)}
    windows = fixed_windows(2, x.shape, 2, 1, kwargs["padding"], (1, 2), False)
    expected, indices = reference.max_pool(x, windows)
    assert (indices < 0).any() or size[1] > 1
    output, found = F.max_pool2d(x, **kwargs, return_indices=True)
    assert_close(output, expected, exact=True)
    assert torch.equal(found, indices)
    assert torch.equal(F.max_pool2d(x, **kwargs), output)
    if dtype.is_floating_point:
        grad = torch.randint(1, 9, output.shape).to(dtype)
        _, actual = gradient(lambda x: F.max_pool2d(x, **kwargs), x, grad)
        assert_close(actual, reference.max_pool_backward(grad, indices, size), exact=True)


@POOLING_BACKENDS
def test_windows_without_elements_next_to_a_large_kernel(backend):
    """More than 255 elements: the saved offset is an int32 there, and -1 for no element."""
    x = torch.rand(3, 5, 1, 1)
    kwargs = {"kernel_size": (1, 301), "stride": 1, "padding": (301, 300, 0, 0), "dilation": (1, 2)}
    windows = fixed_windows(2, x.shape, *kwargs.values(), False)
    expected, indices = reference.max_pool(x, windows)
    assert indices[0, 0].tolist() == [[-1, 0]]
    output, found = F.max_pool2d(x, **kwargs, return_indices=True)
    assert_close(output, expected, exact=True)
    assert torch.equal(found, indices)
    grad = torch.ones_like(output)
    _, actual = gradient(lambda x: F.max_pool2d(x, **kwargs), x, grad)
    assert_close(actual, reference.max_pool_backward(grad, indices, (1, 1)), exact=True)
