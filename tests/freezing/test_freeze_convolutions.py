"""How frozen convolutions run: which way is chosen, that each is right, and that copies run in it too."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from freezing_cases import (
    ACTIVATIONS,
    assert_close,
    assert_frozen,
    conv,
    convolutions,
    is_whole,
    network,
    norm,
    run,
    set_winograd,
    ways,
)
from helpers import strides
from torch import Tensor, nn

import pooling_ext
from pooling_ext import ArgumentError
from pooling_ext.freezing import conv_engines
from pooling_ext.freezing.layers import PackedConv
from pooling_ext.graph.activations import MODULES, Activation

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison, pytest.mark.native]

#: The largest error in float32 of one layer, over its largest element.
LARGEST_ERROR = 5e-5


@pytest.fixture(autouse=True)
def without_amx(monkeypatch):
    """With which bfloat16 would be oneDNN's."""
    set_winograd(monkeypatch)


def error(actual: Tensor, model: nn.Module, x: Tensor) -> float:
    """The largest error against float64, over the largest element."""
    exact = run(copy.deepcopy(model).double(), x.double())
    return float((actual.double() - exact).abs().max() / exact.abs().max())


def wide(*layers: nn.Module) -> nn.Sequential:
    """Of 3 channels made 16 first."""
    return nn.Sequential(conv(3, 16), *layers).eval().requires_grad_(False)


def two_convs() -> nn.Sequential:
    """The second of which is Winograd's."""
    return wide(norm(16), nn.ReLU(), conv(16, 24), norm(24), nn.ReLU())


def transformed(layer: PackedConv) -> Tensor:
    return conv_engines.transformed(layer.weight, layer.groups, layer.stride[-1])


# --- the choice --------------------------------------------------------------------------------------------

CHOICES = [
    (conv(16, 16), (2, 16, 8, 8), "Winograd", ""),
    (conv(32, 48, groups=2, bias=False), (1, 32, 9, 11), "Winograd", ""),
    (
        conv(16, 16, stride=2),
        (2, 16, 8, 8),
        "prepacked",
        "its kernel is 3x3 and its stride 2x2, and nothing like it was measured",
    ),
    (conv(16, 16, stride=3), (2, 16, 8, 8), "prepacked", "the stride is 3x3, not 1 or 2"),
    (conv(16, 16, dilation=2), (2, 16, 8, 8), "Winograd", ""),
    (conv(16, 16, dilation=8), (2, 16, 20, 20), "prepacked", "leave so much of a tile empty"),
    (
        conv(16, 16, 5),
        (2, 16, 8, 8),
        "prepacked",
        "its kernel is 5x5 and its stride 1x1, and nothing like it was measured",
    ),
    (conv(8, 16), (2, 8, 8, 8), "prepacked", "8 channels"),
    (conv(16, 16), (8, 16, 2, 2), "prepacked", "2x2 leave so much of a tile empty"),
    (conv(256, 256), (1, 256, 4, 4), "prepacked", "would be read for 1 tiles"),
    (conv(16, 16, groups=16), (2, 16, 7, 7), "depthwise", "a group has 1 channels"),
    (
        conv(16, 16, groups=16),
        (2, 16, 28, 28),
        "prepacked",
        "PyTorch's forward of it was measured to be 2.00 times as fast",
    ),
    (conv(16, 16, 7, groups=16), (2, 16, 14, 14), "depthwise", "the kernel is 7x7"),
    (nn.ConvTranspose2d(16, 16, 3), (2, 16, 8, 8), "PyTorch", "it is transposed"),
    (nn.Conv1d(16, 16, 3), (2, 16, 8), "PyTorch", "it has 1 spatial dimensions, not 2 or 3"),
    (nn.Conv3d(16, 16, 3), (1, 16, 8, 8, 8), "Winograd", ""),
    (nn.Conv3d(16, 16, (3, 1, 1)), (1, 16, 8, 8, 8), "prepacked", "the kernel is 3x1x1, not 3x3"),
]


@pytest.mark.parametrize("layer, shape, way, reason", CHOICES, ids=str)
def test_the_choice(layer, shape, way, reason):
    x = torch.randn(shape)
    model = nn.Sequential(layer).eval().requires_grad_(False)
    frozen = pooling_ext.freeze(model, x)
    assert ways(frozen) == [way]
    entry = next(entry for entry in frozen.report.replaced if entry.path == "0")
    assert entry.why == way
    told = frozen.report.explain("0")
    assert told.startswith(f"0 ({type(layer).__name__}): {way}\n  {way}, for an input of ")
    assert reason in told
    assert error(run(frozen, x), model, x) < LARGEST_ERROR


def test_a_backend_that_is_asked_for_is_taken():
    with pooling_ext.use_backend("aten"):
        frozen = pooling_ext.freeze(two_convs(), torch.randn(2, 3, 8, 8))
    assert "Winograd" not in ways(frozen)
    assert "backend 'aten' was asked for" in frozen.report.explain("3")


