"""What Winograd's transformed weights take in frozen models, and who has them: copies, pickles, reports."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from freezing_cases import (
    assert_close,
    conv,
    convolutions,
    images,
    is_whole,
    network,
    norm,
    run,
    set_winograd,
    ways,
)
from torch import Tensor, nn

import pooling_ext
from pooling_ext import ArgumentError, FusionReport
from pooling_ext.freezing import conv_allotment, conv_engines
from pooling_ext.freezing.layers import PackedConv

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison, pytest.mark.native]

LIMIT = "POOLING_EXT_WINOGRAD_MIB"


@pytest.fixture(autouse=True)
def winograd(monkeypatch):
    set_winograd(monkeypatch)


def transformed(frozen: nn.Module) -> list[Tensor]:
    winograd = [layer for layer in convolutions(frozen) if layer.way == "Winograd"]
    return [conv_engines.transformed(layer.weight, layer.groups, layer.stride[-1]) for layer in winograd]


def count(frozen: nn.Module) -> int:
    """Of the transformed weights in memory."""
    return len({x.data_ptr() for x in transformed(frozen)})


def model_of_three() -> nn.Sequential:
    """The second of which saves the least by the byte: its planes are smaller, and leave tiles half empty."""
    small = nn.Sequential(nn.MaxPool2d(2), conv(32, 32), nn.ReLU())
    large = nn.Sequential(nn.Upsample(scale_factor=2), conv(32, 16))
    return nn.Sequential(conv(16, 32), norm(32), nn.ReLU(), small, large).eval().requires_grad_(False)


X = (2, 16, 12, 12)


# --- shared ------------------------------------------------------------------------------------------------


def test_copies_share():
    model, x = model_of_three(), torch.randn(X)
    frozen = pooling_ext.freeze(model, x)
    assert ways(frozen) == ["Winograd"] * 3
    twin = copy.deepcopy(copy.deepcopy(frozen))
    assert [a is b for a, b in zip(transformed(frozen), transformed(twin), strict=True)] == [True] * 3
    assert torch.equal(run(twin, x), run(frozen, x))
    both = copy.deepcopy([frozen, frozen])
    assert both[0] is both[1]
    expected = run(frozen, x)
    del frozen
    gc.collect()
    assert torch.equal(run(twin, x), expected)


def test_nothing_is_kept_of_models_that_are_gone():
    gc.collect()
    before = len(conv_engines._transformed)
    frozen = pooling_ext.freeze(model_of_three(), torch.randn(X))
    twin = copy.deepcopy(frozen)
    assert len(conv_engines._transformed) == before + 3
    del frozen, twin
    gc.collect()
    assert len(conv_engines._transformed) == before


@network(conv=lambda: conv(16, 16), bn=lambda: norm(16))
def called_three_times(self, x):
    y = torch.relu(self.bn(self.conv(x)))
    return torch.relu(self.conv(y)) + self.bn(self.conv(y[..., 2:])).mean()


def test_a_layer_called_several_times_is_transformed_once_for_its_weight():
    """Twice with the batch norm in it, and once without."""
    model, x = called_three_times(), torch.randn(2, 16, 12, 12)
    frozen = pooling_ext.freeze(model, x)
    assert ways(frozen) == ["Winograd"] * 3 and count(frozen) == 2
    assert frozen.report.winograd_bytes == sum({x.data_ptr(): x.nbytes for x in transformed(frozen)}.values())
    twin = pickle.loads(pickle.dumps(frozen))
    assert count(twin) == 2 and torch.equal(run(twin, x), run(frozen, x))
    assert_close(run(twin, x), run(model, x))


# --- pickles -----------------------------------------------------------------------------------------------


def test_pickles_have_plain_weights():
    model, x = model_of_three(), torch.randn(X)
    frozen = pooling_ext.freeze(model, x)
    plain = sum(p.nbytes for p in model.parameters())
    written = pickle.dumps(frozen)
    assert plain < len(written) < 2 * plain < frozen.report.winograd_bytes
    twin = pickle.loads(written)
    assert ways(twin) == ways(frozen) and torch.equal(run(twin, x), run(frozen, x))


WORKER = """
import sys, warnings, torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
from pooling_ext.freezing.layers import PackedConv
frozen, x, expected = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    off = float((frozen(x) - expected).abs().max() / expected.abs().max())
torch.save((frozen, x, expected), sys.argv[1])
print(*[m.way for m in frozen.modules() if isinstance(m, PackedConv)], "off" if off > 1e-4 else "right")
"""


@pytest.mark.parametrize("setting", [("POOLING_EXT_NO_NATIVE", "1"), ("POOLING_EXT_WINOGRAD", "0"), None])
def test_pickles_without_the_kernels(setting, tmp_path):
    """They run on oneDNN there, and with Winograd's kernels when they are back."""
    model, x = model_of_three(), torch.randn(4, 16, 24, 24)
    frozen = pooling_ext.freeze(model, x)
    file = tmp_path / "frozen.pickle"
    torch.save((frozen, x, run(model, x)), file)
    env = {**os.environ, "PYTHONPATH": str(Path(pooling_ext.__file__).parents[1])}
    env |= {} if setting is None else dict([setting])
    worker = subprocess.run(
        [sys.executable, "-c", WORKER, str(file)], env=env, capture_output=True, text=True, timeout=250
    )
    way = "Winograd" if setting is None else "prepacked"
    assert worker.stdout.split() == [way] * 3 + ["right"], worker.stderr
    again, *_ = torch.load(file, weights_only=False)
    assert ways(again) == ["Winograd"] * 3 and torch.equal(run(again, x), run(frozen, x))


