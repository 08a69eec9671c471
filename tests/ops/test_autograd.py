"""Derivatives of pools beyond test_opspec_derivatives.py: torch.func, what is saved, determinism."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from helpers import (
    assert_same,
    gradient,
    integers,
    our_op,
    torch_op,
    with_layout,
)
from torch.func import functional_call, grad, hessian, vmap

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.testing.opspec import levels, positive


@pytest.mark.parametrize("name", ["max_pool2d", "adaptive_max_pool2d"])
def test_vmap_with_indices(name):
    x = levels((3, 2, 2, 6, 6), torch.float64)
    output, indices = vmap(lambda x: our_op(name)(x, 2, return_indices=True))(x)
    expected = our_op(name)(x.flatten(0, 1), 2, return_indices=True)
    assert torch.equal(output.flatten(0, 1), expected[0])
    assert torch.equal(indices.flatten(0, 1), expected[1])


def test_vmap_over_something_else():
    """The pooled tensor need not be the one that is mapped."""
    x, scales = levels((1, 2, 4, 4), torch.float64), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    actual = vmap(lambda scale: F.max_pool2d(x, 2) * scale)(scales)
    assert torch.equal(actual, F.max_pool2d(x, 2) * scales[:, None, None, None, None])


@pytest.mark.parametrize("safe", [False, True], ids=["torch", "safe"])
def test_hessian(safe):
    """Second derivatives by forward over reverse; max and average pooling have none of their own."""
    x = positive((1, 1, 4, 4), torch.float64)
    theirs = hessian(lambda x: TF.lp_pool2d(x, 3, 2).sum())(x)
    torch.testing.assert_close(hessian(lambda x: F.lp_pool2d(x, 3, 2, safe=safe).sum())(x), theirs)
    for name in ("max_pool2d", "avg_pool2d"):
        actual = hessian(lambda x, name=name: our_op(name)(x, 2).pow(3).sum())(x)
        torch.testing.assert_close(actual, hessian(lambda x, name=name: torch_op(name)(x, 2).pow(3).sum())(x))


def test_per_sample_gradients():
    """The idiom of torch.func: vmap over grad over functional_call."""

    def network(pool):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), pool, torch.nn.Flatten(), torch.nn.Linear(36, 2))

    x = torch.randn(5, 3, 8, 8)

    def gradients(model):
        def loss(parameters, sample):
            return functional_call(model, parameters, (sample[None],)).square().sum()

        return vmap(grad(loss), in_dims=(None, 0))(dict(model.named_parameters()), x)

    for ours, theirs in (
        (pooling_ext.MaxPool2d(2), torch.nn.MaxPool2d(2)),
        (pooling_ext.AvgPool2d(2), torch.nn.AvgPool2d(2)),
        (pooling_ext.LPPool2d(2, 2), torch.nn.LPPool2d(2, 2)),
    ):
        torch.testing.assert_close(gradients(network(ours)), gradients(network(theirs)))


def saved_bytes(function, x) -> list[int]:
    """The sizes of what autograd keeps for the backward of ``function(x)``."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        function(x)
    return sizes


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_resnet_stem_saves_one_byte_an_output(dtype):
    x = torch.randn(2, 64, 112, 112, dtype=dtype, requires_grad=True)
    outputs = 2 * 64 * 56 * 56
    assert saved_bytes(lambda x: F.max_pool2d(x, 3, 2, 1), x) == [outputs]
    assert saved_bytes(pooling_ext.MaxPool2d(3, 2, 1), x) == [outputs]
    # PyTorch keeps int64 indices, and its input.
    assert sum(saved_bytes(lambda x: TF.max_pool2d(x, 3, 2, 1), x)) >= 8 * outputs


@pytest.mark.native
@pytest.mark.parametrize(
    "kernel, bytes_an_output", [((15, 17), 1), ((16, 16), 4)], ids=["255-elements", "256-elements"]
)
def test_larger_windows_save_four_bytes(kernel, bytes_an_output):
    x = torch.randn(1, 2, 20, 20, requires_grad=True)
    outputs = F.max_pool2d(x, kernel, 1).numel()
    assert saved_bytes(lambda x: F.max_pool2d(x, kernel, 1), x) == [outputs * bytes_an_output]


@pytest.mark.native
def test_averages_save_nothing():
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    for name, args in (("avg_pool2d", (3,)), ("adaptive_avg_pool2d", (2,)), ("global_avg_pool2d", ())):
        assert saved_bytes(lambda x, name=name, args=args: our_op(name)(x, *args), x) == []


def test_nothing_is_saved_without_gradients():
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    with torch.no_grad():
        assert saved_bytes(lambda x: F.max_pool2d(x, 3), x) == []
    assert saved_bytes(lambda x: F.max_pool2d(x, 3), x.detach()) == []
    with torch.inference_mode():
        assert not F.max_pool2d(torch.randn(1, 1, 4, 4), 2).requires_grad


@pytest.mark.parametrize(
    "name, args", [("max_pool", (3, 2, 1)), ("avg_pool", (3, 2, 1)), ("lp_pool", (2, 3, 2))]
)
@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}d".format)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_backward_is_deterministic(layout, rank, name, args):
    """The setting that refuses whatever is not is on throughout the suite; twice gives the same bits."""
    assert torch.are_deterministic_algorithms_enabled()
    x = with_layout(torch.randn(4, 8, *(9,) * rank), layout)
    assert_same(
        gradient(lambda x: our_op(f"{name}{rank}d")(x, *args), x),
        gradient(lambda x: our_op(f"{name}{rank}d")(x, *args), x),
    )


@pytest.mark.parametrize("name", ["adaptive_max_pool", "adaptive_avg_pool"])
@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}d".format)
def test_adaptive_backward_is_deterministic(rank, name):
    x = torch.randn(4, 8, *(9,) * rank)
    pool = our_op(f"{name}{rank}d")
    assert_same(gradient(lambda x: pool(x, 4), x), gradient(lambda x: pool(x, 4), x))


def test_backward_twice_and_freed_graph():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    output = F.max_pool2d(x, 2).sum()
    output.backward(retain_graph=True)
    output.backward()
    assert x.grad is not None and x.grad.sum() == 8
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


def test_gradient_of_the_gradient_reaches_the_incoming_one():
    x = integers((1, 1, 6, 6), torch.float64).requires_grad_()
    incoming = torch.ones(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    for pool in (F.max_pool2d, F.avg_pool2d):
        (first,) = torch.autograd.grad(pool(x, 2), x, incoming, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), incoming)
        # The derivative of sum over windows of g ** 2 times the sum of squared weights.
        weights = 2.0 if pool is F.max_pool2d else 0.5
        assert torch.equal(second, torch.full_like(second, weights))
