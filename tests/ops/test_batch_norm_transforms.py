"""Fused batch norm under torch.compile, torch.export, fake tensors and autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from batch_norm_cases import RESIDUAL, TRAINING
from fused_calls import EACH, close, norm, tensors_of, with_gradients
from helpers import assert_same, strides, with_layout
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pooling_ext.functional as F

# --- compilation ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@EACH
def test_compiled_forward_and_backward(ours, theirs, names):
    tensors = tensors_of(names, (2, 3, 9, 7), torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    close(with_gradients(compiled, tensors), with_gradients(ours, tensors), 0.1)
    with torch.no_grad():
        close((compiled(*tensors),), (ours(*tensors),), 0.1)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.native
def test_compiled_with_dynamic_shapes():
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 3, 9, 11), (4, 3, 13, 15)):
        tensors = tensors_of(("input", "weight", "bias"), shape, torch.float32)
        close(with_gradients(compiled, tensors), with_gradients(norm, tensors), 0.1)


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


def metadata(x: Tensor):
    return tuple(x.shape), strides(x), x.dtype


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@EACH
def test_meta_and_fake_tensors(ours, theirs, names, layout, dtype):
    """Described as the real ones are, gradients too."""
    for shape in ((2, 3, 9, 7), (2, 3, 1, 1), (0, 3, 9, 7)):
        tensors = tensors_of(names, shape, dtype, layout)
        wanted = [metadata(x) for x in with_gradients(ours, tensors)]
        meta = with_gradients_on_meta(ours, tensors)
        assert [metadata(x) for x in meta] == wanted
        with FakeTensorMode() as mode:
            fake = tuple(mode.from_tensor(x) for x in tensors)
            assert [metadata(x) for x in with_gradients_on_meta(ours, fake)] == wanted


def with_gradients_on_meta(function, tensors):
    if not isinstance(tensors[0], torch._subclasses.FakeTensor):
        tensors = tuple(x.detach().to("meta") for x in tensors)
        for old, new in zip(tensors, tensors, strict=True):
            assert old.stride() == new.stride()
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    with torch.device("meta") if leaves[0].device.type == "meta" else torch.device("cpu"):
        output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, torch.empty_like(output))


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


@EACH
def test_autocast_leaves_the_dtype_alone(ours, theirs, names):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = tensors_of(names, (2, 3, 9, 7), dtype)
        with torch.autocast("cpu", torch.bfloat16):
            actual = with_gradients(ours, tensors)
        for one, other in zip(actual, with_gradients(ours, tensors), strict=True):
            assert_same(one, other)
