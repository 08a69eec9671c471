"""1x1 convolutions as matrix products: values, gradients, and where they are used."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as TF
from helpers import integers, with_layout
from torch import nn

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.ops import conv_choice, conv_speeds
from pooling_ext.ops.conv_choice import FORWARD, PHASES, POINTWISE, Conv
from pooling_ext.ops.conv_kernels import Plan, convolve
from pooling_ext.testing.tolerances import assert_close

LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "offset", "expanded")
SIZES = {2: (5, 7), 3: (3, 4, 5)}


def plan(rank: int, channels_last: bool) -> Plan:
    ones, none = (1,) * rank, (0,) * rank
    return Plan(POINTWISE, ones, none, ones, 1, channels_last, (True, True, True))


def convolution(channels: int = 64, features: int = 128, side: int = 56, batch: int = 16, **other) -> Conv:
    given = {
        "batch": batch, "channels": channels, "size": (side, side), "features": features, "kernel": (1, 1),
        "stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1, "dtype": torch.float32,
        "channels_last": False,
    }  # fmt: skip
    return Conv(**(given | other))


@pytest.fixture
def always(monkeypatch):
    """Products wherever they can be."""
    monkeypatch.setattr(conv_speeds, "speedup", lambda *_: (9.0, True))
    monkeypatch.setattr(conv_choice, "LEAST_WORK", 0)


@pytest.mark.parametrize("rank", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["to_contiguous", "to_channels_last"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_values_and_gradients(rank, layout, channels_last, with_bias):
    conv = (TF.conv2d, TF.conv3d)[rank - 2]
    x = with_layout(integers((3, 6, *SIZES[rank]), torch.float32), layout).detach().requires_grad_()
    weight = integers((5, 6, *(1,) * rank), torch.float32).requires_grad_()
    bias = integers((5,), torch.float32).requires_grad_() if with_bias else None
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    expected = conv(x.double(), weight.double(), None if bias is None else bias.double())
    output = convolve(x, weight, bias, plan(rank, channels_last))
    assert_close(output, expected.float(), exact=True)
    format = (torch.channels_last, torch.channels_last_3d)[rank - 2]
    assert output.is_contiguous(memory_format=format if channels_last else torch.contiguous_format)
    for grad in (integers(output.shape, torch.float32), torch.ones(1).expand(output.shape)):
        found = torch.autograd.grad(output, leaves, grad, retain_graph=True)
        wanted = torch.autograd.grad(expected, leaves, grad.double(), retain_graph=True)
        for name, one, other in zip(("input", "weight", "bias"), found, wanted, strict=False):
            assert_close(one, other.float(), exact=True, what=name)


def test_gradients_of_gradients():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    for channels_last in (False, True):
        how = plan(2, channels_last)
        call = lambda x, weight, bias: convolve(x, weight, bias, how)  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, (x, weight, bias))
        assert torch.autograd.gradgradcheck(call, (x, weight, bias))


@pytest.mark.parametrize(
    "other, reason",
    [
        ({"kernel": (3, 3)}, "3x3"),
        ({"stride": (2, 2)}, "stride"),
        ({"groups": 2}, "groups"),
        ({"padding": (1, 1, 1, 1)}, "padding"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"side": 1, "batch": 1}, "nothing like it"),
    ],
)
def test_what_is_left_to_pytorch(other, reason):
    for phase in PHASES:
        assert reason in (conv_choice.pointwise_why_not(convolution(**other), phase) or "")


def test_what_another_machine_measured_has_to_be_beyond_doubt(monkeypatch):
    conv = convolution()
    for here, ratio, is_taken in (
        (False, 1.1, False), (False, 1.2, True), (True, 1.1, True), (True, 0.9, False),
    ):  # fmt: skip
        monkeypatch.setattr(conv_speeds, "is_measured_here", lambda here=here: here)
        monkeypatch.setattr(conv_speeds, "speedup", lambda *_, ratio=ratio: (ratio, False))
        assert (conv_choice.pointwise_why_not(conv, FORWARD) is None) == is_taken


@pytest.mark.native
def test_the_tables_have_both_formats():
    for isa in ("avx512", "avx2"):
        rows = conv_speeds.table(conv_speeds.read(conv_speeds.SHIPPED)[isa])
        for channels_last in (False, True):
            assert len(rows[POINTWISE, "float32", channels_last, "1", 1]) > 50


class Bottleneck(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 1, bias=bias), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 8, 1, bias=bias), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 4, 1, bias=bias)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.head(self.relu(self.bn2(self.conv2(y)) + x))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_patched(training, bias, format):
    torch.manual_seed(0)
    model = Bottleneck(bias).train(training).to(memory_format=format)
    wide = copy.deepcopy(model).double()
    pooling_ext.patch(model)
    x = torch.randn(4, 8, 28, 28).contiguous(memory_format=format).requires_grad_()
    y = x.detach().double().requires_grad_()
    chosen = [decision.backend for decision in pooling_ext.explain(model, x).decisions]
    # Without gradients oneDNN folds batch norms in, in its own format.
    folds = not training and format == torch.channels_last
    assert chosen.count(POINTWISE) == (1 if folds else 3), chosen
    model.load_state_dict(wide.state_dict())  # the statistics have moved
    output = model(x)
    expected = wide(y)
    assert_close(output, expected.float(), scale=8)
    grad = torch.randn_like(output)
    output.backward(grad)
    expected.backward(grad.double())
    assert x.grad is not None and y.grad is not None
    assert_close(x.grad, y.grad.float(), scale=50)
    for (name, own), other in zip(model.named_parameters(), wide.parameters(), strict=True):
        if training and name in ("conv1.bias", "conv2.bias"):
            continue  # 0 but for rounding: the mean is taken away
        assert_close(own.grad, other.grad.float(), scale=50, what=name)


@pytest.mark.usefixtures("always")
def test_without_gradients_the_batch_norm_comes_after():
    torch.manual_seed(0)
    model = Bottleneck(True).eval()
    with torch.no_grad():
        x = torch.randn(4, 8, 28, 28)
        expected = model(x)
        pooling_ext.patch(model)
        assert_close(model(x), expected, scale=8)


@pytest.mark.usefixtures("always")
def test_function_and_explain():
    x, weight = torch.randn(4, 8, 28, 28), torch.randn(16, 8, 1, 1)
    assert_close(F.conv2d(x, weight), TF.conv2d(x, weight), scale=8)
    assert POINTWISE in str(pooling_ext.explain(F.conv2d, x, weight))


@pytest.mark.native
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiled(training):
    """Of sizes for which a measurement decides, in one graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU()).train(training)
    pooling_ext.patch(model)
    x = torch.randn(16, 64, 28, 28)
    assert conv_choice.pointwise_why_not(convolution(64, 128, 28), FORWARD) is None
    expected = torch.autograd.grad(model(x).square().mean(), model[0].weight)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).square().mean(), model[0].weight)
    torch.testing.assert_close(found, expected)
