"""Frozen.save and load: the same outputs to the bit, the same ways of convolutions, and elsewhere too."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import saving_worker
import torch
from freezing_cases import conv, norm, set_winograd, ways
from helpers import NATIVE, run_python
from saving_cases import assert_same, assert_saves, saved
from torch import Tensor, nn

import pooling_ext
from pooling_ext import ArgumentError
from pooling_ext.freezing import conv_engines
from pooling_ext.freezing.saving import files
from pooling_ext.ops import conv_choice

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]


# --- models ------------------------------------------------------------------------------------------------

torchvision = pytest.importorskip("torchvision").models

MODELS = {
    "resnet": lambda: torchvision.resnet18(),
    "mobilenet": lambda: torchvision.mobilenet_v3_small(),
    "shufflenet": lambda: torchvision.shufflenet_v2_x0_5(),
    "squeezenet": lambda: torchvision.squeezenet1_1(),
    "regnet": lambda: torchvision.regnet_y_400mf(),
    "densenet": lambda: torchvision.DenseNet(8, (2, 2), 16),
    "googlenet": lambda: torchvision.googlenet(init_weights=False),
    "efficientnet": lambda: torchvision.efficientnet_b0(),
    "convnext": lambda: torchvision.convnext.ConvNeXt(
        [torchvision.convnext.CNBlockConfig(16, 32, 2), torchvision.convnext.CNBlockConfig(32, None, 1)]
    ),
    "vit": lambda: torchvision.VisionTransformer(64, 16, 2, 4, 32, 64),
    "swin": lambda: torchvision.SwinTransformer([4, 4], 16, [1, 2], [2, 4], [4, 4]),
    "segmentation": lambda: torchvision.segmentation.deeplabv3_mobilenet_v3_large(weights_backbone=None),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_torchvision(name):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    twin = assert_saves(MODELS[name](), x, check=False)
    assert type(twin(x)) is (OrderedDict if name == "segmentation" else Tensor)


@pytest.mark.parametrize("dtype", saving_worker.NEAR, ids=str)
def test_dtypes(dtype):
    x = saving_worker.example()
    twin = assert_saves(saving_worker.network(), x, dtype=dtype)
    other = torch.randn(3, 3, 24, 40)
    frozen = pooling_ext.freeze(saving_worker.network(), x, dtype=dtype)
    assert_same(twin(other), frozen(other))


class Calls(nn.Module):
    """Takes nests, changes an argument, and gives nests with constants."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = conv(4, 4), norm(4)

    def forward(self, x, more: dict, scale=0.5, mode=None, *, flag=True):
        more["y"].add_(1)
        y = self.first(x) if flag else x
        z = torch.cat([y, more["y"][..., 1:-1, 1:-1] * scale], 1).chunk(2, 1)
        return OrderedDict(a=[z[0], None, 3], b=(more["y"], self.norm(z[1]), float("inf")), c=x.shape[1])


def test_nests_constants_and_arguments_that_change():
    model = Calls().eval()
    call = {"x": torch.randn(2, 4, 8, 8), "more": {"y": torch.randn(2, 4, 10, 10)}, "flag": True}
    frozen = pooling_ext.freeze(model, copy.deepcopy(call))
    twin = saved(frozen)
    calls = [copy.deepcopy(call) for _ in range(2)]
    results = [frozen(**calls[0]), twin(**calls[1])]
    assert_same(*results[::-1])
    assert torch.equal(calls[1]["more"]["y"], call["more"]["y"] + 1)
    assert results[1]["b"][0] is calls[1]["more"]["y"]
    for wrong in ({"scale": 0.25}, {"flag": False}):
        errors = []
        for one in (frozen, twin):
            with pytest.raises((TypeError, ArgumentError)) as error:
                one(**copy.deepcopy(call) | wrong)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


