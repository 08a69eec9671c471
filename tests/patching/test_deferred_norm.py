"""Batch norms that patched models leave to the next convolution, where a clock says that this is faster."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import pooling_ext
from pooling_ext.backends import autotune, triton_library
from pooling_ext.ops import conv_autotune
from pooling_ext.ops.prologue_norm import PrologueNorm

pytestmark = pytest.mark.parametrize(
    "backend", ["triton", pytest.param("triton-cuda", marks=pytest.mark.gpu)], indirect=True
)
CHANNELS_LAST = torch.channels_last


@pytest.fixture
def deferred(monkeypatch):
    """A clock for which "deferred" is fastest; gives the convolutions that normalize what they read."""
    calls = []

    def measured(call, ways, input):
        if "deferred" not in ways:
            return next(iter(ways))
        before = len(calls)
        _, failures = autotune.measure(ways, lambda way: float(way() is None))
        assert not failures
        del calls[before:]
        return "deferred"

    convolved = PrologueNorm.convolved

    def noted(self, *args):
        calls.append(args)
        return convolved(self, *args)

    monkeypatch.setattr(conv_autotune, "_measured", measured)
    monkeypatch.setattr(conv_autotune, "_chosen", {})
    monkeypatch.setattr(PrologueNorm, "convolved", noted)
    return calls


class Pair(nn.Module):
    """Two convolutions, of which the second pads what the first's batch norm gives."""

    def __init__(self, affine=True, relu=True, momentum: float | None = 0.1, **options: Any):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 1)
        self.bn1 = nn.BatchNorm2d(8, affine=affine, momentum=momentum)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 4, 3, 2, 1, **options)
        self.bn2 = nn.BatchNorm2d(4)
        self.relu = relu

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        if self.relu:
            x = self.act(x)
        return TF.relu(self.bn2(self.conv2(x)))


