"""freeze works where the model does: weights that are computed, modules of others, modules inside modules."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as TF
from freezing_cases import (
    assert_close,
    assert_frozen,
    conv,
    images,
    is_whole,
    network,
    norm,
    norms_left,
    other_images,
    relu_block,
    seeded,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pooling_ext
from pooling_ext.freezing.layers import PackedConv

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]


# --- weights that are computed -----------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(conv())


def old_spectral_norm():
    return nn.utils.spectral_norm(conv())


def pruned():
    layer = conv()
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 2)
    return layer


def parametrized():
    layer = conv()
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def weight_norm():
    return parametrizations.weight_norm(conv())


def spectral_norm():
    return parametrizations.spectral_norm(conv())


COMPUTED = [old_weight_norm, old_spectral_norm, pruned, parametrized, weight_norm, spectral_norm]


@pytest.mark.parametrize("make", COMPUTED, ids=lambda f: f.__name__)
def test_weights_that_are_computed(make):
    model = nn.Sequential(make(), norm(), nn.ReLU()).eval().requires_grad_(False)
    frozen = assert_frozen(model, images())
    if make is not old_spectral_norm:
        assert is_whole(frozen) and not norms_left(frozen)


# --- modules inside modules --------------------------------------------------------------------------------


@network(block=relu_block)
def encoder(self, x):
    return self.block(x)


encoder.output_stride = 4
encoder.scaled = lambda self, x, by: x * by


@network(encoder=encoder, head=relu_block)
def reads_its_child(self, x):
    if x.shape[-1] % self.encoder.output_stride:
        x = x[..., :4]
    y = self.encoder(x)
    return self.head(self.encoder.scaled(y, self.encoder.block[0].out_channels)), self.encoder.block[1].eps


@network(outer=lambda: relu_block(3, 8), inner=lambda: nn.Sequential(conv(4, 4, 1), norm()))
def split_and_joined(self, x):
    y = list(self.outer(x).chunk(2, 1))
    y.append(self.inner(y[-1]))
    return torch.cat(y, 1)


@network(a=relu_block, b=relu_block)
def branch_on_values(self, x):
    y = self.b(self.a(x))
    return y if y.sum() > 0 else -y


@network(a=relu_block, b=relu_block)
def branch_on_size(self, x):
    return self.b(self.a(x)) if x.shape[-1] > 8 else self.a(self.b(x))


@network(block=relu_block)
def image_by_image(self, x):
    return torch.stack([self.block(image[None])[0] for image in x]) / len(x)


@network(head=lambda: branch_on_values())
def nest_that_branches(self, x):
    return x.mean((2, 3)), {"raw": self.head(x)}


@pytest.mark.parametrize(
    "net", [reads_its_child, branch_on_values, branch_on_size, image_by_image, nest_that_branches]
)
@pytest.mark.parametrize("inside", [False, True])
def test_modules_that_cannot_be_traced_are_entered(net, inside):
    model = nn.Sequential(conv(), norm(), net()) if inside else net()
    frozen = assert_frozen(model.eval().requires_grad_(False), images())
    assert not norms_left(frozen)


@pytest.mark.parametrize("inside", [False, True])
def test_chunks_and_lists_are_traced(inside):
    model = nn.Sequential(split_and_joined()) if inside else split_and_joined()
    frozen = assert_frozen(model, images(2, 3, 8, 8))
    assert not norms_left(frozen)


def test_graph_modules_and_scripts_inside():
    def inner():
        return nn.Sequential(conv(), norm(), nn.ReLU()).eval().requires_grad_(False)

    model = nn.Sequential(conv(), torch.fx.symbolic_trace(inner()), norm()).eval().requires_grad_(False)
    assert not norms_left(assert_frozen(model, images()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model[1] = torch.jit.script(inner())
    frozen = pooling_ext.freeze(model, images())
    for x in other_images(images()):
        assert_close(seeded(frozen, x), seeded(model, x))


# --- known by what they do ---------------------------------------------------------------------------------


class OwnConv(nn.Conv2d):
    pass


class OwnNorm(nn.BatchNorm2d):
    """Only its constructor and its text are its own."""

    def __init__(self, channels):
        super().__init__(channels)

    def extra_repr(self):
        return "own"


class FrozenNorm(nn.Module):
    """As detection libraries have it: buffers alone, and eps in its forward."""

    def __init__(self, channels=4, eps=None):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class FrozenNormOfBlocks(FrozenNorm):
    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class FunctionalNorm(nn.BatchNorm2d):
    """timm's kind: a batch norm with the activation in its forward."""

    def forward(self, x):
        y = TF.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
        return TF.relu(y)