def test_layers_of_earlier_versions_stay_with_onednn():
    frozen = pooling_ext.freeze(model_of_three(), torch.randn(X))
    layer = convolutions(frozen)[0]
    state = layer.__getstate__()
    del state["left_out"]
    old = PackedConv.__new__(PackedConv)
    old.__setstate__(state)
    assert old.way == "prepacked" and ("Winograd", "it was frozen by an earlier version") in old.rejected
    x = torch.randn(X)
    torch.testing.assert_close(old(x), layer(x), rtol=1e-4, atol=1e-4)


# --- the limit ---------------------------------------------------------------------------------------------


def allowed(monkeypatch, mib: float, exact: bool = False) -> pooling_ext.Frozen:
    monkeypatch.setenv(LIMIT, str(mib))
    return pooling_ext.freeze(model_of_three(), torch.randn(X), exact=exact)


def test_the_limit(monkeypatch):
    """Layers that save the most multiplications by the byte come first."""
    needed = [36 * a * b * 4 / 2**20 for a, b in ((16, 32), (32, 32), (32, 16))]
    everything = allowed(monkeypatch, sum(needed))
    assert ways(everything) == ["Winograd"] * 3 and not everything.report.beyond_limit
    assert everything.report.winograd_bytes == sum(needed) * 2**20
    assert f"Winograd's transformed weights take {sum(needed):.1f} MiB" in str(everything.report)
    assert ways(allowed(monkeypatch, sum(needed) - 0.01)) == ["Winograd", "prepacked", "Winograd"]
    assert ways(allowed(monkeypatch, needed[1] + 1e-4)) == ["Winograd", "prepacked", "Winograd"]
    some = allowed(monkeypatch, needed[0] + 1e-4)
    assert ways(some).count("Winograd") == 1 and len(some.report.beyond_limit) == 2
    assert "4.1" in some.report.beyond_limit or "3.1" in some.report.beyond_limit
    reason = "its transformed weight of 0.141 MiB is more than there is left of POOLING_EXT_WINOGRAD_MIB"
    assert f"not Winograd: {reason}" in some.report.explain("3.1")
    assert "not Winograd for the limit of POOLING_EXT_WINOGRAD_MIB: " in str(some.report)
    nothing = allowed(monkeypatch, 0)
    assert ways(nothing) == ["prepacked"] * 3 and nothing.report.winograd_bytes == 0
    assert "Winograd's transformed" not in str(nothing.report)
    # It holds for copies too, whatever the limit is there.
    monkeypatch.delenv(LIMIT)
    for twin in (copy.deepcopy(some), pickle.loads(pickle.dumps(some))):
        assert ways(twin) == ways(some) and str(twin.report) == str(some.report)


