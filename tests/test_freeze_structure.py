"""freeze works where the model does: calls, layouts, weights that are computed, modules inside modules."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple

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
    seeded,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import pooling_ext
from pooling_ext.freezing.layers import PackedConv

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]


def relu_block(inputs: int = 4, outputs: int = 4) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs), norm(outputs), nn.ReLU())


# --- layouts -----------------------------------------------------------------------------------------------


@network(conv=conv, linear=lambda: nn.Linear(256, 5))
def flattened(self, x):
    return self.linear(self.conv(x).view(x.size(0), -1))


@network(conv=conv, bn=norm)
def shuffled_channels(self, x):
    y = self.conv(x)
    b, c, h, w = y.shape
    y = y.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
    return self.bn(y)


@network(conv=conv)
def strided_view(self, x):
    return torch.as_strided(self.conv(x), (2, 4), (256, 1))


@network(conv=conv)
def first_channels(self, x):
    return self.conv(x)[:, :2], self.conv(x)[:, torch.tensor([0, 1])]


@network(conv=conv)
def channels_last_by_hand(self, x):
    y = self.conv(x)
    return y.permute(0, 2, 3, 1).reshape(x.size(0), -1), y.flatten(2).transpose(1, 2).contiguous()


@network(conv=conv)
def asked_for_its_layout(self, x):
    y = self.conv(x)
    return y.view(-1) if y.is_contiguous() else y.reshape(-1) * 2


@network(conv=conv)
def means(self, x):
    y = self.conv(x)
    return y.mean((2, 3)), y.mean([2, 3], keepdim=True), y.amax(1)


@network(block=relu_block, pool=lambda: nn.MaxPool2d(2))
def pyramid(self, x):
    y = self.block(x)
    small = self.pool(y)
    return y, small, TF.interpolate(small, size=x.shape[-2:], mode="bilinear") + x


LAYOUTS = [
    shuffled_channels,
    first_channels,
    channels_last_by_hand,
    asked_for_its_layout,
    means,
    pyramid,
    relu_block,
]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("net", LAYOUTS, ids=lambda c: c.__name__)
def test_layouts(net, layout):
    """Outputs have the strides that the model's have, so that what follows can view them."""
    model, x = net().eval(), images().contiguous(memory_format=layout)
    frozen = assert_frozen(model, x)
    for given in (x.contiguous(), x.contiguous(memory_format=torch.channels_last)):
        assert_close(seeded(frozen, given), seeded(model, given))


def test_views_that_a_layout_forbids():
    assert_frozen(strided_view(), images())
    frozen = assert_frozen(flattened(), images())
    assert is_whole(frozen)
    with pytest.raises(pooling_ext.ArgumentError, match="view"):
        pooling_ext.freeze(flattened(), images().contiguous(memory_format=torch.channels_last))


def test_outputs_can_be_viewed():
    frozen = pooling_ext.freeze(relu_block().eval(), images())
    assert frozen(images()).view(2, -1).shape == (2, 256)


# --- calls and results -------------------------------------------------------------------------------------

Pair = namedtuple("Pair", "features rest")


@network(conv=conv, bn=norm)
def nest(self, x):
    y = self.bn(self.conv(x))
    return OrderedDict(b=y, a=[y * 1, (y.mean(), None, 3)]), Pair(y + 1, {"x": x * 1})


@network(conv=conv)
def named(self, pixels, scale=1.0, *, shift=0.0):
    return self.conv(pixels) * scale + shift


@network(conv=conv)
def of_a_dict(self, batch):
    return {"y": self.conv(batch["image"]) + batch["more"][0], "given": batch["more"][1]}


@network(conv=conv)
def of_a_list(self, pair):
    left, right = pair
    return self.conv(left) - right


@network(conv=conv)
def of_several(self, x, *others):
    return self.conv(x) + sum(others)


@network(conv=conv)
def best(self, x):
    return self.conv(x).flatten(1).topk(5)


def test_results_are_nested_as_the_models():
    assert_frozen(nest(), images())


def test_named_results_of_operators():
    found, model, x = None, best(), images()
    found = pooling_ext.freeze(model, x)(x)
    assert type(found) is torch.return_types.topk
    assert_close(tuple(found), tuple(model(x)))


def test_keywords():
    model, x = named(), images()
    for example in ({"pixels": x, "scale": 2.0, "shift": 1.0}, {"pixels": x}):
        frozen = pooling_ext.freeze(model, example)
        assert_close(frozen(**example), model(**example))
    with pytest.raises(pooling_ext.ArgumentError, match=r"argument 2\.0"):
        pooling_ext.freeze(model, (x, 2.0))(x, 3.0)
    with pytest.raises(TypeError):
        pooling_ext.freeze(model, x)(x, strange=1)


@pytest.mark.parametrize("net", [of_a_dict, of_a_list, of_several], ids=lambda c: c.__name__)
def test_nested_examples(net):
    x, y = images(), images()
    args = {of_a_dict: ({"image": x, "more": (y, 7)},), of_a_list: ([x, y],), of_several: (x, y, x * 2)}[net]
    model = net()
    frozen = pooling_ext.freeze(model, args)
    assert_close(seeded(frozen, *args), seeded(model, *args))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d], ids=lambda c: c.__name__)
def test_unbatched_examples(kind):
    layer = kind(4, 6, 3).eval().requires_grad_(False)
    assert_frozen(layer, images()[0])
    assert_frozen(nn.Sequential(layer, nn.ReLU(), nn.MaxPool2d(2)).eval(), images()[0])


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