def test_next_to_dilated_and_strided_ones():
    model = wide(
        conv(16, 16, dilation=2),
        nn.ReLU(),
        conv(16, 32, stride=2),
        norm(32),
        conv(32, 32),
        norm(32),
        nn.ReLU(),
        conv(32, 16, 1),
        conv(16, 16, groups=16),
        nn.ReLU6(),
        conv(16, 16),
    )
    frozen = assert_frozen(model, torch.randn(2, 3, 14, 14))
    assert ways(frozen) == [
        "prepacked",
        "Winograd",
        "prepacked",
        "Winograd",
        "prepacked",
        "depthwise",
        "Winograd",
    ]


# --- each way is right -------------------------------------------------------------------------------------

IN_NO_KERNEL = (nn.Hardtanh, nn.Sigmoid, nn.Tanh)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Identity(), *ACTIVATIONS], ids=str)
def test_activations(activation, bias):
    model, x = nn.Sequential(conv(16, 24, bias=bias), activation).eval(), torch.randn(2, 16, 9, 11) * 3
    frozen = pooling_ext.freeze(model, x)
    assert ways(frozen) == ["Winograd"]
    assert error(run(frozen, x), model, x) < LARGEST_ERROR
    model = nn.Sequential(conv(16, 16, groups=16, bias=bias), activation).eval()
    x = x[..., :7, :7].contiguous()
    frozen = pooling_ext.freeze(model, x)
    fused = isinstance(activation, nn.ReLU6) or not isinstance(activation, IN_NO_KERNEL)
    assert ways(frozen) == ["depthwise" if fused else "prepacked"]
    assert error(run(frozen, x), model, x) < 1e-6


@pytest.mark.parametrize("activation", [nn.Identity(), *ACTIVATIONS], ids=str)
@pytest.mark.parametrize("kind", ["add", "overwrite"])
def test_residuals(activation, kind):
    known: Activation | None = None
    if type(activation) is not nn.Identity:
        known = MODULES[type(activation)](activation)
    weight, bias = torch.randn(24, 16, 3, 3) / 12, torch.randn(24)
    layer = PackedConv(weight, bias, [1, 1], [1, 1], [1, 1], 1, known, kind, (2, 16, 9, 7))
    assert layer.way == "Winograd"
    x = torch.randn(2, 16, 9, 7).contiguous(memory_format=torch.channels_last)
    for residual in (
        torch.randn(2, 24, 9, 7),
        torch.randn(2, 24, 9, 7).contiguous(memory_format=torch.channels_last),
        torch.randn(1, 24, 1, 1),
        torch.randn(24, 9, 7).double(),
    ):
        before = residual.clone()
        found = layer.function(x, residual)
        direct = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
        expected = activation(direct + residual.double())
        assert float((found - expected).abs().max() / expected.abs().max()) < LARGEST_ERROR
        assert torch.equal(residual, before)  # no kernel of Winograd's writes to it


@network(a=lambda: conv(16, 16), b=lambda: conv(16, 16), c=lambda: conv(16, 16, 1), bn=lambda: norm(16))
def residuals_read_again(self, x):
    y = torch.relu(self.a(x))
    z = torch.relu(self.bn(self.b(y)) + y)
    w = torch.relu(self.c(z) + z)
    return torch.sigmoid(self.a(w)) + self.b(w), z * 2


def test_what_is_read_again_is_not_written_to():
    frozen = assert_frozen(residuals_read_again(), torch.randn(2, 16, 9, 9))
    assert set(ways(frozen)) == {"Winograd", "prepacked"}
    assert [layer.residual for layer in convolutions(frozen)].count("overwrite") == 1


PADDED = [
    conv(16, 16, padding_mode="reflect"),
    nn.Conv2d(16, 16, 3, padding="same"),
    nn.Conv2d(16, 16, 3, padding=(0, 2)),
    nn.Conv2d(16, 16, 3, padding=3),
    nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(16, 16, 3)),
]


@pytest.mark.parametrize("layer", PADDED, ids=str)
def test_padding(layer):
    frozen = assert_frozen(nn.Sequential(layer).eval().requires_grad_(False), torch.randn(2, 16, 8, 9))
    assert ways(frozen) == ["Winograd"]
    (only,) = convolutions(frozen)
    sides = only.output_shape(torch.empty(only.input_size, device="meta"))
    assert sides == tuple(run(frozen, torch.randn(2, 16, 8, 9)).shape)


