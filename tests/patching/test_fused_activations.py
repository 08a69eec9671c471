"""Chains with activations other than ReLU, and batch norms of other ranks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as TF
from fusing_cases import assert_equal, batch
from norm_act_cases import (
    NormAct,
    settled,
)
from torch import nn

import pooling_ext
from pooling_ext.ops.conv_bn_act import norm as norms

X = (3, 4, 6, 6)


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
