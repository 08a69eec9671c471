"""Chains that patch takes together, and forwards that it must not misread."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as TF
from fusing_cases import assert_equal, batch, block, flags, residual_block
from helpers import BACKENDS
from torch import nn

import pooling_ext
from pooling_ext.ops.conv_bn_act.call import Call
from pooling_ext.ops.conv_bn_act.implementations import from_size


def add_pool(self, x):
    return self.gap(self.act(self.conv1(x) + x))


#: A forward, and the chains in it.
CHAINS = {
    "conv-bn": (lambda s, x: s.bn1(s.conv1(x)), ["conv1-bn1"]),
    "conv-bn-relu": (lambda s, x: s.act(s.bn1(s.conv1(x))), ["conv1-bn1-act"]),
    "inplace": (lambda s, x: s.inplace(s.bn1(s.conv1(x))), ["conv1-bn1-inplace"]),
    "F.relu": (lambda s, x: TF.relu(s.bn1(s.conv1(x))), ["conv1-bn1-relu"]),
    "F.relu inplace": (lambda s, x: TF.relu(s.bn1(s.conv1(x)), True), ["conv1-bn1-relu"]),
    "torch.relu": (lambda s, x: torch.relu(s.bn1(x)), ["bn1-relu"]),
    "Tensor.relu": (lambda s, x: s.bn1(x).relu(), ["bn1-relu"]),
    "Tensor.relu_": (lambda s, x: s.bn1(x).relu_(), ["bn1-relu"]),
    "bn-relu-conv": (lambda s, x: s.conv1(s.act(s.bn1(x))), ["bn1-act"]),
    "silu": (lambda s, x: TF.silu(s.bn1(s.conv1(x))), ["conv1-bn1-silu"]),
    "leaky_relu in place": (lambda s, x: TF.leaky_relu_(s.bn1(x), 0.25), ["bn1-leaky_relu_"]),
    "gelu after an addition": (lambda s, x: TF.gelu(s.bn1(s.conv1(x)) + x), ["conv1-bn1-add-gelu"]),
    "other activation": (lambda s, x: torch.tanh(s.bn1(s.conv1(x))), ["conv1-bn1"]),
    "residual": (residual_block, ["conv1-bn1-inplace", "conv2-bn2-add-inplace"]),
    "add": (lambda s, x: s.act(s.bn1(s.conv1(x)) + x), ["conv1-bn1-add-act"]),
    "radd": (lambda s, x: s.act(x + s.bn1(s.conv1(x))), ["conv1-bn1-add-act"]),
    "torch.add": (lambda s, x: torch.add(s.bn1(s.conv1(x)), x).relu(), ["conv1-bn1-add-relu"]),
    "Tensor.add_": (lambda s, x: s.bn1(s.conv1(x)).add_(x).relu_(), ["conv1-bn1-add-relu"]),
    "add without relu": (lambda s, x: s.bn1(s.conv1(x)) + x, ["conv1-bn1-add"]),
    "two norms": (
        lambda s, x: s.act(s.bn1(s.conv1(x)) + s.bn2(s.conv2(x))),
        ["conv1-bn1", "conv2-bn2-add-act"],
    ),
    "stem": (lambda s, x: s.pool(s.act(s.bn1(s.conv1(x)))), ["conv1-bn1-act-pool"]),
    "stem without conv": (lambda s, x: s.pool(s.inplace(s.bn1(x))), ["bn1-inplace-pool"]),
    "functional stem": (
        lambda s, x: TF.max_pool2d(TF.relu(s.bn1(s.conv1(x))), [3, 3], stride=2, padding=1),
        ["conv1-bn1-relu-max_pool2d"],
    ),
    "tail": (add_pool, ["add-act-gap"]),
    "functional tail": (
        lambda s, x: TF.adaptive_avg_pool2d(TF.relu(torch.add(x, s.conv1(x))), (1, 1)),
        ["add-relu-adaptive_avg_pool2d"],
    ),
    "mean": (lambda s, x: (s.conv1(x) + x).relu().mean((2, 3)), ["add-relu-mean"]),
    "mean, kept": (lambda s, x: (s.conv1(x) + x).relu().mean([-1, -2], keepdim=True), ["add-relu-mean"]),
    "into a Sequential": (
        lambda s, x: s.act(x + s.pair(x)),
        ["Conv2d(pair.0)-BatchNorm2d(pair.1)-add-act"],
    ),
    "list of layers": (lambda s, x: next(layer(x) for layer in s.layers), ["BatchNorm2d(layers.0)"]),
    "pooling functions": (
        lambda s, x: [TF.max_pool2d(x, 2), torch.max_pool2d(x, 2), TF.avg_pool2d(x, 3, 1, 1)],
        ["max_pool2d", "avg_pool2d"],
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CHAINS)
def test_chain(name, training, monkeypatch):
    forward, expected = CHAINS[name]
    net = block(forward).train(training)
    twin = copy.deepcopy(net)
    report = pooling_ext.patch(net, strict=True)
    assert [entry.what for entry in report.replaced if entry.path == "(root)"] == expected
    x = batch()
    assert_equal(net, twin, x)
    # The fused operators did run: the modules that they stand for were not called.
    called = []
    for module in (nn.BatchNorm2d, nn.ReLU):
        plain = module.forward
        monkeypatch.setattr(module, "forward", lambda *a, plain=plain: (called.append(a[0]), plain(*a))[1])
    net(x)
    assert not called
    with torch.no_grad():
        torch.testing.assert_close(net(x), twin(x))


def small_resnet(self, x):
    x = self.pool(self.act(self.bn1(self.conv1(x))))
    x = self.inplace(self.bn2(self.conv2(x)) + x)
    return self.gap(self.act(self.conv1(x) + x))


@BACKENDS
@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_backend(backend, training, memory_format):
    """A stem, a block's end and a tail: outputs, gradients and running statistics."""
    net = block(small_resnet).train(training).to(memory_format=memory_format)
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    x = batch(3, 4, 9, 8).to(memory_format=memory_format)
    assert_equal(net, twin, x)
    name = backend.partition("-")[0]
    names = {choice.op for choice in pooling_ext.explain(net, x).decisions if choice.backend == name}
    fused = {"batch_norm_relu_max_pool", "batch_norm_act", "add_relu_global_avg_pool"}
    assert names >= (fused if training else {"add_relu_global_avg_pool"})


