"""Convolution of images: its kernels, the differentiable function made of them, and where they are used."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as TF
from conv_cases import ACTIVATIONS, LEAKY_SLOPE
from direct_conv_cases import (
    BOTH_FORMATS,
    EVERY_DTYPE,
    LAYOUTS,
    assert_exact,
    assert_passes_on,
    assert_same_for_any_threads,
    every,
)
from helpers import FLOATS, dtype_id, integers, strides, with_layout
from instruction_sets import EVERY_ISA
from torch import Tensor, nn

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.ops import conv_choice, conv_speeds
from pooling_ext.ops import image_conv as ops
from pooling_ext.ops.conv_choice import FORWARD, IMAGE, INPUT_GRAD, WEIGHT_GRAD, Conv
from pooling_ext.ops.conv_kernels import Plan, convolve
from pooling_ext.testing.tolerances import assert_close

pytestmark = pytest.mark.native


class Case(NamedTuple):
    """A convolution, by the name of what is special about it."""

    name: str
    batch: int
    channels: int
    features: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)

    @property
    def window(self) -> tuple[list[int], list[int]]:
        return list(self.stride), list(self.padding)

    def tensors(self, dtype: torch.dtype, layout: str = "contiguous") -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and bias."""
        weight = integers((self.features, self.channels, *self.kernel), dtype)
        image = with_layout(integers((self.batch, self.channels, *self.size), dtype), layout)
        return image, weight, integers((self.features,), dtype)


CASES = (
    Case("resnet", 2, 3, 64, (30, 30), (7, 7), (2, 2), (3, 3)),
    Case("vgg", 2, 3, 64, (20, 20), (3, 3)),
    Case("mobilenet", 2, 3, 32, (20, 20), (3, 3), (2, 2)),
    Case("patches", 2, 3, 96, (16, 16), (4, 4), (4, 4), (0, 0)),
    Case("alexnet", 1, 3, 64, (35, 35), (11, 11), (4, 4), (2, 2)),
    Case("gray", 3, 1, 32, (28, 28), (5, 5), (1, 1), (2, 2)),
    Case("two_channels", 2, 2, 20, (9, 11), (3, 3)),
    Case("four_channels", 2, 4, 37, (9, 12), (3, 5), (1, 2), (0, 2)),
    Case("few_features", 2, 3, 5, (8, 9), (3, 3)),
    Case("one_feature", 1, 3, 1, (8, 9), (3, 2)),
    Case("no_padding", 1, 3, 24, (15, 14), (3, 3), (2, 2), (0, 0)),
    Case("large_padding", 1, 3, 16, (5, 4), (3, 3), (2, 1), (7, 9)),
    Case("larger_than_the_image", 1, 3, 16, (3, 3), (7, 7), (1, 1), (3, 3)),
    Case("step_over", 1, 3, 16, (19, 23), (2, 2), (3, 5), (0, 1)),
    Case("pixels", 2, 3, 16, (6, 7), (1, 1), (1, 1), (0, 0)),
    Case("one_pixel", 1, 3, 48, (1, 1), (3, 3)),
    Case("long_rows", 1, 3, 16, (4, 301), (3, 3)),
    Case("many_images", 70, 3, 16, (4, 4), (3, 3)),
)
EVERY_CASE = every(CASES)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, window, activation: str = "identity") -> Tensor:
    return ops.image_conv(x, weight, bias, *window, ops.ACTIVATIONS.index(activation), LEAKY_SLOPE)


def in_float64(x: Tensor, weight: Tensor, bias: Tensor | None, window) -> Tensor:
    return TF.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), *window)


# --- the operators ----------------------------------------------------------------------------------


@EVERY_CASE
@EVERY_DTYPE
@BOTH_FORMATS
def test_forward(case, dtype, layout):
    x, weight, bias = case.tensors(dtype, layout)
    assert_exact(forward(x, weight, bias, case.window), in_float64(x, weight, bias, case.window))
    assert_exact(forward(x, weight, None, case.window), in_float64(x, weight, None, case.window))