def test_saved_again_copied_pickled_and_compiled():
    x = saving_worker.example()
    frozen = pooling_ext.freeze(saving_worker.network(), x)
    written = [io.BytesIO(), io.BytesIO()]
    frozen.save(written[0])
    twin = pooling_ext.load(io.BytesIO(written[0].getvalue()))
    twin.save(written[1])
    found = [torch.load(io.BytesIO(file.getvalue()), weights_only=True) for file in written]
    assert found[0]["model"] == found[1]["model"] and found[0]["checksum"] == found[1]["checksum"]
    for again in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        assert_same(again(x), frozen(x))
    program = torch.export.export(twin, (x,))
    torch.testing.assert_close(program.module()(x), frozen(x), rtol=1e-3, atol=1e-3)


def test_weights_that_layers_share_are_one_tensor():
    one = conv(16, 16)
    model = nn.Sequential(one, nn.MaxPool2d(2), one)
    file = io.BytesIO()
    frozen = pooling_ext.freeze(model.eval(), torch.randn(1, 16, 8, 8), exact=True)
    frozen.save(file)
    few = len(torch.load(io.BytesIO(file.getvalue()), weights_only=True)["tensors"])
    assert few <= 2 * len(ways(frozen))
    big = torch.zeros(1 << 20)
    model = Scaled(big[5:9].view(1, 4, 1, 1))
    file = io.BytesIO()
    pooling_ext.freeze(model.eval(), torch.randn(1, 4, 8, 8)).save(file)
    assert len(file.getvalue()) < 1 << 17  # not the memory around it


