"""Convolutions in the fastest way: which ways there are, that they agree, and what is remembered."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from conv_cases import KERNELS
from helpers import BACKENDS, dtype_id
from torch import nn

import pooling_ext
from pooling_ext import backends
from pooling_ext.backends import autotune, registry
from pooling_ext.freezing import conv_engines
from pooling_ext.freezing.layers import PackedConv
from pooling_ext.graph.activations import RELU
from pooling_ext.ops import conv_autotune
from pooling_ext.ops.batch_norm_statistics import batch_stats
from pooling_ext.ops.conv_autotune import ConvParams, conv_stats_with_grad
from pooling_ext.testing.tolerances import assert_close

GEOMETRY = ConvParams((2, 2), (1, 1), (1, 1), 1)


def tensors(dtype=torch.float32, groups=1):
    x = torch.randn(2, 8, 9, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(16, 8 // groups, 3, 3) / 8).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, weight, torch.randn(16).to(dtype), torch.randn(2, 16, 5, 4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@KERNELS
def test_every_way_gives_the_same(backend, groups, relu, dtype):
    x, weight, bias, residual = tensors(dtype, groups)
    geometry = GEOMETRY._replace(groups=groups)
    assert conv_autotune.can_autotune(x, dtype)
    for added in (None, residual):
        expected = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
        expected = expected if added is None else expected + added.double()
        expected = expected.relu() if relu else expected
        args = x, weight, bias, added, geometry, relu
        ways = conv_autotune._bias_act_candidates(*args)
        assert any(name.startswith(backend) for name in ways) == (groups == 1)
        for name, way in ways.items():
            if name.startswith(backend):
                assert_close(way(*args), expected, scale=4.0, what=name)
            # Where it is not done at once the convolution is rounded, and the sum again.
            torch.testing.assert_close(way(*args).double(), expected, rtol=0.02, atol=0.02)
        torch.testing.assert_close(
            conv_autotune.conv_bias_act(*args).double(), expected, rtol=0.02, atol=0.02
        )


@KERNELS
def test_statistics_and_gradients(backend):
    x, weight, bias, _ = tensors()
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    output, stats = conv_stats_with_grad(*leaves, GEOMETRY)
    exact = [tensor.double().requires_grad_() for tensor in (x, weight, bias)]
    expected = F.conv2d(*exact, *GEOMETRY)
    assert_close(output, expected.detach(), scale=4.0)
    var, mean = torch.var_mean(output.detach().double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(stats, torch.stack((mean, var)), rtol=1e-5, atol=1e-6)
    assert not stats.requires_grad
    grad = torch.randn_like(output)
    for found, right in zip(
        torch.autograd.grad(output, leaves, grad),
        torch.autograd.grad(expected, exact, grad.double()),
        strict=True,
    ):
        assert_close(found, right, scale=16.0)


@pytest.mark.parametrize(
    "backend", ["triton", pytest.param("triton-cuda", marks=pytest.mark.gpu)], indirect=True
)
@pytest.mark.parametrize("relu", [True, False])
def test_every_candidate_for_the_weight_gradient_gives_the_same(backend, relu):
    x, weight, _, grad = tensors()
    norm = batch_stats(x), torch.rand(8) + 0.5, torch.randn(8), 1e-5, relu
    normalized = F.batch_norm(x.double(), None, None, *(t.double() for t in norm[1:3]), True, 0.0, 1e-5)
    leaf = weight.double().requires_grad_()
    output = F.conv2d(normalized.relu() if relu else normalized, leaf, None, *GEOMETRY)
    (expected,) = torch.autograd.grad(output, leaf, grad.double())
    args = grad, x, weight, GEOMETRY, *norm
    candidates = conv_autotune._weight_grad_candidates(*args)
    assert {name.split()[0] for name in candidates} == {"normalized,", "triton"}
    for name, candidate in candidates.items():
        assert_close(candidate(*args), expected, scale=64.0, what=name)
    assert_close(conv_autotune.conv_weight_grad(*args), expected, scale=64.0)


def test_the_fastest_is_taken_and_remembered(monkeypatch, tmp_path):
    """On tensors that say they are on a GPU, with ways that note their use."""
    monkeypatch.setenv("POOLING_EXT_TUNING_FILE", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(autotune, "card_name", lambda device: "a card")
    monkeypatch.setattr(autotune, "milliseconds", lambda way, device: {"slow": 2.0, "fast": 1.0}[way()])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(conv_autotune, "_chosen", {})
    autotune.forget()

    class OnGpu(torch.Tensor):
        is_cuda = True

    x, weight, *_ = tensors()
    x = x.as_subclass(OnGpu)
    offered = []

    def ways(*args):
        offered.append(args)
        return {"slow": lambda *args: "slow", "fast": lambda *args: "fast"}

    for _ in range(3):
        assert conv_autotune._fastest("conv", ways, x, weight, GEOMETRY) == "fast"
    assert len(offered) == 1
    assert conv_autotune._fastest("conv", ways, x, weight, GEOMETRY._replace(groups=2)) == "fast"
    assert len(offered) == 2
    text = (tmp_path / "tuning.json").read_text()
    assert "conv 2x8x9x7 float32 channels_last, 16x8x3x3 float32 channels_last, stride (2, 2)" in text
    autotune.forget()


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("channels, count", [(64, 4), (12, 1)])
def test_tiles_of_cuda_are_candidates(backend, channels, count, monkeypatch, tmp_path):
    """A clock that prefers the last of them has it taken, with statistics and without."""
    monkeypatch.setenv("POOLING_EXT_TUNING_FILE", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(autotune, "card_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(conv_autotune, "_chosen", {})
    autotune.forget()
    timed, called = [], []

    def milliseconds(way, device):
        timed.append(way.func)
        return 1.0 / len(timed) if way.func is preferred else 2.0

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    # As on a GPU, where no backend is asked for and there are tensors of it.
    monkeypatch.setattr(backends, "forced", lambda: None)

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(registry, "PLAIN_TENSORS", (torch.Tensor, OnGpu))
    x = torch.randn(1, channels, 28, 28).bfloat16().to(memory_format=torch.channels_last).as_subclass(OnGpu)
    weight = (torch.randn(128, channels, 3, 3) / 8).bfloat16().to(memory_format=torch.channels_last)
    conv2d = F.conv2d
    expected = conv2d(x.as_subclass(torch.Tensor).double(), weight.double(), None, *GEOMETRY)
    for preferred, call in (
        (
            conv_autotune._cuda_bias_act,
            lambda: conv_autotune.conv_bias_act(x, weight, None, None, GEOMETRY, False),
        ),
        (conv_autotune._cuda_stats, lambda: conv_autotune.conv_stats(x, weight, None, GEOMETRY)[0]),
    ):
        timed.clear()
        monkeypatch.setattr(F, "conv2d", lambda *args: called.append(args) or conv2d(*args))
        for _ in range(2):
            called.clear()  # the first time results are compared with those of PyTorch's
            assert_close(call().as_subclass(torch.Tensor), expected, scale=4.0)
        assert sum(way is preferred for way in timed) == count and len(timed) > count
        assert not called
    for entry in json.loads((tmp_path / "tuning.json").read_text())["a card"].values():
        assert entry["fastest"] == "cuda 64x64x32, 4 stages"
    autotune.forget()


@pytest.mark.parametrize("residual", [None, "add"])
@pytest.mark.parametrize("activation", [None, RELU])
@BACKENDS
def test_frozen_convolutions(backend, activation, residual, monkeypatch):
    """Weights that are not packed for oneDNN go the tuned way where a backend has one."""
    monkeypatch.setattr(conv_engines, "packs", lambda device, dtype: False)
    x, weight, bias, added = tensors()
    layer = PackedConv(weight, bias, *GEOMETRY, activation, residual)
    args = (x,) if residual is None else (x, added)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), *GEOMETRY)
    expected = expected if residual is None else expected + added.double()
    with torch.no_grad():
        assert_close(layer(*args), expected.relu() if activation else expected, scale=4.0)
    names = {decision.backend for decision in pooling_ext.explain(layer, *args).decisions}
    assert names == ({"aten"} if backend == "cpu" else {backend})


def test_a_residual_of_another_shape_is_broadcast(monkeypatch):
    monkeypatch.setattr(conv_engines, "packs", lambda device, dtype: False)
    x, weight, bias, _ = tensors()
    layer = PackedConv(weight, bias, *GEOMETRY, RELU, "add")
    added = torch.randn(1, 16, 1, 1)
    expected = nn.functional.conv2d(x, weight, bias, *GEOMETRY) + added
    torch.testing.assert_close(layer(x, added), expected.relu())
