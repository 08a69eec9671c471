"""Strides of outputs and gradients beside PyTorch's, and backward passes of nothing."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import LAYOUTS, RANKS, gradient, our_op, strides, torch_op, with_layout

import pooling_ext
from pooling_ext.ops.avg_pool import _avg_pool_backward

pytestmark = pytest.mark.native

#: Arguments that follow the input.
CALLS = {
    "max_pool": [(2,), (3, 1, 1)],
    "avg_pool": [(2,), (3, 1, 1)],
    "lp_pool": [(2, 2), (2.5, 2), (float("inf"), 2)],
    "adaptive_max_pool": [(2,), (1,)],
    "adaptive_avg_pool": [(2,), (1,)],
}
CASES = [pytest.param(kind, args, id=f"{kind}{args}") for kind, calls in CALLS.items() for args in calls]


def laid_out(rank: int, layout: str) -> torch.Tensor:
    x = torch.rand(2, 3, *(5, 6, 7)[-rank:]) + 0.5
    if layout == "expanded_channels_last":
        return with_layout(x, "channels_last")[:1].expand(x.shape)
    if layout == "some_channels":
        return torch.cat([x, x], 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, ::2]
    return with_layout(x, layout)


@pytest.mark.parametrize("kind, args", CASES)
@pytest.mark.parametrize("rank", RANKS, ids="{}d".format)
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded_channels_last", "some_channels"])
def test_strides(layout, rank, kind, args):
    x, name = laid_out(rank, layout), f"{kind}{rank}d"
    if rank == 3 and "channels" in layout and kind != "max_pool":
        return  # PyTorch loses the memory format, which ours keep
    assert strides(our_op(name)(x, *args)) == strides(torch_op(name)(x, *args))
    ours, our_grad = gradient(lambda x: our_op(name)(x, *args), x)
    theirs, their_grad = gradient(lambda x: torch_op(name)(x, *args), x)
    assert strides(ours) == strides(theirs)
    # The gradient of PyTorch's mean of everything is contiguous, ours is in the input's format.
    assert strides(our_grad) == strides(their_grad) or (kind, args) == ("adaptive_avg_pool", (1,))
    torch.testing.assert_close(our_grad, their_grad)


@pytest.mark.parametrize("return_indices", [False, True], ids=["values", "indices"])
@pytest.mark.parametrize("rank", RANKS, ids="{}d".format)
def test_strides_with_indices(rank, return_indices):
    for layout in LAYOUTS:
        x = laid_out(rank, layout)
        for kind, size in (("max_pool", 3), ("adaptive_max_pool", 2)):
            if rank == 3 and layout == "channels_last" and kind != "max_pool":
                continue
            ours = our_op(f"{kind}{rank}d")(x, size, return_indices=return_indices)
            theirs = torch_op(f"{kind}{rank}d")(x, size, return_indices=return_indices)
            for one, other in zip(ours, theirs, strict=True) if return_indices else [(ours, theirs)]:
                assert torch.equal(one, other) and strides(one) == strides(other)


@pytest.mark.parametrize("kind, args", CASES)
@pytest.mark.parametrize("rank", RANKS, ids="{}d".format)
def test_unbatched_strides(rank, kind, args):
    x, name = torch.rand(3, *(5, 6, 7)[-rank:]) + 0.5, f"{kind}{rank}d"
    for axis in range(1, rank + 1):
        laid = x.movedim(0, axis).contiguous().movedim(axis, 0)
        ours = gradient(lambda x: our_op(name)(x, *args), laid)
        theirs = gradient(lambda x: torch_op(name)(x, *args), laid)
        torch.testing.assert_close(ours, theirs)
        assert [strides(x) for x in ours] == [strides(x) for x in theirs]


@pytest.mark.parametrize("kind, args", CASES)
def test_a_volume_is_no_batch_of_planes(kind, args):
    """(C, D, H, W) may have the strides of (N, C, H, W) in channels_last, where PyTorch's max pool fails."""
    x = (torch.rand(8, 5, 6, 7) + 0.5).contiguous(memory_format=torch.channels_last)
    pool = our_op(f"{kind}3d")
    for _ in range(10):
        output, grad = gradient(lambda x: pool(x, *args), x)
        expected, expected_grad = gradient(lambda x: pool(x, *args), x.contiguous())
        torch.testing.assert_close(output, expected, check_stride=False)
        torch.testing.assert_close(grad, expected_grad, check_stride=False)


def test_the_operator_knows_what_is_a_batch():
    windows = ((2, 2, 2), (2, 2, 2), (), (), ())
    with pytest.raises(RuntimeError, match="channels_last"):
        _avg_pool_backward(torch.ones(3, 2, 2, 2), (3, 4, 4, 4), True, *windows, True, None)


def test_unbatched_max_pool3d_keeps_its_layout():
    x = torch.randn(1, 6, 12, 13, 14).contiguous(memory_format=torch.channels_last_3d).squeeze(0)
    assert pooling_ext.MaxPool3d(3)(x).stride() == torch.nn.MaxPool3d(3)(x).stride()


SHAPES = [(2, 3), (3,), (0, 3), (2, 0), (0,), (0, 0)]


def outcome(function, x):
    try:
        return gradient(function, x)
    except Exception as error:
        return error


@pytest.mark.parametrize("rank", RANKS, ids="{}d".format)
@pytest.mark.parametrize("kind", ["adaptive_avg_pool", "adaptive_max_pool", "max_pool", "avg_pool"])
@pytest.mark.parametrize("empty_axis", [False, True], ids=["pixels", "no-pixels"])
def test_nothing(empty_axis, kind, rank):
    """Empty inputs and outputs, forward and backward: results or errors as PyTorch's."""
    name, spatial = f"{kind}{rank}d", (5, 6, 7)[-rank:]
    argument = "output_size" if "adaptive" in kind else "kernel_size"
    if empty_axis:
        spatial = (*spatial[:-1], 0)
    for leading in SHAPES:
        for size in (0, 1, 2) if "adaptive" in kind else (2,):
            x = torch.rand(*leading, *spatial)
            ours, theirs = (outcome(partial(op(name), **{argument: size}), x) for op in (our_op, torch_op))
            if isinstance(theirs, Exception):
                assert isinstance(ours, type(theirs)), (x.shape, size, ours, theirs)
                continue
            assert not isinstance(ours, Exception), (x.shape, size, ours)
            torch.testing.assert_close(ours, theirs, equal_nan=True)
