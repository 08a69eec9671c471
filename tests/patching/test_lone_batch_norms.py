"""Batch norms that are fused alone, and what reports say of those that are fused and left."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fusing_cases import assert_equal, batch
from helpers import run_python
from norm_act_cases import (
    Block,
    InheritedNormAct,
    NormAct,
    Scaled,
    Untraceable,
    settled,
    with_drop,
)
from torch import nn

import pooling_ext

X = (3, 4, 6, 6)

# --- batch norms that stand alone --------------------------------------------------------------------------


LONE = {
    "plain": lambda: nn.BatchNorm2d(4),
    "written out": lambda: NormAct(4),
    "inherited": lambda: InheritedNormAct(4),
    "another activation": lambda: NormAct(4, nn.Mish()),
    "dropped": lambda: with_drop(NormAct(4), 0.0),
}


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("name", LONE)
def test_alone(name):
    net = settled(Untraceable(LONE[name]()))
    twin = copy.deepcopy(net)
    report = pooling_ext.patch(net)
    assert report.batch_norms_fused == report.batch_norms == 1
    assert [entry.path for entry in report.skipped] == ["(root)"]
    assert [entry.path for entry in report.replaced] == ["norm", "conv"]
    assert isinstance(net.norm, type(twin.norm)) and type(net.norm) is not type(twin.norm)
    again = pooling_ext.patch(net)
    assert not again.replaced and len(again.skipped) == 3 and again.batch_norms_fused == 1
    calls = []
    for one in (net, twin):
        one.norm.register_forward_hook(lambda m, args, out: calls.append(out.detach()))
    for mode in (True, False):
        assert_equal(net.train(mode), twin.train(mode), batch(*X))
    assert len(calls) == 4
    torch.testing.assert_close(calls[0], calls[1])
    pooling_ext.unpatch(net)
    assert type(net.norm) is type(twin.norm)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, InheritedNormAct])
def test_alone_runs_fused(norm, request):
    net = settled(Untraceable(norm(4)))
    pooling_ext.patch(net)
    request.getfixturevalue("no_eager_norm")
    with torch.no_grad():
        net.eval()(batch(*X))
    net.train()(batch(*X))


def test_alone_is_copied_and_pickled(tmp_path):
    net = settled(Untraceable(nn.BatchNorm2d(4))).eval()
    pooling_ext.patch(net)
    x = batch(*X)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(twin.norm) is type(net.norm)
        torch.testing.assert_close(twin(x), net(x))
    norm = nn.BatchNorm2d(4).eval()
    pooling_ext.patch(norm)
    torch.save((norm, x.float(), norm(x.float()).detach()), tmp_path / "norm.pt")
    result = run_python(f"""
import torch, pooling_ext
norm, x, expected = torch.load({str(tmp_path / "norm.pt")!r}, weights_only=False)
torch.testing.assert_close(norm(x), expected)
print(len(pooling_ext.patch(norm).replaced))
pooling_ext.unpatch(norm)
print(type(norm).__mro__[0].__name__, type(norm) is torch.nn.BatchNorm2d)
""")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0", "BatchNorm2d", "True"]


def test_alone_and_then_in_a_chain():
    """A norm that was patched by itself may come into a model that is patched later."""
    norm = nn.BatchNorm2d(4)
    pooling_ext.patch(norm)
    net = settled(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.ReLU()))
    twin = copy.deepcopy(net)
    pooling_ext.unpatch(twin)
    assert pooling_ext.patch(net).replaced[0].what == "Conv2d(0)-BatchNorm2d(1)-ReLU(2)"
    for mode in (True, False):
        assert_equal(net.train(mode), twin.train(mode), batch(*X))


def test_a_hooked_norm_is_fused_inside_its_hooks(request):
    net = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    calls = []
    net[1].register_forward_hook(lambda m, args, out: calls.append(out))
    report = pooling_ext.patch(net, strict=True)
    assert report.batch_norms_fused == 1
    request.getfixturevalue("no_eager_norm")
    net[:2](batch(*X))
    assert len(calls) == 1


# --- the report --------------------------------------------------------------------------------------------


def test_report_counts_and_tells_why():
    net = nn.Sequential(nn.Conv2d(4, 8, 1), Scaled(8), Block(), nn.LazyBatchNorm2d())
    with pytest.raises(pooling_ext.ArgumentError, match=r"1 \(Scaled\)"):
        pooling_ext.patch(net, strict=True)
    report = pooling_ext.patch(net)
    assert [(entry.path, entry.what) for entry in report.batch_norms_left] == [
        ("1", "Scaled"),
        ("3", "LazyBatchNorm2d"),
    ]
    assert "fused 2 of 4 batch norms" in str(report)
    assert "1       Scaled" in str(report)


def test_nothing_is_told_twice():
    """Of a Sequential that its parent calls before an addition, the chain is the parent's."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x):
            return torch.relu(self.down(x) + x)

    report = pooling_ext.patch(Net())
    assert [entry.path for entry in report.replaced] == ["(root)"]
    assert len(set(report.replaced)) == len(report.replaced)


@pytest.mark.parametrize("norm", [NormAct, InheritedNormAct, nn.BatchNorm2d])
def test_freeze_counts(norm):
    net = settled(Block(norm)).float().eval()
    x = torch.randn(*X)
    frozen = pooling_ext.freeze(net, x)
    torch.testing.assert_close(frozen(x), net(x), rtol=1e-4, atol=1e-4)
    assert (frozen.report.batch_norms_fused, frozen.report.batch_norms) == (2, 2)
    name = "BatchNorm2d" if norm is nn.BatchNorm2d else norm.__name__
    assert f"{name} bn1" in str(frozen.report) and "fused 2 of 2 batch norms" in str(frozen.report)


def test_freeze_tells_what_is_left():
    net = settled(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    net[3].register_forward_hook(lambda m, args, out: out * 2)

    class Net(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers, self.unused = nn.ModuleList(layers), nn.BatchNorm2d(4)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    frozen = pooling_ext.freeze(Net(net).eval(), batch(*X))
    report = frozen.report
    assert [(entry.path, entry.why) for entry in report.batch_norms_left] == [("layers.3", "has hooks")]
    assert report.uncalled == ["unused"]
    assert "fused 1 of 2 batch norms; 1 more are not called in eval mode" in str(report)
