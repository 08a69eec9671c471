"""Fused batch norm under torch.compile, torch.export and autocast, beyond test_opspec_compile.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from batch_norm_cases import RESIDUAL, TRAINING
from fused_calls import close, norm, tensors_of, with_gradients
from helpers import with_layout
from torch import nn

import pooling_ext.functional as F

# --- compilation ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.native
def test_compiled_by_inductor():
    tensors = tensors_of(("input", "weight", "bias", "residual"), (2, 3, 9, 7), torch.float32)
    close(with_gradients(torch.compile(norm, fullgraph=True), tensors), with_gradients(norm, tensors), 0.1)


class Network(nn.Module):
    """Every fused operator, with running statistics."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, padding=1)])
        self.bns = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8, momentum=0.5)])
        self.fused = True

    def forward(self, x):
        (conv1, conv2), (bn1, bn2) = self.convs, self.bns
        x = conv1(x)
        if self.fused:
            x = F.batch_norm_relu_max_pool(
                x, bn1.running_mean, bn1.running_var, bn1.weight, bn1.bias, self.training
            )
            y = F.conv_bn_act(conv2, bn2, x, residual=x)
            return F.add_relu_global_avg_pool(y, x, keepdim=False)
        x = TF.max_pool2d(TF.relu(bn1(x)), 3, 2, 1)
        y = TF.relu(bn2(conv2(x)) + x)
        return TF.relu(y + x).mean((2, 3))


def steps(model, run, x):
    """Outputs and gradients in training, the buffers after, and an output in eval."""
    model.train()
    output = run(x)
    gradients = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    buffers = [b.clone() for name, b in model.named_buffers() if "running" in name]
    model.eval()
    with torch.no_grad():
        after = run(x)
    return [output.detach(), *gradients, *buffers, after]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager-as-torch", "aot_eager"])
def test_a_network(backend):
    torch.manual_seed(0)
    ours, theirs = Network(), Network()
    theirs.load_state_dict(ours.state_dict())
    theirs.fused = False
    x = torch.randn(4, 3, 20, 18)
    run = ours if backend == "eager-as-torch" else torch.compile(ours, fullgraph=True, backend=backend)
    close(steps(ours, run, x), steps(theirs, theirs, x), 10)


@TRAINING
def test_export(training):
    model = Network().train(training)
    x = torch.randn(4, 3, 20, 18)
    program = torch.export.export(model, (x,))
    with torch.no_grad():
        wanted = Network()
        wanted.load_state_dict(model.state_dict())
        wanted = wanted.train(training)(x)
        torch.testing.assert_close(program.module()(x), wanted)


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@RESIDUAL
@TRAINING
def test_autocast(training, residual, layout):
    """bfloat16 from the convolution, float32 parameters: as PyTorch's operators, to bfloat16's rounding."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
    nn.init.normal_(bn.weight)
    bn.train(training)
    x = with_layout(torch.randn(4, 3, 12, 12), layout)
    added = torch.randn(4, 8, 10, 10) if residual else None

    def step(function):
        bn.reset_running_stats()
        leaf = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            added16 = None if added is None else added.bfloat16()
            output = function(leaf, added16)
            gradients = torch.autograd.grad(
                output.float().square().sum(), (leaf, conv.weight, bn.weight, bn.bias)
            )
        return output, *gradients, bn.running_mean.clone(), bn.running_var.clone()

    def unfused(x, residual):
        output = bn(conv(x))
        return TF.relu(output if residual is None else output + residual)

    actual = step(lambda x, residual: F.conv_bn_act(conv, bn, x, residual))
    wanted = step(unfused)
    for one, other in zip(actual, wanted, strict=True):
        assert one.dtype == other.dtype
        size = other.float().abs().max().item()
        torch.testing.assert_close(
            one.float(), other.float(), rtol=2e-2, atol=1e-2 * size, check_stride=False
        )
