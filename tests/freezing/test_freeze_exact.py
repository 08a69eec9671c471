"""freeze without Winograd's kernels: where that is asked for, and where they are not right."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from freezing_cases import assert_close, conv, is_whole, network, norm, set_winograd
from torch import Tensor, nn

import pooling_ext
from pooling_ext.freezing import conv_engines
from pooling_ext.freezing.layers import PackedConv

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison, pytest.mark.native]


@pytest.fixture(autouse=True)
def winograd(monkeypatch):
    set_winograd(monkeypatch)


def ways(frozen: nn.Module) -> list[str]:
    return [module.way for module in frozen.modules() if isinstance(module, PackedConv)]


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def wide(*layers: nn.Module) -> nn.Sequential:
    """Of 3 channels made 16 first."""
    return nn.Sequential(conv(3, 16), *layers).eval().requires_grad_(False)


def test_exact_results(monkeypatch):
    """Those of POOLING_EXT_WINOGRAD=0, to the last bit; copies are exact too."""
    model, x = wide(norm(16), conv(16, 16), conv(16, 16, groups=16), nn.SiLU()), torch.randn(2, 3, 7, 7)
    frozen = pooling_ext.freeze(model, x, exact=True)
    assert ways(frozen) == ["prepacked", "prepacked", "depthwise"] and not frozen.report.winograd_bytes
    assert "not Winograd: exact results are asked for" in frozen.report.explain("2")
    for twin in (pickle.loads(pickle.dumps(frozen)), copy.deepcopy(frozen)):
        assert ways(twin) == ways(frozen) and torch.equal(run(twin, x), run(frozen, x))
    assert ways(pooling_ext.freeze(model, x)) == ["prepacked", "Winograd", "depthwise"]
    set_winograd(monkeypatch, off=True)
    without = pooling_ext.freeze(model, x)
    assert ways(without) == ways(frozen) and torch.equal(run(without, x), run(frozen, x))


def test_where_winograd_is_not_right_it_is_left_out(monkeypatch):
    """Before a model is frozen in parts."""
    right = conv_engines.winograd_weight
    monkeypatch.setattr(conv_engines, "winograd_weight", lambda *args: right(*args) * 1.01)
    model, x = wide(norm(16), nn.ReLU(), conv(16, 24), norm(24), nn.ReLU()), torch.randn(2, 3, 9, 9)
    frozen = pooling_ext.freeze(model, x)
    assert is_whole(frozen) and not frozen.report.winograd_bytes
    (text,) = frozen.report.warnings
    assert text.startswith("Winograd's kernels are left out: with them results are off by")
    assert_close(run(frozen, x), run(model, x), 1e-5)


def test_infinities_in_the_example_leave_winograd_out():
    """They would reach all pixels of the 4x4 that read them."""
    model, x = nn.Sequential(conv(16, 16)).eval(), torch.randn(2, 16, 12, 12)
    x[0, :, 3, 3] = float("inf")
    frozen = pooling_ext.freeze(model, x)
    assert is_whole(frozen) and ways(frozen) == ["prepacked"]
    assert frozen.report.warnings == ["Winograd's kernels are left out: with them it gives NaN elsewhere"]
    torch.testing.assert_close(run(frozen, x), run(model, x), equal_nan=True)


@network(first=lambda: conv(16, 16), second=lambda: conv(16, 16))
def branches(self, x):
    y = self.first(x)
    return self.second(y) if y.sum() > 0 else -self.second(y)


def test_parts_in_which_winograd_is_not_right(monkeypatch):
    """They alone leave it out, in copies too."""
    model, x = branches(), torch.randn(2, 16, 9, 9)
    right = conv_engines.winograd_weight
    monkeypatch.setattr(
        conv_engines,
        "winograd_weight",
        lambda weight, *rest: right(weight, *rest) * (1 if torch.equal(weight, model.first.weight) else 1.01),
    )
    frozen = pooling_ext.freeze(model, x)
    assert [why.partition(": with")[0] for why in frozen.report.warnings] == [
        "second: Winograd's kernels are left out"
    ]
    assert ways(frozen) == ways(pickle.loads(pickle.dumps(frozen))) == ["Winograd", "prepacked"]
    assert_close(run(frozen, x), run(model, x))
