"""Which modules frozen models are saved with, and which are refused by name."""

from __future__ import annotations

import copy
import io
from collections import namedtuple

import pytest
import torch
from freezing_cases import conv
from saving_cases import assert_saves
from torch import Tensor, nn

import pooling_ext
from pooling_ext import ArgumentError
from pooling_ext.freezing.saving import modules, operators

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]

# --- modules that stay -------------------------------------------------------------------------------------

IMAGES, ROWS = (2, 8, 8, 8), (2, 6, 8)
STAY: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.LayerNorm([8, 8], eps=1e-3, bias=False), IMAGES),
    (nn.GroupNorm(2, 8, affine=False), IMAGES),
    (nn.InstanceNorm2d(8, affine=True), IMAGES),
    (nn.RMSNorm(8), ROWS),
    (nn.LocalResponseNorm(3, 1e-3), IMAGES),
    (nn.Upsample((5, 7), mode="bicubic", align_corners=True), IMAGES),
    (nn.UpsamplingNearest2d(scale_factor=2), IMAGES),
    (nn.PixelShuffle(2), IMAGES),
    (nn.PixelUnshuffle(2), IMAGES),
    (nn.ReflectionPad2d((1, 2, 0, 1)), IMAGES),
    (nn.ConstantPad2d(1, 0.5), IMAGES),
    (nn.Unfold(3, padding=1), IMAGES),
    (nn.Unflatten(1, (2, 4)), IMAGES),
    (nn.Softmax(1), IMAGES),
    (nn.PReLU(8), IMAGES),
    (nn.Softplus(2.0, 10.0), IMAGES),
    (nn.Threshold(0.1, 20.0), IMAGES),
    (nn.ELU(0.5, inplace=True), IMAGES),
    (nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True), ROWS),
    (nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), IMAGES),
    (nn.AvgPool2d((2, 3), padding=1, count_include_pad=False, divisor_override=5), IMAGES),
    (nn.LPPool2d(2, 3, ceil_mode=True), IMAGES),
    (nn.AdaptiveMaxPool2d((3, None)), IMAGES),
    (nn.AvgPool1d(2), ROWS),
    (nn.Bilinear(8, 8, 4, bias=False), ROWS),
    (pooling_ext.MaxPool2d(3, padding="same"), IMAGES),
    (pooling_ext.LPPool2d(3, 2, padding=1, safe=True), IMAGES),
    (pooling_ext.GlobalLPPool2d(2.0, keepdim=False), IMAGES),
    (pooling_ext.BatchNormAct2d(8, activation="leaky_relu", negative_slope=0.2), IMAGES),
    (pooling_ext.ConvBNAct2d(8, 8, 3, padding=1, activation="silu"), IMAGES),
]


class Around(nn.Module):
    """Calls a module with as many arguments as it takes, and passes its results on."""

    def __init__(self, module: nn.Module, arguments: int) -> None:
        super().__init__()
        self.module, self.arguments = module, arguments

    def forward(self, x):
        y = self.module(*[x * 1.5] * self.arguments)
        return (y[0] + 1, y[1]) if isinstance(self.module, nn.MultiheadAttention) else y + 1


@pytest.mark.parametrize(("module", "shape"), STAY, ids=lambda value: type(value).__name__)
def test_modules_that_stay(module, shape):
    torch.manual_seed(0)
    module = copy.deepcopy(module)
    arguments = {nn.MultiheadAttention: 3, nn.Bilinear: 2}.get(type(module), 1)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    assert_saves(Around(module, arguments), torch.randn(shape))


def test_all_modules_and_operators_of_the_lists_exist():
    """A name with a typing error would refuse what it is for."""
    assert len(modules._classes()) > 90
    for name in modules._SINGLE.split():
        assert hasattr(nn, name), name
    known = {name.rpartition(".")[2] for name in operators._functions()}
    for name in operators._MORE.split():
        assert name in known or hasattr(Tensor, name) or hasattr(Tensor, f"{name}_"), name


# --- what cannot be saved ----------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = conv(4, 4), nn.Sequential(conv(4, 4), Own())

    def forward(self, x):
        return self.inner(self.first(x))


class Own(nn.Module):
    """Cannot be traced."""

    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


Pair = namedtuple("Pair", "a b")


class Named(nn.Module):
    def forward(self, x):
        return Pair(x + 1, x)


class Method(nn.Module):
    def forward(self, x):
        return x.igamma(x.abs() + 1)


def hooked() -> nn.Module:
    model = nn.Sequential(conv(4, 4), nn.Sigmoid())
    model[1].register_forward_hook(lambda module, args, result: result * 2)
    return model


def renamed() -> nn.Module:
    model = nn.Sequential(conv(4, 4), nn.Softplus())
    model[1].extra = object()
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(Branches, r"inner\.1 \(Own\): .*runs as it is", id="code-inside"),
        pytest.param(lambda: nn.Sequential(Own()), r"0 \(Own\): .*", id="code-outside"),
        pytest.param(hooked, r"1 \(Sigmoid\): it was changed after it was made", id="hook"),
        pytest.param(renamed, r"1 \(Softplus\): it was changed after it was made: extra", id="attribute"),
        pytest.param(Named, r"its results: it has a .*Pair", id="named-tuple"),
        pytest.param(Method, r"igamma: it calls the method igamma", id="method"),
    ],
)
def test_refused_with_names(make, reason, tmp_path):
    frozen = pooling_ext.freeze(make().eval(), torch.rand(1, 4, 8, 8))
    path = tmp_path / "model.pt"
    path.write_text("before")
    with pytest.raises(ArgumentError, match=rf"\({frozen.name}\) cannot be saved as data(.|\n)*{reason}"):
        frozen.save(path)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_all_of_them_are_named():
    model = nn.Sequential(conv(4, 4), nn.Softsign(), conv(4, 4), nn.Softplus())
    for index in (1, 3):
        model[index].extra = object()
    frozen = pooling_ext.freeze(model.eval(), torch.rand(1, 4, 8, 8))
    with pytest.raises(ArgumentError, match=r"(?s)1 \(Softsign\).*3 \(Softplus\)"):
        frozen.save(io.BytesIO())
