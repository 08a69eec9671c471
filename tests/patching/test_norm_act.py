"""Batch norms that go on with an activation, and modules that do nothing."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from fusing_cases import assert_equal, batch
from norm_act_cases import (
    Block,
    DropPath,
    InheritedNormAct,
    NormAct,
    OtherMomentum,
    Scaled,
    SyncNormAct,
    Uncounted,
    Untraceable,
    settled,
    with_drop,
)
from torch import nn

import pooling_ext
from pooling_ext.graph.modules import find_steps, passes

X = (3, 4, 6, 6)


NORMS = {
    "written out": (NormAct, "ReLU"),
    "inherited": (InheritedNormAct, "relu"),
    "without an activation": (lambda n: NormAct(n, nn.Identity()), None),
    "without statistics": (lambda n: NormAct(n, track_running_stats=False), "ReLU"),
    "without parameters": (lambda n: NormAct(n, affine=False), "ReLU"),
    "another activation": (lambda n: NormAct(n, nn.Mish()), "Mish"),
    "a drop layer": (lambda n: with_drop(NormAct(n), 0.5), "Dropout2d-ReLU"),
    "cumulative": (lambda n: NormAct(n, momentum=None), "left"),
    "scaled": (Scaled, "left"),
    "other momentum": (OtherMomentum, "left"),
    "uncounted": (Uncounted, "left"),
}


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("name", NORMS)
def test_norm_that_goes_on(name):
    build, own = NORMS[name]
    net = settled(Block(build))
    twin = copy.deepcopy(net)
    report = pooling_ext.patch(net)
    first = [] if own == "left" else ["conv1-bn1" if own is None else f"conv1-bn1-{own}"]
    replaced = [entry.what for entry in report.replaced if entry.what != "Conv2d"]
    assert replaced == [*first, "conv2-bn2-add-act2"]
    assert (report.batch_norms_fused, report.batch_norms) == (2 - (own == "left"), 2)
    assert [entry.path for entry in report.batch_norms_left] == ["bn1"] * (own == "left")
    for mode in (True, False):
        for _ in range(2):
            torch.manual_seed(0)
            ours, theirs = net.train(mode), twin.train(mode)
            x = batch(*X)
            if "Dropout" in str(own) and mode:  # which draws as often
                torch.manual_seed(1)
                out = ours(x)
                torch.manual_seed(1)
                torch.testing.assert_close(out, theirs(x))
            else:
                assert_equal(ours, theirs, x)


@pytest.mark.parametrize("norm", [NormAct, InheritedNormAct])
def test_the_fused_operators_run(norm, request):
    net = settled(Block(norm))
    pooling_ext.patch(net, strict=True)
    request.getfixturevalue("no_eager_norm")
    for mode in (True, False):
        net.train(mode)(batch(*X))


def change_activation(net):
    net.bn1.act = nn.Tanh()


def change_drop(net):
    net.bn1.drop = nn.Hardtanh()


def hook_activation(net):
    net.bn1.act.register_forward_hook(lambda m, args, out: out + 1)


def hook_drop(net):
    net.bn1.drop.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def hook_norm(net):
    net.bn1.register_forward_hook(lambda m, args, out: out * 3)


def change_momentum(net):
    net.bn1.momentum = 0.4


def cumulative(net):
    net.bn1.momentum = None


def change_eps(net):
    net.bn1.eps = 0.25


def no_statistics(net):
    net.bn1.track_running_stats = False


def change_forward(net):
    net.bn1.forward = lambda x: x * 3


def change_class(net):
    net.bn1.__class__ = Scaled


def evaluate_norm(net):
    net.bn1.eval().requires_grad_(False)


def plain_norm(net):
    net.bn1 = nn.BatchNorm2d(8).double()


def hook_identity(net):
    net.space.register_forward_hook(lambda m, args, out: out * 2)
    net.aa.register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def hook_backward(net):
    net.aa.register_full_backward_hook(lambda m, grads, outs: (grads[0] * 2,))


def change_identity(net):
    net.aa, net.space = nn.Sigmoid(), nn.Tanh()


def identity_that_writes(net):
    net.space, net.drop_path = nn.ReLU(inplace=True), nn.ReLU(inplace=True)


def drop_path(net):
    net.drop_path.probability = 0.5


def drop_block(net):
    net.drop_block.p = 0.5


CHANGES = (change_activation, change_drop, hook_activation, hook_drop, hook_norm, change_momentum, cumulative)
CHANGES += (change_eps, no_statistics, change_forward, change_class, evaluate_norm, plain_norm)
CHANGES += (hook_identity, hook_backward, change_identity, identity_that_writes, drop_path, drop_block)
CHANGES += (nn.Module.eval, lambda net: net.requires_grad_(False))


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_are_heeded(change, first):
    """Those that are made after the model is patched, and those that it was patched with."""
    net = settled(Block())
    twin = copy.deepcopy(net)
    steps = [lambda: change(net), lambda: pooling_ext.patch(net)]
    for step in steps if first else reversed(steps):
        step()
    change(twin)
    for mode in (twin.training, False):
        x = batch(*X)
        for one in (net, twin):
            if one.training != mode:
                one.train(mode)
        for _ in range(2):
            outputs = []
            for one in (net, twin):
                torch.manual_seed(2)
                outputs.append(one(x.clone()))
            torch.testing.assert_close(*outputs)
        torch.testing.assert_close(list(net.buffers()), list(twin.buffers()))
        if change not in (drop_path, drop_block):
            assert_equal(net, twin, x)


def test_an_input_of_another_rank_is_an_error():
    net = Block()
    pooling_ext.patch(net)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        net(torch.randn(4, 6, 6))
    with pytest.raises((AssertionError, ValueError)):
        lone = NormAct(4)
        pooling_ext.patch(lone)
        lone(torch.randn(2, 4, 3, 3, 3))


def test_a_class_that_gets_another_forward(monkeypatch):
    net = settled(Block())
    pooling_ext.patch(net)
    twin = copy.deepcopy(net)
    pooling_ext.unpatch(twin)
    monkeypatch.setattr(NormAct, "forward", lambda self, x: x * 3)
    x = batch(*X)
    torch.testing.assert_close(net(x), twin(x))


def asserts(self, x):
    torch._assert(x.shape[1] == self.conv.in_channels, "another number of channels")
    return torch.relu(self.norm(self.conv(x)))


def asserts_with_a_value(self, x):
    torch._assert(x.shape[1] == 4, f"another number of channels: {x.shape[1]}")
    return torch.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("forward", [asserts, asserts_with_a_value], ids=lambda f: f.__name__)
def test_assertions_stay(forward):
    """Of a message with a value in it no trace can stand for, so there the batch norm is fused alone."""
    net = settled(type("Net", (Untraceable,), {"forward": forward})(nn.BatchNorm2d(4)))
    twin = copy.deepcopy(net)
    report = pooling_ext.patch(net)
    together = forward is asserts
    assert report.replaced[0].what == ("conv-norm-relu" if together else "BatchNorm2d")
    assert_equal(net, twin, batch(*X))
    messages = []
    for one in (net, twin):
        with pytest.raises(AssertionError) as error:
            one(batch(2, 5, 6, 6))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_what_passes():
    assert all(map(passes, (nn.Identity(), nn.Dropout(0.0), nn.Sequential())))
    free, busy = DropPath(0.0), DropPath(0.5)
    assert find_steps(free) is not None and passes(free)
    assert find_steps(busy) is None
    assert not any(map(passes, (busy, nn.Dropout(0.1), nn.Sequential(nn.ReLU()), nn.ReLU())))
    hooked = nn.Identity()
    hooked.register_forward_hook(lambda *_: None)
    assert not passes(hooked)


def test_copies_and_unpatching():
    net = settled(Block()).eval()
    plain = [type(module) for module in net.modules()]
    x = batch(*X)
    expected = net(x)
    pooling_ext.patch(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(file, weights_only=False),
    ):
        assert [type(m) for m in twin.modules()] == [type(m) for m in net.modules()]
        torch.testing.assert_close(twin(x), expected)
        pooling_ext.unpatch(twin)
        assert [type(m) for m in twin.modules()] == plain
        torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize("norm", [NormAct, InheritedNormAct])
@pytest.mark.parametrize("training", [True, False])
def test_compiled(norm, training):
    torch._dynamo.reset()
    net = settled(Block(norm)).train(training)
    twin = copy.deepcopy(net)
    pooling_ext.patch(net)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = batch(*X)
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(list(net.buffers()), list(twin.buffers()))


def test_a_stem():
    net = settled(nn.Sequential(nn.Conv2d(4, 8, 3), NormAct(8), nn.Identity(), nn.MaxPool2d(3, 2, 1)))
    twin = copy.deepcopy(net)
    (entry, *_) = pooling_ext.patch(net).replaced
    assert entry.what == "Conv2d(0)-NormAct(1)-ReLU-MaxPool2d(3)"
    assert entry.why.endswith("batch_norm_relu_max_pool")
    for mode in (True, False):
        assert_equal(net.train(mode), twin.train(mode), batch(2, 4, 12, 12))


def test_sync_batch_norm_with_an_activation():
    net = SyncNormAct(4)
    net.act = nn.ReLU()
    net = settled(nn.Sequential(nn.Conv2d(4, 4, 1), net))
    twin = copy.deepcopy(net)
    assert pooling_ext.patch(net).replaced[0].what == "Conv2d(0)-SyncNormAct(1)-ReLU"
    assert_equal(net.eval(), twin.eval(), batch(*X))