def used_twice(self, x):
    out = self.bn1(self.conv1(x))
    return self.act(out) + out


def into_the_input(self, x):
    x += self.bn1(self.conv1(x))
    return self.act(x)


def relu_thrown_away(self, x):
    out = self.bn1(x)
    self.inplace(out)
    return out


def input_changed_between(self, x):
    out = self.conv1(x)
    x.mul_(2)
    return self.act(self.bn1(out) + x)


def residual_changed_between(self, x):
    out = self.bn1(self.conv1(x)) + x
    x.zero_()
    return self.act(out)


def norm_input_changed_between(self, x):
    out = self.bn1(x)
    x.view(-1).add_(1)
    return self.act(out), x


def sum_into_the_input(self, x):
    y = self.conv1(x)
    x += y
    return self.gap(self.act(x)), x


def in_place_before_the_norm(self, x):
    y = x
    y *= 2
    return self.act(self.bn1(x)) + y


TRAPS = (used_twice, into_the_input, relu_thrown_away, input_changed_between)
TRAPS += (residual_changed_between, norm_input_changed_between, sum_into_the_input, in_place_before_the_norm)


@pytest.mark.parametrize("forward", TRAPS, ids=lambda f: f.__name__)
def test_what_is_written_in_place_shows(forward):
    net = block(forward)
    twin = copy.deepcopy(net)
    assert not pooling_ext.patch(net).skipped
    with torch.no_grad():  # PyTorch has no backward for most of these
        assert_equal(net, twin, batch())


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (1, 4, 6, 6), (4, 1, 1), (2, 4, 6, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("in_place", [True, False])
def test_residuals_that_differ(shape, dtype, in_place):
    """Broadcasting and type promotion are PyTorch's."""

    def out_of_place(self, x, y):
        return self.act(self.bn1(self.conv1(x)) + y)

    def into_the_norm(self, x, y):
        out = self.bn1(self.conv1(x))
        out += y
        return self.act(out)

    net = block(into_the_norm if in_place else out_of_place).float().eval()
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    x, y = batch().float(), torch.randn(shape, dtype=dtype)
    ours, theirs = net(x, y), twin(x, y)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "option", [{}, {"padding": "same"}, {"padding": "valid"}, {"stride": 2, "dilation": 2}]
)
def test_the_residual_of_any_convolution(option):
    net = block(lambda s, x, y: s.act(s.bn1(s.conv1(x)) + y))
    net.conv1 = nn.Conv2d(4, 4, (3, 1), **option).double()
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    x = batch(2, 4, 9, 8)
    y = torch.randn_like(net.conv1(x))
    assert Call(net.conv1, None, x, y).residual_fits()
    assert not Call(net.conv1, None, x, y[..., :1]).residual_fits()
    assert_equal(net, twin, x, y)


def test_autocast():
    net = block(residual_block).float()
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    x = batch().float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = net(x), twin(x)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=4e-2, atol=4e-2)


def test_sync_batch_norm_before_and_after():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(block(residual_block))
    twin = block(residual_block)
    twin.load_state_dict(net.state_dict())
    assert [entry.what for entry in pooling_ext.patch(net, strict=True).replaced][:2] == CHAINS["residual"][1]
    late = copy.deepcopy(twin)
    pooling_ext.patch(late)
    late = nn.SyncBatchNorm.convert_sync_batchnorm(late)
    x = batch()
    assert_equal(net, copy.deepcopy(twin), x)
    assert_equal(late, twin, x)
    assert isinstance(late.bn1, nn.SyncBatchNorm)


@pytest.mark.parametrize("forward", [residual_block, flags, CHAINS["into a Sequential"][0]])
def test_compiles_and_exports(forward):
    net = block(forward)
    twin = copy.deepcopy(net)
    pooling_ext.patch(net)
    x = batch()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        torch.testing.assert_close(compiled.train(mode)(x), twin.train(mode)(x))
    assert net._modules.keys() == twin._modules.keys()
    if forward is flags:
        net.flag = twin.flag = True  # Dynamo's guards see what ours look at
        torch.testing.assert_close(compiled(x), twin(x))
    exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), twin(x))


def test_small_inputs_go_through_the_modules():
    def forward(self, x):
        return TF.relu(self.bn1(self.conv1(x)))

    net = block(forward).eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = net(x)
    pooling_ext.patch(net)
    operators = []
    for least in (0, x.numel() + 1):
        with from_size(least):
            found = pooling_ext.explain(net, x)
            operators.append([(decision.op, decision.backend) for decision in found.decisions])
            torch.testing.assert_close(net(x), expected)
    assert ("batch_norm_act", "cpu") in operators[0]
    assert operators[1] == [("conv_bn_act", "PyTorch's convolution"), ("batch_norm_act", "eager")]
