"""Fused batch norm under autograd and torch.func: derivatives of both orders and modes, checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from batch_norm_cases import arguments, composition, copies
from fused_calls import CASES, EACH, close, norm, norm_as_torch, tensors_of, with_gradients
from helpers import assert_same
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacrev, jvp, vmap

import pooling_ext.functional as F


@EACH
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout, ours, theirs, names):
    assert gradcheck(ours, tensors_of(names, layout=layout), nondet_tol=0.0)


@EACH
def test_gradgradcheck(ours, theirs, names):
    assert gradgradcheck(ours, tensors_of(names), atol=1e-4)


@pytest.mark.parametrize("ours, theirs, names", CASES[:-1])  # the tail has none
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_as_torchs(dtype, ours, theirs, names):
    def penalty(function):
        leaves = tensors_of(names, (3, 4, 6, 5), dtype)
        torch.manual_seed(1)
        output = function(*leaves)
        first = torch.autograd.grad(output, leaves, torch.randn(output.shape).to(dtype), create_graph=True)
        total = sum(x.float().square().sum() for x in first)
        second = torch.autograd.grad(total, leaves, allow_unused=True)
        missing = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, second, strict=True)]
        return [x.detach() for x in first], missing

    torch.manual_seed(0)
    actual = penalty(ours)
    torch.manual_seed(0)
    wanted = penalty(theirs)
    scale = 10.0 if dtype == torch.float32 else 2000.0
    close(actual[0], wanted[0], scale)
    close(actual[1], wanted[1], scale * 5)


@EACH
def test_gradients_with_create_graph_are_those_without(ours, theirs, names):
    leaves = tensors_of(names, (3, 4, 6, 5))
    plain = torch.autograd.grad(ours(*leaves).sum(), leaves)
    graph = torch.autograd.grad(ours(*leaves).sum(), leaves, create_graph=True)
    for one, other in zip(plain, graph, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@EACH
def test_forward_mode(ours, theirs, names):
    primals = tensors_of(names, requires_grad=False)
    tangents = tuple(torch.randn_like(x) for x in primals)
    wanted = jvp(theirs, primals, tangents)
    close(jvp(ours, primals, tangents), wanted)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(primals, tangents, strict=True)]
        output = forward_ad.unpack_dual(ours(*duals))
        assert output.tangent is not None
        close((output.primal, output.tangent), wanted)


@EACH
def test_vmap_and_jacobians(ours, theirs, names):
    first, *rest = tensors_of(names, requires_grad=False)
    stacked = torch.stack((first, 2 * first + 1, -first))
    close((vmap(lambda x: ours(x, *rest))(stacked),), (vmap(lambda x: theirs(x, *rest))(stacked),))
    close((jacrev(ours)(first, *rest),), (jacrev(theirs)(first, *rest),))


def test_per_sample_gradients():
    def loss(parameters, sample, function):
        return function(sample[None], parameters["weight"], parameters["bias"], training=False).square().sum()

    parameters = {"weight": torch.randn(2), "bias": torch.randn(2)}
    samples = torch.randn(3, 2, 4, 4)
    ours = vmap(grad(loss), (None, 0, None))(parameters, samples, norm)
    theirs = vmap(grad(loss), (None, 0, None))(parameters, samples, norm_as_torch)
    torch.testing.assert_close(ours, theirs)


def test_functional_call_of_a_module_that_uses_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return F.conv_bn_act(self.conv, self.bn, x)

    block = Block().eval()
    x = torch.randn(2, 3, 6, 6)
    values = {name: torch.randn_like(value) for name, value in block.named_parameters()}
    wanted = TF.conv2d(x, values["conv.weight"], values["conv.bias"])
    wanted = composition(
        wanted, block.bn.running_mean, block.bn.running_var, values["bn.weight"], values["bn.bias"]
    )
    with torch.no_grad():
        torch.testing.assert_close(functional_call(block, values, (x,)), wanted, rtol=1e-4, atol=1e-5)


@EACH
def test_checkpointing(ours, theirs, names):
    from torch.utils.checkpoint import checkpoint

    tensors = tensors_of(names, (2, 3, 6, 5))
    actual = with_gradients(lambda *args: checkpoint(ours, *args, use_reentrant=False), tensors)
    for one, other in zip(actual, with_gradients(ours, tensors), strict=True):
        assert_same(one, other)


@EACH
def test_backward_twice(ours, theirs, names):
    leaves = tensors_of(names, (2, 3, 6, 5))
    output = ours(*leaves).sum()
    output.backward(retain_graph=True)
    first = [x.grad.clone() for x in leaves]
    output.backward()
    for leaf, once in zip(leaves, first, strict=True):
        assert_same(leaf.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


def test_a_residual_changed_in_place_is_noticed():
    """What backward needs must not be overwritten unseen."""
    leaves = copies(arguments((2, 3, 4, 4), residual=True))
    output = F.batch_norm_act(**leaves, training=True)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_what_has_no_part_in_a_gradient_has_the_second_gradient_of_pytorchs(activation, with_residual):
    """Zeros through an activation, and none without one, as in a gradient penalty."""

    def gradients(function):
        torch.manual_seed(0)
        x, residual = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64).unbind()
        leaves = [x, torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64), residual]
        leaves = [leaf.requires_grad_() for leaf in leaves[: 4 if with_residual else 3]]
        output = function(*leaves, activation=activation)
        (inner,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        return torch.autograd.grad(inner.square().sum(), leaves, allow_unused=True)

    for found, wanted in zip(gradients(norm), gradients(norm_as_torch), strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(found, wanted)