@EVERY_CASE
@EVERY_DTYPE
@BOTH_FORMATS
def test_weight_grad(case, dtype, layout):
    x, weight, _ = case.tensors(dtype, layout)
    leaf = weight.double().requires_grad_()
    output = TF.conv2d(x.double(), leaf, None, *case.window)
    grad = with_layout(integers(output.shape, dtype, -4, 4), layout)
    (expected,) = torch.autograd.grad(output, leaf, grad.double())
    assert_exact(ops.image_conv_weight_grad(grad, x, weight.shape, *case.window), expected)


@EVERY_CASE
@EVERY_DTYPE
@BOTH_FORMATS
def test_statistics(case, dtype, layout):
    """Those of the output as it is stored, though its mean is large beside its deviation."""
    x, weight, _ = case.tensors(dtype, layout)
    bias = torch.full((case.features,), 1000, dtype=dtype)
    output, (mean, var) = ops.image_conv_stats(x, weight, bias, *case.window)
    assert torch.equal(output, forward(x, weight, bias, case.window))
    stored = output.double()
    expected = stored.mean((0, 2, 3)), stored.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(mean, expected[0], rtol=1e-7, atol=1e-5)
    torch.testing.assert_close(var, expected[1], rtol=1e-5, atol=1e-6)


@EVERY_DTYPE
@BOTH_FORMATS
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("features", [5, 48])
def test_activations(dtype, layout, activation, features):
    case = Case("", 2, 3, features, (9, 17), (3, 3))
    x, weight, bias = case.tensors(dtype, layout)
    x, weight = x / 8, weight / 4
    actual = forward(x, weight, bias, case.window, activation)
    assert_close(actual, ACTIVATIONS[activation](in_float64(x, weight, bias, case.window)), scale=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[7]], ids=lambda case: case.name)
def test_strides(case, layout):
    """Inputs and gradients that are not dense are read right, and results have PyTorch's layout."""
    x, weight, _ = case.tensors(torch.float32, layout)
    theirs, ours = TF.conv2d(x, weight, None, *case.window), forward(x, weight, None, case.window)
    assert_exact(ours, theirs)
    assert strides(ours) == strides(theirs)
    grad = with_layout(integers(ours.shape, torch.float32), layout)
    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(TF.conv2d(x, leaf, None, *case.window), leaf, grad)
    assert_exact(ops.image_conv_weight_grad(grad, x, weight.shape, *case.window), expected)


def test_outputs_that_go_past_the_cache():
    """They are as those of a single image, which stay in it."""
    case = Case("", 12, 3, 64, (224, 224), (7, 7), (2, 2), (3, 3))
    x, weight, bias = case.tensors(torch.float32, "channels_last")
    together = forward(x, weight, bias, case.window, "relu")
    assert together.numel() * 4 >= 32 << 20
    for image, expected in zip(x.split(1), together.split(1), strict=True):
        assert torch.equal(forward(image, weight, bias, case.window, "relu"), expected)


def test_infinities_and_nan_stay_in_their_windows():
    x, weight = torch.ones(1, 3, 12, 12), torch.ones(16, 3, 3, 3)
    x[0, 1, 4, 5], x[0, 2, 9, 9] = float("inf"), float("nan")
    for given in (x, x.to(memory_format=torch.channels_last)):
        actual = forward(given, weight, None, ([1, 1], [0, 0]))
        torch.testing.assert_close(actual, TF.conv2d(x, weight), equal_nan=True)


@EVERY_DTYPE
def test_empty_batch(dtype):
    x, weight = torch.empty(0, 3, 8, 8, dtype=dtype), torch.ones(5, 3, 3, 3, dtype=dtype)
    window = [1, 1], [1, 1]
    assert forward(x, weight, None, window).shape == (0, 5, 8, 8)
    output, stats = ops.image_conv_stats(x, weight, None, *window)
    assert output.shape == (0, 5, 8, 8) and torch.equal(stats, torch.zeros(2, 5, dtype=torch.float64))
    grad = ops.image_conv_weight_grad(output, x, weight.shape, *window)
    assert torch.equal(grad, torch.zeros_like(weight))