class Scaled(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x * self.scale


@pytest.mark.gpu
def test_on_a_gpu_the_outputs_are_the_same_to_the_bit():
    x = saving_worker.example().cuda()
    frozen = pooling_ext.freeze(saving_worker.network().cuda(), x, dtype=torch.float16)
    twin = saved(frozen)
    for _ in range(3):  # run, captured, replayed
        assert_same(twin(x), frozen(x))


def test_sizes_that_are_numpy_s():
    model = nn.Sequential(nn.Conv2d(4, 4, np.int64(3), padding=np.int64(1), groups=np.int64(2)))
    assert_saves(model, torch.randn(1, 4, 8, 8))


def test_a_loaded_model_draws_no_random_numbers():
    model = nn.Sequential(conv(4, 4), nn.Flatten(1, 2), nn.LayerNorm(8), nn.Linear(8, 8))
    frozen = pooling_ext.freeze(model.eval(), torch.randn(1, 4, 8, 8))
    before = torch.get_rng_state()
    saved(frozen)
    assert torch.equal(torch.get_rng_state(), before)


# --- the ways of convolutions ------------------------------------------------------------------------------


@pytest.mark.native
def test_ways_are_those_of_the_file(monkeypatch):
    """Whatever else is measured where it is loaded; exact results stay so."""
    set_winograd(monkeypatch)
    model, x = (
        nn.Sequential(conv(16, 16), nn.ReLU(), conv(16, 16, groups=16), conv(16, 16)),
        torch.randn(2, 16, 9, 9),
    )
    frozen = pooling_ext.freeze(model.eval(), x)
    exact = pooling_ext.freeze(model.eval(), x, exact=True)
    assert ways(frozen) == ["Winograd", "depthwise", "Winograd"]
    assert ways(saved(exact)) == ["prepacked", "depthwise", "prepacked"]
    files_of = [io.BytesIO(), io.BytesIO()]
    frozen.save(files_of[0])
    exact.save(files_of[1])
    monkeypatch.setattr(conv_engines, "winograd_why_not", lambda *_: "it is slower here")
    monkeypatch.setattr(conv_engines, "depthwise_why_not", lambda *_: "it is slower here")
    twin = pooling_ext.load(io.BytesIO(files_of[0].getvalue()))
    assert ways(twin) == ways(frozen) and torch.equal(twin(x), frozen(x)) and not twin.report.warnings
    monkeypatch.undo()
    set_winograd(monkeypatch)
    twin = pooling_ext.load(io.BytesIO(files_of[1].getvalue()))
    assert ways(twin) == ways(exact) and torch.equal(twin(x), exact(x))


@pytest.mark.native
def test_a_way_that_cannot_be_had_is_chosen_again(monkeypatch):
    set_winograd(monkeypatch)
    model, x = nn.Sequential(conv(16, 16), nn.ReLU(), conv(16, 16)), torch.randn(2, 16, 9, 9)
    frozen = pooling_ext.freeze(model.eval(), x)
    file = io.BytesIO()
    frozen.save(file)
    monkeypatch.setattr(conv_choice, "SWITCHED_OFF", True)
    twin = pooling_ext.load(io.BytesIO(file.getvalue()))
    assert ways(twin) == ["prepacked", "prepacked"] and twin.report.winograd_bytes == 0
    assert twin.report.warnings == [
        f"{path} runs in another way than where it was saved: prepacked, not Winograd: POOLING_EXT_WINOGRAD=0"
        for path in "02"
    ]
    assert "since it was loaded prepacked, not Winograd" in twin.report.explain("2")
    torch.testing.assert_close(twin(x), frozen(x), rtol=1e-3, atol=1e-3)
    again = saved(twin)
    assert ways(again) == ways(twin) and torch.equal(again(x), twin(x))


@pytest.mark.native
def test_the_limit_of_memory_holds_where_a_model_is_loaded(monkeypatch):
    set_winograd(monkeypatch)
    model, x = nn.Sequential(conv(16, 16), nn.ReLU(), conv(16, 32)), torch.randn(2, 16, 9, 9)
    frozen = pooling_ext.freeze(model.eval(), x)
    assert ways(frozen) == ["Winograd", "Winograd"]
    file = io.BytesIO()
    frozen.save(file)
    monkeypatch.setenv("POOLING_EXT_WINOGRAD_MIB", "0.04")
    twin = pooling_ext.load(io.BytesIO(file.getvalue()))
    assert ways(twin) == ["Winograd", "prepacked"]
    assert (
        "POOLING_EXT_WINOGRAD_MIB" in twin.report.warnings[0] and twin.report.winograd_bytes <= 0.04 * 2**20
    )


ELSEWHERE = {
    "avx2": {"POOLING_EXT_CPU_ISA": "avx2"},
    "baseline": {"POOLING_EXT_CPU_ISA": "baseline"},
    "oneDNN without AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "without native code": {"POOLING_EXT_NO_NATIVE": "1"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    saving_worker.write(folder)
    return folder


def read(folder: Path, *options: str, **environment: str) -> list[str]:
    script = (
        f"import saving_worker as worker; worker.read(worker.Path({str(folder)!r}), {'--exact' in options})"
    )
    result = run_python(script, **environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.splitlines()


@pytest.mark.native
def test_in_another_process_the_outputs_are_the_same_to_the_bit(written):
    lines = read(written, "--exact")
    assert len(lines) == 4 and all(line.endswith("(0 warnings)") for line in lines)


@pytest.mark.parametrize("where", ELSEWHERE)
def test_elsewhere(written, where):
    """On other instruction sets the same ways run, by other kernels; without native code others do."""
    if "without" not in where and not NATIVE:
        pytest.skip("there are no kernels to choose from")
    lines = read(written, **ELSEWHERE[where])
    assert len(lines) == 4
    if where == "without native code":
        assert not any("Winograd" in line or "depthwise" in line for line in lines)


def test_examples():
    for function in (pooling_ext.load, pooling_ext.Frozen.save):
        test = doctest.DocTestFinder().find(function, globs={})[0]
        assert test.examples and not doctest.DocTestRunner().run(test).failed


def test_the_version_is_the_one_that_is_written():
    file = io.BytesIO()
    pooling_ext.freeze(nn.Sequential(nn.ReLU()), torch.ones(1, 2)).save(file)
    data = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert (data["format"], data["version"]) == ("pooling_ext/frozen", files.VERSION)
    assert f'"pooling_ext":"{pooling_ext.__version__}"' in data["model"]