def prepared(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """``net`` with random batch norms, and a copy in float64."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    net.to(memory_format=CHANNELS_LAST)
    return net, copy.deepcopy(net).double()


def pair(**options) -> tuple[nn.Module, nn.Module]:
    return prepared(Pair(**options))


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 5, 6)).contiguous(memory_format=CHANNELS_LAST)


def step(net, x, call=None):
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    net.zero_grad()
    output = (call or net)(leaf)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    (output * weights).sum().backward()
    results = {"output": output.detach(), "grad": leaf.grad}
    results |= {f"grad {name}": parameter.grad for name, parameter in net.named_parameters()}
    return results | dict(net.named_buffers())


def assert_alike(actual, expected, tolerance=2e-5):
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        found = actual[name]
        if right is None:
            assert found is None, name
            continue
        size = max(1.0, right.abs().max().item())
        error = (found.double() - right.double()).abs().max().item()
        assert error <= tolerance * size, f"{name}: {error} of {size}"


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block", [Bottleneck, BasicBlock])
def test_blocks(backend, block, stride, deferred):
    channels = 8
    planes = channels // block.expansion
    downsample = nn.Sequential(nn.Conv2d(channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
    net, exact = prepared(block(channels, planes, stride, downsample if stride > 1 else None))
    pooling_ext.patch(net, strict=True)
    x = images(2, channels, 5, 6)
    assert_alike(step(net, x), step(exact, x.double()))
    assert len(deferred) == (2 if block is Bottleneck else 1)


class Narrow(ResNet):
    """ResNet-18 with a sixteenth of the channels, since the interpreter is slow.

    But at least 8: of fewer, PyTorch 2.14's weight gradient of a strided 1x1 convolution writes beyond its
    memory, on AVX2 with one thread.
    """

    def __init__(self):
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.fc = nn.Linear(32, 3)

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, max(8, planes // 16), *args, **kwargs)


def test_resnet(backend, deferred):
    net, exact = prepared(Narrow())
    plain = copy.deepcopy(net)
    pooling_ext.patch(net)
    x = images(2, 3, 32, 32)
    actual, expected = step(net, x), step(exact, x.double())
    assert len(deferred) == 8  # one in each block
    theirs = step(plain, x)
    for name, right in expected.items():
        found, allowed = ((y[name].double() - right).norm() for y in (actual, theirs))
        assert found <= 4 * allowed + 1e-6 * right.double().norm(), name


@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"relu": False}, {"momentum": None}],
    ids=["usual", "not affine", "no ReLU", "cumulative"],
)
def test_options(backend, options, deferred):
    net, exact = pair(**options)
    pooling_ext.patch(net, strict=True)
    x = images()
    for _ in range(2):
        assert_alike(step(net, x), step(exact, x.double()))
    assert deferred


def test_bfloat16(backend, deferred):
    """No further from float64 than the same without deferring, but for what rounding moves over a sign."""
    net, exact = pair()
    apart = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    x = images(4, 3, 9, 8)
    device = x.device.type
    with torch.autocast(device, torch.bfloat16):
        actual, theirs = step(net, x), step(apart, x)
    assert deferred
    for name, right in step(exact, x.double()).items():
        if name.startswith("grad conv") and name.endswith("bias"):
            continue  # it is 0 but for rounding
        found, allowed = ((y[name].double() - right).norm() for y in (actual, theirs))
        assert found <= 1.5 * allowed + 2.0**-6 * right.double().norm(), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(backend, reentrant, deferred):
    net, exact = pair()
    pooling_ext.patch(net, strict=True)
    x = images()
    call = lambda y: checkpoint(net, y, use_reentrant=reentrant)  # noqa: E731
    actual, expected = step(net, x, call), step(exact, x.double())
    names = [name for name in expected if "running" not in name and "num_batches" not in name]
    assert_alike({name: actual[name] for name in names}, {name: expected[name] for name in names})
    assert deferred


def test_copies(backend, deferred):
    net, exact = pair()
    pooling_ext.patch(net, strict=True)
    x = images()
    assert_alike(step(copy.deepcopy(net), x), step(exact, x.double()))
    assert deferred


def test_backward_twice_and_its_gradient(backend, deferred):
    net, exact = pair()
    pooling_ext.patch(net, strict=True)
    x = images()
    found = []
    for model, value in ((net, x), (exact, x.double())):
        leaf = value.requires_grad_()
        wanted = leaf, *model.parameters()
        output = model(leaf).square().sum()
        first = torch.autograd.grad(output, wanted, retain_graph=True)
        again = torch.autograd.grad(output, wanted, create_graph=True)
        torch.testing.assert_close(first, again, rtol=1e-3, atol=1e-4)
        second = torch.autograd.grad(torch.stack([y.square().sum() for y in again]).sum(), leaf)
        found.append(dict(enumerate((*first, *again, *second))))
    assert_alike(found[0], found[1], tolerance=1e-4)
    assert deferred


@pytest.mark.parametrize("frozen", ["conv1 bn1", "conv1 conv2", "conv2 bn2", "bn1", "conv1 bn1 conv2 bn2"])
@pytest.mark.parametrize("wanted", [True, False], ids=["input", "no input"])
def test_frozen_parameters(backend, frozen, wanted, deferred):
    net, exact = pair()
    pooling_ext.patch(net, strict=True)
    x = images()
    found = []
    for model, value in ((net, x), (exact, x.double())):
        for name in frozen.split():
            getattr(model, name).requires_grad_(False)
        leaf = value.requires_grad_(wanted)
        output = model(leaf)
        if output.requires_grad:
            output.square().sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append({"output": output.detach(), "grad": leaf.grad} | grads | dict(model.named_buffers()))
    assert_alike(*found)
    assert deferred


def test_without_gradients(backend, deferred):
    net, exact = pair()
    pooling_ext.patch(net, strict=True)
    x = images()
    with torch.no_grad():
        assert_alike({"output": net(x)}, {"output": exact(x.double())})
    assert_alike(dict(net.named_buffers()), dict(exact.named_buffers()))
    assert deferred


@pytest.mark.parametrize("name", ["conv1", "bn1", "act", "conv2", "bn2"])
def test_hooks_see_what_they_would(backend, name, deferred):
    net, exact = pair()
    pooling_ext.patch(net, strict=True)
    x = images()
    seen = []
    for model in (net, exact):
        getattr(model, name).register_forward_hook(
            lambda module, args, output: seen.append((args[0].detach().clone(), output.detach().clone()))
        )
    assert_alike(step(net, x), step(exact, x.double()))
    assert len(seen) == 2
    assert_alike(dict(enumerate(seen[0])), dict(enumerate(seen[1])))


def replace_conv(net):
    net.conv2 = nn.Conv2d(8, 4, 3, 2, padding="valid").to(memory_format=CHANNELS_LAST)


def replace_norm(net):
    net.bn1 = nn.InstanceNorm2d(8)


def another_forward(net):
    plain = net.conv2.forward
    net.conv2.forward = lambda x: plain(x) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.eval(),
        lambda net: net.bn1.eval(),
        lambda net: net.bn2.eval(),
        replace_conv,
        replace_norm,
        another_forward,
        lambda net: net.conv2.double(),
    ],
    ids=["eval", "bn1 in eval", "bn2 in eval", "conv2", "bn1", "forward", "dtype"],
)
def test_what_changes_after_patch_is_heeded(backend, change, deferred):
    net = pair()[0]
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    for model in (net, twin):
        torch.manual_seed(1)
        change(model)
    x, found = images(), []
    for model in (net, twin):
        try:
            found.append(step(model, x))
        except RuntimeError as error:
            found.append(str(error))
    if isinstance(found[1], str):
        assert found[0] == found[1]
    else:
        assert_alike(*found)
    assert not deferred


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding_mode": "reflect"}], ids=str)
def test_convolutions_that_ours_are_not_for(backend, options, deferred):
    net, exact = pair(**options)
    pooling_ext.patch(net, strict=True)
    x = images()
    assert_alike(step(net, x), step(exact, x.double()))
    assert not deferred


def test_a_value_that_goes_elsewhere_too(backend, deferred):
    class Net(Pair):
        def forward(self, x):
            x = self.act(self.bn1(self.conv1(x)))
            return TF.relu(self.bn2(self.conv2(x))) + x.mean()

    net, exact = prepared(Net())
    pooling_ext.patch(net, strict=True)
    x = images()
    assert_alike(step(net, x), step(exact, x.double()))
    assert not deferred


def test_apart_where_that_is_faster(backend, deferred, monkeypatch):
    monkeypatch.setattr(conv_autotune, "_measured", lambda call, ways, input: next(iter(ways)))
    net, exact = pair()
    pooling_ext.patch(net, strict=True)
    x = images()
    assert_alike(step(net, x), step(exact, x.double()))
    assert not deferred


def test_one_value_in_a_channel(backend, deferred):
    net, _ = pair()
    pooling_ext.patch(net, strict=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(images(1, 3, 1, 1))


def test_traffic_of_backward(backend, monkeypatch):
    """Eight passes over memory: no tensor of the normalized input is written or read."""
    if backend != "triton" or not triton_library.interpreted():
        pytest.skip("counted in Triton's interpreter")
    from benchmarks.harness.traffic import counted
    from pooling_ext.triton.conv import conv_weight_grad
    from pooling_ext.triton.conv.conv_configs import ANY_CARD

    monkeypatch.setattr(conv_autotune, "_chosen", {})
    monkeypatch.setattr(conv_weight_grad, "card", lambda device: ANY_CARD)
    x, grad = (images(16, 64, 28, 28).bfloat16() for _ in range(2))
    weight = torch.randn(64, 64, 1, 1).bfloat16()
    leaves = [tensor.requires_grad_() for tensor in (x, torch.ones(64), torch.zeros(64), weight)]
    stats = torch.stack((torch.zeros(64), torch.ones(64))).double()
    norm = PrologueNorm(x, stats, leaves[1], leaves[2], 1e-5, True)
    output, _ = norm.convolved(weight, None, conv_autotune.ConvParams((1, 1), (0, 0), (1, 1), 1))
    with counted() as traffic:
        torch.autograd.grad(output, leaves, grad)
    # The convolution's gradients read the output's and the input, twice, and write one; the batch norm's
    # reads two and writes one. A tenth is for weights, and for sums of each program.
    assert 8 * x.nbytes <= traffic.nbytes <= 8.8 * x.nbytes
