"""Models whose layers run by Winograd beyond 3x3 kernels of stride 1, patched and frozen."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conv2d_cases import always_winograd, off
from torch import Tensor, nn

import pooling_ext

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    always_winograd(monkeypatch)


class Volume(nn.Module):
    """A small net for volumes, with a convolution of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(16, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(32)
        self.down = nn.Conv3d(32, 32, (1, 3, 3), (1, 2, 2), (0, 1, 1), bias=False)
        self.point = nn.Conv3d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.point(self.down(x).relu())


def trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.norm.running_mean.normal_()  # type: ignore[union-attr,operator]
        model.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr,operator]
    return model


def test_patched_volumes(monkeypatch):
    """As unpatched in evaluation and training; pickled, copied and undone."""
    model, x = trained(Volume()), torch.randn(2, 16, 4, 12, 11)
    wide = copy.deepcopy(model).double()
    report = pooling_ext.patch(model)
    assert {entry.what for entry in report.replaced} == {"Conv3d", "norm-relu"}
    for conv in (model.stem, model.point):
        assert type(conv) is pooling_ext.nn.Conv3d and isinstance(conv, nn.Conv3d)
    for mode in (False, True):
        model.train(mode), wide.train(mode)
        ours, exact = model(x), wide(x.double())
        assert off(ours, exact) <= 5e-5
        for module, loss in ((model, ours), (wide, exact)):
            module.zero_grad()
            loss.square().sum().backward()
        for one, other in zip(model.parameters(), wide.parameters(), strict=True):
            assert off(one.grad, other.grad) <= 5e-4  # type: ignore[arg-type]
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(again.eval()(x), model.eval()(x))
    pooling_ext.unpatch(model)
    assert type(model.stem) is nn.Conv3d


def test_exactly_patched_volumes_stay_pytorchs():
    model = Volume()
    replaced = pooling_ext.patch(model, exact=True).replaced
    # The last one has a kernel of one element, which is no affair of Winograd's.
    assert [(entry.path, entry.what) for entry in replaced] == [("(root)", "norm-relu"), ("point", "Conv3d")]
    assert type(model.stem) is nn.Conv3d


def test_frozen_volumes():
    """Convolutions with planes, their batch norm folded in, and strided ones run by our kernels."""
    model, x = trained(Volume()).eval(), torch.randn(2, 16, 4, 12, 11)
    frozen = pooling_ext.freeze(model, x)
    assert repr(frozen).count("Winograd") == 2
    expected = copy.deepcopy(model).double()(x.double())
    assert off(frozen(x), expected) <= 5e-5
    assert torch.equal(pickle.loads(pickle.dumps(frozen))(x), frozen(x))
    other = torch.randn(1, 16, 6, 9, 9)
    assert off(frozen(other), copy.deepcopy(model).double()(other.double())) <= 5e-5


@pytest.mark.parametrize("options", [{"stride": 2}, {"dilation": 2}], ids=["stride", "dilation"])
def test_frozen_blocks(options):
    """With batch norm, a residual and an activation."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            padding = options.get("dilation", 1)
            self.conv = nn.Conv2d(32, 32, 3, padding=padding, bias=False, **options)
            self.norm = nn.BatchNorm2d(32)
            self.side = nn.Conv2d(32, 32, 1, options.get("stride", 1))

        def forward(self, x: Tensor) -> Tensor:
            return (self.norm(self.conv(x)) + self.side(x)).relu()

    model, x = trained(Block()).eval(), torch.randn(2, 32, 17, 15)
    frozen = pooling_ext.freeze(model, x)
    assert "Winograd" in repr(frozen)
    assert off(frozen(x), copy.deepcopy(model).double()(x.double())) <= 5e-5


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"dilation": 2, "padding": 2}], ids=["stride", "dilation"]
)
@pytest.mark.parametrize("training", [False, True])
def test_patched_blocks(options, training):
    """Convolution, batch norm and ReLU, with the kernels' statistics in training."""
    options = {"padding": 1} | options
    model = nn.Sequential(nn.Conv2d(32, 32, 3, bias=False, **options), nn.BatchNorm2d(32), nn.ReLU())
    model.train(training)
    x = torch.randn(4, 32, 15, 14)
    wide = copy.deepcopy(model).double()
    pooling_ext.patch(model)
    ours, exact = model(x), wide(x.double())
    assert off(ours, exact) <= 5e-5
    for output in (ours, exact):
        output.square().sum().backward()
    for one, other in zip(model.parameters(), wide.parameters(), strict=True):
        assert off(one.grad, other.grad) <= 5e-4  # type: ignore[arg-type]
    assert off(model[1].running_var, wide[1].running_var) <= 1e-5