@pytest.mark.parametrize("value", ["-1", "much", "nan", "inf"])
def test_a_limit_that_is_no_number(monkeypatch, value):
    monkeypatch.setenv(LIMIT, value)
    with pytest.raises(ArgumentError, match=f"{LIMIT} must be a number of at least 0, but got '{value}'"):
        pooling_ext.freeze(model_of_three(), torch.randn(X))


@network(conv=lambda: conv(16, 32), other=lambda: conv(32, 32), last=lambda: conv(32, 32))
def branches(self, x):
    y = self.other(self.conv(x))
    return self.last(torch.repeat_interleave(y, 2, -1)) if y.sum() > 0 else -self.last(y.repeat(1, 1, 1, 2))


def test_the_limit_is_that_of_all_parts(monkeypatch):
    """The last part saves the most."""
    model, x = branches(), torch.randn(X)
    needed = [36 * a * b * 4 / 2**20 for a, b in ((16, 32), (32, 32), (32, 32))]
    monkeypatch.setenv(LIMIT, str(needed[2] + 1e-4))
    frozen = pooling_ext.freeze(model, x)
    assert not is_whole(frozen)
    found = {entry.path: entry.why for entry in frozen.report.replaced}
    assert found == {"conv": "prepacked", "other": "prepacked", "last": "Winograd"}
    assert sum(t.nbytes for t in transformed(frozen)) == frozen.report.winograd_bytes <= needed[2] * 2**20
    assert_close(run(frozen, x), run(model, x))
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(run(twin, x), run(frozen, x))


# --- the report --------------------------------------------------------------------------------------------


def test_the_report():
    model = model_of_three()
    frozen = pooling_ext.freeze(model, torch.randn(X))
    found = {entry.path: entry.why for entry in frozen.report.replaced}
    assert found["0"] == "Winograd, BatchNorm2d 1, relu" and found["4.1"] == "Winograd"
    assert frozen.report.explain("0").splitlines() == [
        "0 (Conv2d): Winograd, BatchNorm2d 1, relu",
        "  Winograd, for an input of 2x16x12x12",
    ]
    assert frozen.report.explain("3.0") == "3.0 (MaxPool2d): pooling_ext.MaxPool2d"
    with pytest.raises(ArgumentError, match="path must be one of the report's, but got 'nowhere'"):
        frozen.report.explain("nowhere")
    assert "0: PackedConv(16 to 32, float32, Winograd, relu, kernel=(3, 3)" in repr(frozen)


def test_reports_of_earlier_versions_load():
    report = FusionReport()
    report.replace("a", "Conv2d", "prepacked")
    for state in ({"replaced": report.replaced, "skipped": []}, {**vars(report)}):
        old = FusionReport.__new__(FusionReport)
        old.__setstate__(state)
        assert old == report and old.explain("a") == "a (Conv2d): prepacked"
        assert pickle.loads(pickle.dumps(old)) == report


def test_bytes_are_those_that_are_taken():
    for groups, channels, dtype in ((1, 24, torch.float32), (2, 40, torch.bfloat16), (1, 17, torch.float64)):
        layer = conv(channels, channels * 2, groups=groups).to(dtype)
        x = images(2, channels, 9, 9).to(dtype)
        frozen = pooling_ext.freeze(nn.Sequential(layer).eval(), x)
        (packed,) = convolutions(frozen)
        if packed.way == "Winograd":  # not where the processor has AMX
            (weight,) = transformed(frozen)
            assert weight.nbytes == conv_allotment.transformed_bytes(packed) == frozen.report.winograd_bytes
