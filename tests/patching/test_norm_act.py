"""Batch norms that go on with an activation, modules that do nothing, and batch norms of other ranks."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as TF
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
from pooling_ext.ops.conv_bn_act import norm as norms

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
    assert [entry.what for entry in report.replaced] == [*first, "conv2-bn2-add-act2"]
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


# --- activations -------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu6": (nn.ReLU6, TF.relu6),
    "silu": (nn.SiLU, TF.silu),
    "hardswish": (nn.Hardswish, TF.hardswish),
    "hardsigmoid": (nn.Hardsigmoid, TF.hardsigmoid),
    "leaky_relu": (lambda: nn.LeakyReLU(0.25), lambda x: TF.leaky_relu(x, 0.25)),
    "gelu": (nn.GELU, TF.gelu),
    "gelu_tanh": (lambda: nn.GELU("tanh"), lambda x: TF.gelu(x, approximate="tanh")),
    "hardtanh": (lambda: nn.Hardtanh(0.0, 6.0), lambda x: TF.hardtanh(x, 0.0, 6.0)),
}


class Activated(nn.Module):
    """A batch norm with an activation, as a module or as a function, and perhaps an addition between."""

    def __init__(self, act, adds):
        super().__init__()
        self.conv, self.bn, self.act, self.adds = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act, adds

    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.act(y + x if self.adds else y)


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("adds", [False, True], ids=["", "add"])
@pytest.mark.parametrize("kind", ["module", "function", "own"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, kind, adds):
    module, function = ACTIVATIONS[name]
    act = module() if kind != "function" else function
    net = Activated(act, adds)
    if kind == "own":
        if adds:
            pytest.skip("a batch norm's own activation comes before an addition")
        net.bn, net.act = NormAct(4, act), nn.Identity()
    net = settled(net)
    twin = copy.deepcopy(net)
    what = pooling_ext.patch(net, strict=True).replaced[0].what
    assert len(what.split("-")) == 3 + adds
    for mode in (True, False):
        # The gradient of PyTorch's Hardsigmoid is float32's 1 / 6 in float64 too.
        exactly = name != "hardsigmoid"
        assert_equal(net.train(mode), twin.train(mode), batch(*X) * 3, rtol=1e-9 if exactly else 1e-7)


def test_parameters_of_activations_are_read_at_each_call():
    net = settled(nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.125), nn.BatchNorm2d(4), nn.GELU()))
    twin = copy.deepcopy(net)
    pooling_ext.patch(net)
    for one in (net, twin):
        one[1].negative_slope, one[3].approximate = 0.75, "tanh"
    for mode in (True, False):
        assert_equal(net.train(mode), twin.train(mode), batch(*X))
    for one in (net, twin):
        one[1].negative_slope = -0.5
    for mode in (True, False):
        assert_equal(net.train(mode), twin.train(mode), batch(*X))


class Swish(nn.Module):
    """An activation by a function of PyTorch, as other libraries have classes for."""

    def __init__(self, inplace=False):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return TF.silu(x, inplace=self.inplace)


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("inplace", [False, True])
def test_an_activation_of_another_class(inplace):
    net = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Swish(inplace)))
    twin = copy.deepcopy(net)
    assert pooling_ext.patch(net).replaced[0].what == "Conv2d(0)-BatchNorm2d(1)-Swish(2)"
    for mode in (True, False):
        assert_equal(net.train(mode), twin.train(mode), batch(*X))
    net[2].inplace = twin[2].inplace = not inplace  # then the module runs
    assert_equal(net, twin, batch(*X))
    for one in (net, twin):
        one[2].register_forward_hook(lambda m, args, out: out * 2)
    assert_equal(net, twin, batch(*X))


# --- other ranks -------------------------------------------------------------------------------------------


class Renamed3d(nn.Conv3d):
    """As torchvision's Conv3DSimple."""


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU])
def test_other_ranks(rank, act):
    conv, norm = (nn.Conv1d, nn.BatchNorm1d) if rank == 1 else (Renamed3d, nn.BatchNorm3d)
    layers = [conv(4, 6, 3, padding=1), norm(6), act(), conv(6, 4, 1), nn.Identity(), norm(4)]
    net = settled(nn.Sequential(*layers))
    twin = copy.deepcopy(net)
    report = pooling_ext.patch(net, strict=True)
    assert report.batch_norms_fused == 2
    for mode in (True, False):
        assert_equal(net.train(mode), twin.train(mode), batch(3, 4, *[5, 6, 7][:rank]))


def test_3d_batch_norms_run_fused(monkeypatch):
    net = settled(nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), nn.ReLU()))
    pooling_ext.patch(net)
    monkeypatch.setattr(norms, "run_eager", lambda *_: pytest.fail("eager"))
    net(batch(2, 4, 5, 5, 5))
    with torch.no_grad():
        net.eval()(batch(2, 4, 5, 5, 5))


def test_features_alone():
    net = settled(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()))
    twin = copy.deepcopy(net)
    pooling_ext.patch(net, strict=True)
    for mode in (True, False):
        assert_equal(net.train(mode), twin.train(mode), batch(5, 4))
