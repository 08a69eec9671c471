"""freeze works where the model does: layouts, examples and results of any kind."""

from __future__ import annotations

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
    relu_block,
    seeded,
)
from torch import nn

import pooling_ext

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]

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


class ResidualIsTheInput(nn.Module):
    """The input goes into the second convolution as the residual alone, which has other channels."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.second(self.first(x + 0.5)) + x


def test_channels_are_those_of_the_layer_that_convolves_the_input():
    model, x = ResidualIsTheInput().eval(), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(pooling_ext.freeze(model, x)(x), model(x), rtol=1e-4, atol=1e-5)
