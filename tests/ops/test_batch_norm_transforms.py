"""Fused batch norm under autograd, torch.func, torch.compile, torch.export, fake tensors and autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from batch_norm_cases import RESIDUAL, TRAINING, arguments, composition, copies
from helpers import assert_same, strides, with_layout
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacrev, jvp, vmap

import pooling_ext.functional as F


def norm(input, weight, bias, residual=None, training=True, mean=None, var=None, activation="relu"):
    """batch_norm_act with constant running statistics in eval, which it leaves alone in training."""
    if not training:
        channels = input.shape[1]
        mean = torch.linspace(-1, 1, channels, dtype=weight.dtype)
        var = torch.linspace(0.5, 2, channels, dtype=weight.dtype)
    return F.batch_norm_act(
        input, mean, var, weight, bias, training, residual=residual, activation=activation
    )


def norm_as_torch(input, weight, bias, residual=None, training=True, activation="relu"):
    mean = var = None
    if not training:
        mean = torch.linspace(-1, 1, input.shape[1], dtype=weight.dtype)
        var = torch.linspace(0.5, 2, input.shape[1], dtype=weight.dtype)
    return composition(input, mean, var, weight, bias, training, residual=residual, activation=activation)


def stem(input, weight, bias, training=True):
    mean = var = None
    if not training:
        mean = torch.linspace(-1, 1, input.shape[1], dtype=weight.dtype)
        var = torch.linspace(0.5, 2, input.shape[1], dtype=weight.dtype)
    return F.batch_norm_relu_max_pool(input, mean, var, weight, bias, training)


def stem_as_torch(input, weight, bias, training=True):
    return TF.max_pool2d(norm_as_torch(input, weight, bias, None, training), 3, 2, 1)


def tail(input, residual):
    return F.add_relu_global_avg_pool(input, residual)


def tail_as_torch(input, residual):
    return TF.relu(input + residual).mean((2, 3), keepdim=True)


def _cases():
    """Name, function, PyTorch's, and which arguments it takes."""
    for training in (True, False):
        label = "training" if training else "eval"
        for residual in (True, False):
            names = ("input", "weight", "bias", *(("residual",) if residual else ()))
            for activation in ("relu", "silu") if training else ("relu",):
                yield pytest.param(
                    lambda *args, t=training, a=activation: norm(*args, training=t, activation=a),
                    lambda *args, t=training, a=activation: norm_as_torch(*args, training=t, activation=a),
                    names,
                    id=f"norm-{activation}-{label}-{'residual' if residual else 'plain'}",
                )
        yield pytest.param(
            lambda *args, t=training: stem(*args, training=t),
            lambda *args, t=training: stem_as_torch(*args, training=t),
            ("input", "weight", "bias"),
            id=f"stem-{label}",
        )
    yield pytest.param(tail, tail_as_torch, ("input", "residual"), id="tail")


CASES = list(_cases())
EACH = pytest.mark.parametrize("ours, theirs, names", CASES)


def tensors_of(names, shape=(3, 2, 4, 3), dtype=torch.float64, layout="contiguous", requires_grad=True):
    tensors = arguments(shape, dtype, layout, residual=True)
    return tuple(tensors[name].detach().requires_grad_(requires_grad) for name in names)


def with_gradients(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    leaves = tuple(x.detach().requires_grad_() for x in tensors)
    output = function(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return output.detach(), *torch.autograd.grad(output, leaves, weights)


def close(actual, wanted, scale=1.0):
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-4 * scale, atol=1e-5 * scale, check_stride=False, equal_nan=True
        )


# --- derivatives ----------------------------------------------------------------------------------


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


# --- compilation ----------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