@pytest.mark.parametrize("shape", [(16, 12, 12), (2, 16, 12, 12)])
def test_unbatched_and_other_sizes(shape):
    model, x = nn.Sequential(conv(16, 32), norm(32)).eval().requires_grad_(False), torch.randn(shape)
    model = model if x.dim() == 4 else model[:1]
    frozen = assert_frozen(model, x)
    for size in ((1, 1), (3, 2), (37, 5)):
        given = torch.randn(*shape[:-2], *size)
        assert_close(run(frozen, given), run(model, given))
    if x.dim() == 4:
        for batch in (0, 1, 7):
            given = torch.randn(batch, 16, 12, 12)
            assert_close(run(frozen, given), run(model, given))
    with pytest.raises(ArgumentError, match=r"^0"):
        frozen(torch.randn(*shape[:-3], 17, 12, 12))


def test_inputs_that_are_too_small_name_the_layer():
    frozen = pooling_ext.freeze(wide(nn.Conv2d(16, 16, 3)), torch.randn(1, 3, 12, 12))
    assert ways(frozen) == ["prepacked", "Winograd"]
    with pytest.raises(ArgumentError, match=r"^1: .*the kernel must fit"):
        frozen(torch.randn(1, 3, 2, 2))


@network(conv=lambda: conv(16, 16), depthwise=lambda: conv(16, 16, groups=16))
def in_another_order(self, x):
    y = x.flatten(1).reshape(x.shape).transpose(2, 3)
    return self.conv(y), self.depthwise(y)


@pytest.mark.parametrize("size", [(7, 7), (1, 6), (6, 1), (1, 1)])
def test_memory_formats(size):
    model = in_another_order()
    frozen = pooling_ext.freeze(model, torch.randn(2, 16, 7, 7))
    assert ways(frozen) == ["Winograd", "depthwise"]
    direct = pooling_ext.freeze(model, torch.randn(2, 16, 7, 7), exact=True)
    for format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 16, *size).contiguous(memory_format=format)
        assert_close(run(frozen, x), run(direct, x))
        inside = [layer.function(x) for layer in convolutions(frozen)]
        packed = next(layer for layer in convolutions(direct) if layer.way == "prepacked").function(x)
        assert [strides(y) for y in inside] == [strides(packed)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model, x = two_convs(), torch.randn(2, 3, 12, 12)
    frozen = pooling_ext.freeze(model, x, dtype)
    layer = convolutions(frozen)[1]
    wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.way == "Winograd" and transformed(layer).dtype == wide_dtype and layer.weight.dtype == dtype
    assert error(run(frozen, x), model, x) < {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-6)
    with torch.no_grad():
        own = run(copy.deepcopy(model).to(dtype), x.to(dtype))
    assert error(run(frozen, x), model, x) <= 2 * error(own, model, x) + 1e-7


def test_amx_keeps_bfloat16(monkeypatch):
    set_winograd(monkeypatch, amx=True)
    frozen = pooling_ext.freeze(two_convs(), torch.randn(2, 3, 12, 12), torch.bfloat16)
    assert "Winograd" not in ways(frozen) and "AMX" in frozen.report.explain("3")


# --- models ------------------------------------------------------------------------------------------------


class Inverted(nn.Module):
    """A mobile net's block: wider, depthwise, narrower."""

    def __init__(self, activation: nn.Module, kernel: int):
        super().__init__()
        self.layers = nn.Sequential(
            conv(16, 48, 1),
            norm(48),
            activation,
            conv(48, 48, kernel, groups=48),
            norm(48),
            activation,
            conv(48, 16, 1),
            norm(16),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def test_a_mobile_net():
    blocks = [Inverted(nn.ReLU6(), 3), Inverted(nn.SiLU(), 5), Inverted(nn.Hardswish(), 7)]
    model = wide(*blocks).requires_grad_(False)
    x = torch.randn(2, 3, 7, 7)
    frozen = assert_frozen(model, x)
    assert ways(frozen).count("depthwise") == 3 and is_whole(frozen)
    assert error(run(frozen, x), model, x) < 4 * error(run(model, x), model, x) + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_a_resnet(dtype):
    """At most four times eager's; of some 2 x in float32."""
    model, x = torchvision.models.resnet18().eval(), torch.randn(2, 3, 224, 224)
    frozen = pooling_ext.freeze(model, x, dtype)
    assert is_whole(frozen) and not frozen.report.warnings and ways(frozen).count("Winograd") == 13
    own = run(copy.deepcopy(model).to(dtype), x.to(dtype))
    floor = 8 * torch.finfo(dtype).eps
    assert error(run(frozen, x), model, x) <= max(4 * error(own, model, x), floor)


def test_results_are_the_same_for_any_number_of_threads():
    model = nn.Sequential(conv(64, 64), nn.SiLU(), conv(64, 48), nn.Tanh()).eval().requires_grad_(False)
    for shape in ((1, 64, 9, 9), (3, 64, 30, 30)):
        x = torch.randn(shape)
        frozen = pooling_ext.freeze(model, x)
        assert set(ways(frozen)) == {"Winograd"}
        expected = run(frozen, x)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            again = pooling_ext.freeze(model, x, check=False)
            assert torch.equal(run(frozen, x), expected) and torch.equal(run(again, x), expected)
        torch.set_num_threads(1)
