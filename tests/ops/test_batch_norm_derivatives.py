"""Fused batch norm under autograd and torch.func, beyond test_opspec_derivatives.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from batch_norm_cases import arguments, composition, copies
from fused_calls import norm, norm_as_torch
from torch import nn
from torch.func import functional_call, grad, vmap

import pooling_ext.functional as F


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