def test_errors():
    x, weight = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    for arguments, message in (
        ((x, weight[:, :2], None, [1, 1], [1, 1]), "a weight of as many channels"),
        ((x, weight, None, [0, 1], [1, 1]), "strides and kernels must be positive"),
        ((x, weight, None, [1, 1], [1, -1]), "padding not negative"),
        ((x, torch.randn(4, 3, 9, 9), None, [1, 1], [1, 1]), "does not fit"),
        ((x, weight.double(), None, [1, 1], [1, 1]), "dtype"),
        ((x, weight, torch.randn(3), [1, 1], [1, 1]), "the convolution's shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.image_conv(*arguments, 0, 0.0)
    with pytest.raises(RuntimeError, match="activation must be from 0 to 8"):
        ops.image_conv(x, weight, None, [1, 1], [1, 1], 9, 0.0)
    with pytest.raises(RuntimeError, match="grad must have the output's shape"):
        ops.image_conv_weight_grad(torch.randn(1, 4, 4, 4), x, weight.shape, [1, 1], [1, 1])


# --- threads and instruction sets --------------------------------------------------------------------


def every_result(case: Case, dtype: torch.dtype, layout: str) -> Iterator[Tensor]:
    """All that the operators make of random numbers."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.batch, case.channels, *case.size, generator=generator).to(dtype)
    weight = torch.randn(case.features, case.channels, *case.kernel, generator=generator).to(dtype)
    x = with_layout(x, layout)
    output, stats = ops.image_conv_stats(x, weight, None, *case.window)
    grad = torch.randn(output.shape, generator=generator).to(dtype)
    yield from (output, stats, forward(x, weight, None, case.window, "silu"))
    yield ops.image_conv_weight_grad(with_layout(grad, layout), x, weight.shape, *case.window)


@BOTH_FORMATS
def test_bits_do_not_depend_on_threads(layout):
    large = Case("", 3, 3, 64, (112, 112), (7, 7), (2, 2), (3, 3)), Case("", 1, 3, 32, (96, 96), (3, 3))
    assert_same_for_any_threads(every_result, (*large, *CASES[:3]), layout)


def check_every_instruction_set_case() -> None:
    """Values of every case in this process's instruction set."""
    for case in CASES:
        for dtype in FLOATS:
            for layout in ("contiguous", "channels_last"):
                test_forward(case, dtype, layout)
                test_weight_grad(case, dtype, layout)
                test_statistics(case, dtype, layout)


@EVERY_ISA
def test_instruction_set(isa):
    assert_passes_on(isa, __file__)


# --- where they are used -----------------------------------------------------------------------------


@pytest.fixture
def always(monkeypatch):
    """The kernels wherever they can be."""
    monkeypatch.setattr(conv_speeds, "speedup", lambda *_: (9.0, True))
    monkeypatch.setattr(conv_choice, "LEAST_WORK", 0)
    monkeypatch.setattr(conv_choice, "HAS_FAST_BFLOAT16", False)


def convolution(**other) -> Conv:
    given = {
        "batch": 16, "channels": 3, "size": (224, 224), "features": 64, "kernel": (7, 7), "stride": (2, 2),
        "padding": (3, 3, 3, 3), "dilation": (1, 1), "groups": 1, "dtype": torch.float32,
        "channels_last": True,
    }  # fmt: skip
    return Conv(**(given | other))


def plan(stride: int, padding: int, channels_last: bool) -> Plan:
    pairs = (stride, stride), (padding, padding), (1, 1)
    return Plan(IMAGE, *pairs, 1, channels_last, (True, False, True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(channels_last):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def function(*leaves: Tensor) -> Tensor:
        return convolve(*leaves, plan(2, 1, channels_last))

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


@pytest.mark.parametrize(
    ("other", "phase", "reason"),
    [
        ({"channels": 5}, FORWARD, "5 channels"),
        ({"size": (4, 8, 8), "kernel": (3, 3, 3), "padding": (1,) * 6}, FORWARD, "3-d"),
        ({}, INPUT_GRAD, "the gradient of images is PyTorch's"),
        ({"channels": 4, "groups": 2}, FORWARD, "2 groups"),
        ({"dilation": (2, 2)}, WEIGHT_GRAD, "dilation"),
        ({"padding": (3, 3, 2, 2)}, FORWARD, "not the same on opposite sides"),
        ({"dtype": torch.complex64}, FORWARD, "dtype"),
        ({"size": (2, 2), "padding": (0, 0, 0, 0)}, FORWARD, "does not fit"),
        ({}, FORWARD, None),
        ({}, WEIGHT_GRAD, None),
    ],
)
def test_why_not(always, other, phase, reason):
    found = conv_choice.image_why_not(convolution(**other), phase)
    assert found is None if reason is None else reason in found


def test_what_was_not_measured_is_pytorchs(monkeypatch):
    monkeypatch.setattr(conv_speeds, "speedup", lambda *_: None)
    assert "measured" in conv_choice.image_why_not(convolution(), FORWARD)
    monkeypatch.setattr(conv_speeds, "speedup", lambda *_: (0.8, True))
    assert "1.25 times as fast" in conv_choice.image_why_not(convolution(), FORWARD)


def test_fast_bfloat16_is_onednns_unless_measured(always, monkeypatch):
    assert conv_choice.image_why_not(convolution(dtype=torch.bfloat16), FORWARD) is None
    monkeypatch.setattr(conv_choice, "HAS_FAST_BFLOAT16", True)
    monkeypatch.setattr(conv_choice, "_is_measured_here", lambda: False)
    found = conv_choice.image_why_not(convolution(dtype=torch.bfloat16), FORWARD)
    assert "multiplies bfloat16 faster" in found
    assert conv_choice.image_why_not(convolution(), FORWARD) is None
    monkeypatch.setattr(conv_choice, "_is_measured_here", lambda: True)
    assert conv_choice.image_why_not(convolution(dtype=torch.bfloat16), FORWARD) is None


@BOTH_FORMATS
def test_conv2d(always, layout):
    x, weight, bias = CASES[0].tensors(torch.float32, layout)
    weight.requires_grad_()
    assert pooling_ext.explain(F.conv2d, x, weight, bias, 2, 3).backend == IMAGE
    output = F.conv2d(x, weight, bias, 2, 3)
    expected = TF.conv2d(x, weight, bias, 2, 3)
    assert_exact(output, expected)
    assert strides(output) == strides(expected)
    grad = integers(output.shape, torch.float32)
    assert_exact(torch.autograd.grad(output, weight, grad)[0], torch.autograd.grad(expected, weight, grad)[0])


def stem() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU6())


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_patched(always, trains, dtype):
    model = stem().to(memory_format=torch.channels_last).train(trains)
    patched = copy.deepcopy(model)
    pooling_ext.patch(patched)
    x = torch.randn(4, 3, 48, 48).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.set_grad_enabled(trains):
        explained = str(pooling_ext.explain(copy.deepcopy(patched), x))
        assert "conv_bn_act: image" in explained, explained
        actual, expected = patched(x), model(x)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(actual, expected, **close)
    for (name, one), other in zip(patched.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3, msg=name)
    if trains:
        actual.float().square().mean().backward()
        expected.float().square().mean().backward()
        for one, other in zip(patched.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=5e-2, atol=1e-2)


def test_frozen(always, tmp_path):
    model = stem().eval()
    x = torch.randn(2, 3, 40, 40)
    frozen = pooling_ext.freeze(model, x)
    engines = [module.engine.name for module in frozen.modules() if hasattr(module, "engine")]
    assert engines == ["image"]
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-4)
    frozen.save(tmp_path / "model")
    assert torch.equal(pooling_ext.load(tmp_path / "model")(x), frozen(x))


def test_compiled_in_one_graph(always):
    model = stem().train()
    pooling_ext.patch(model)
    x = torch.randn(2, 3, 40, 40)
    expected = copy.deepcopy(model)(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