def test_subclasses_that_change_nothing():
    model = nn.Sequential(OwnConv(4, 4, 3), norm(cls=OwnNorm), nn.ReLU()).eval().requires_grad_(False)
    frozen = assert_frozen(model, images())
    assert [type(m) for m in frozen.body.graph.children()] == [PackedConv]
    assert pooling_ext.patch(model).replaced


@pytest.mark.parametrize("kind", [FrozenNorm, FrozenNormOfBlocks], ids=lambda c: c.__name__)
def test_frozen_batch_norms_of_others(kind):
    model = nn.Sequential(conv(), kind(), nn.ReLU(), conv(), kind()).eval().requires_grad_(False)
    frozen = assert_frozen(model, images())
    assert is_whole(frozen)


def test_identities_between_norm_and_activation():
    middle = nn.Sequential(conv(), norm(), nn.Identity(), nn.Dropout(0.3), nn.ReLU())
    frozen = assert_frozen(middle.eval().requires_grad_(False), images())
    (layer,) = frozen.body.graph.children()
    assert type(layer) is PackedConv and layer.activation is not None


@network(
    a=lambda: nn.Sequential(conv(), norm()),
    b=lambda: nn.Sequential(conv(), nn.Sequential(norm())),
    act=nn.ReLU,
)
def additions_across_modules(self, x):
    return self.act(self.a(x) + self.b(self.a(x)) + x)


@network(conv=conv)
def scaled_addition(self, x):
    return torch.relu(torch.add(self.conv(x), x, alpha=2))


def test_additions():
    frozen = assert_frozen(additions_across_modules(), images())
    assert not norms_left(frozen)
    assert_frozen(scaled_addition(), images())


# --- half precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, FunctionalNorm], ids=lambda c: c.__name__)
@pytest.mark.parametrize("folded", [True, False])
def test_statistics_stay_float32(dtype, tolerance, kind, folded):
    """Of values in the thousands, whose variance float16 cannot hold."""
    layer, bn, x = conv(16, 16), kind(16), images(4, 16, 32, 32) * 1000
    first = layer if folded else nn.MaxPool2d(1)
    with torch.no_grad():
        y = first(x)
        bn.running_mean.copy_(y.mean((0, 2, 3)))
        bn.running_var.copy_(y.var((0, 2, 3)))
    assert bn.running_var.max() > torch.finfo(torch.float16).max
    model = nn.Sequential(first, bn).eval().requires_grad_(False)
    assert_frozen(model, x, tolerance=tolerance, dtype=dtype)


class AsksForASize(nn.Module):
    def forward(self, x):
        return x * 2 if x.size(2) > 2 else x


class GivesAnAttribute(nn.Module):
    """An attribute of a tensor is first used by a child that cannot be traced."""

    def __init__(self):
        super().__init__()
        self.child, self.conv = AsksForASize(), conv(4)

    def forward(self, x):
        return self.conv(self.child(x.data))


def test_an_attribute_goes_into_a_child_that_cannot_be_traced():
    model, x = GivesAnAttribute().eval(), images()
    torch.testing.assert_close(pooling_ext.freeze(model, x)(x), model(x), rtol=1e-4, atol=1e-5)
