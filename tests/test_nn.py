"""The modules beside torch.nn's: signatures, attributes, repr, state, copies and results."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as TF
from helpers import assert_same, gradient
from torch import nn

import pooling_ext
import pooling_ext.functional as F

ARGUMENTS = {
    "MaxPool": [
        ((3,), {}),
        ((3, 2, 1), {}),
        ((2,), {"dilation": 2, "ceil_mode": True, "return_indices": True}),
    ],
    "AvgPool": [((3,), {}), ((3, 2, 1), {}), ((2,), {"ceil_mode": True, "count_include_pad": False})],
    "LPPool": [((2, 3), {}), ((1, 2, 1), {}), ((2, 3), {"ceil_mode": True})],
    "AdaptiveAvgPool": [((1,), {}), ((3,), {})],
    "AdaptiveMaxPool": [((1,), {}), ((3,), {"return_indices": True})],
}
CASES = [
    pytest.param(f"{kind}{rank}d", args, kwargs, id=f"{kind}{rank}d{args}{kwargs or ''}")
    for kind, calls in ARGUMENTS.items()
    for rank in (1, 2, 3)
    for args, kwargs in calls
]
NAMES = [f"{kind}{rank}d" for kind in ARGUMENTS for rank in (1, 2, 3)]
#: What ours take and torch.nn's do not, by keyword only.
BEYOND = {"padding", "safe"}


def pair(name, args, kwargs):
    return getattr(pooling_ext, name)(*args, **kwargs), getattr(nn, name)(*args, **kwargs)


def sample(name: str) -> torch.Tensor:
    return torch.rand(2, 3, *(9,) * int(name[-2])) + 0.1


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    ours = inspect.signature(getattr(pooling_ext, name)).parameters
    theirs = inspect.signature(getattr(nn, name)).parameters
    extra = [parameter for key, parameter in ours.items() if key not in theirs]
    assert {parameter.name for parameter in extra} <= BEYOND
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in extra)
    shared = [(key, parameter.default, parameter.kind) for key, parameter in ours.items() if key in theirs]
    assert shared == [(key, parameter.default, parameter.kind) for key, parameter in theirs.items()]


@pytest.mark.parametrize(
    "name",
    [f"{kind}_pool{rank}d" for kind in ("max", "avg", "adaptive_avg") for rank in (1, 2, 3)] + ["lp_pool2d"],
)
def test_functional_argument_order(name):
    """Every argument by position, in PyTorch's order."""
    rank = int(name[-2])
    x = torch.rand(2, 3, *(9,) * rank)
    args = {
        "max": (3, 2, 1, 1, True, True),
        "avg": (3, 2, 1, True, False) + ((7,) if rank > 1 else ()),
        "adaptive": (4,),
        "lp": (2, 3, 2, True),
    }[name.split("_")[0]]
    torch.testing.assert_close(getattr(F, name)(x, *args), getattr(TF, name)(x, *args))


@pytest.mark.parametrize("name, args, kwargs", CASES)
def test_module(name, args, kwargs):
    """isinstance, attributes, repr and results."""
    ours, theirs = pair(name, args, kwargs)
    assert isinstance(ours, getattr(nn, name))
    assert type(ours).__name__ == name
    assert repr(ours) == repr(theirs)
    public = {key: value for key, value in vars(theirs).items() if not key.startswith("_")}
    assert public.items() <= vars(ours).items()
    assert ours.__constants__ == theirs.__constants__
    x = sample(name)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(gradient(ours, x), gradient(theirs, x))


@pytest.mark.parametrize("name, args, kwargs", CASES)
def test_state_and_copies(name, args, kwargs):
    ours, theirs = pair(name, args, kwargs)
    x = sample(name)
    expected = ours(x)
    assert ours.state_dict() == theirs.state_dict() == {}
    ours.load_state_dict(theirs.state_dict())
    shared = copy.deepcopy(ours)
    pickled = pickle.loads(pickle.dumps(ours))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=False)
    for twin in (shared, pickled, saved):
        assert type(twin) is type(ours) and twin is not ours
        assert repr(twin) == repr(ours)
        assert_same(twin(x), expected)
    assert ours.eval().training is False and ours.to(torch.float64) is ours


@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}d".format)
@pytest.mark.parametrize("padding", ["same", "valid", "per-side"])
def test_padding_beyond_torch(padding, rank):
    sides = (1, 0, 0, 1, 1, 1)[: 2 * rank] if padding == "per-side" else padding
    x = sample(f"{rank}d")
    for kind in ("Max", "Avg"):
        module = getattr(pooling_ext, f"{kind}Pool{rank}d")(2, 1, padding=sides)
        assert_same(module(x), getattr(F, f"{kind.lower()}_pool{rank}d")(x, 2, 1, sides))
        assert f"padding={sides}" in repr(module) or f"padding='{sides}'" in repr(module)
        assert_same(copy.deepcopy(module)(x), module(x))
    module = getattr(pooling_ext, f"LPPool{rank}d")(2, 2, 1, padding=sides, safe=True)
    assert_same(module(x), getattr(F, f"lp_pool{rank}d")(x, 2, 2, 1, padding=sides, safe=True))


def test_global_modules():
    x = sample("2d")
    assert_same(pooling_ext.GlobalAvgPool2d()(x), F.global_avg_pool2d(x))
    assert_same(pooling_ext.GlobalMaxPool2d(keepdim=False)(x), F.global_max_pool2d(x, False))
    assert_same(
        pooling_ext.GlobalLPPool2d(3, False, safe=True)(x), F.global_lp_pool2d(x, 3, False, safe=True)
    )
    assert repr(pooling_ext.GlobalAvgPool2d()) == "GlobalAvgPool2d(keepdim=True)"
    assert repr(pooling_ext.GlobalMaxPool2d(False)) == "GlobalMaxPool2d(keepdim=False)"
    assert "norm_type=3" in repr(pooling_ext.GlobalLPPool2d(3))
    assert pickle.loads(pickle.dumps(pooling_ext.GlobalLPPool2d(3))).norm_type == 3


def test_public_names():
    """Everything that is promised is there, and documented."""
    assert set(NAMES) <= set(pooling_ext.__all__)
    for module in (pooling_ext, pooling_ext.nn, F):
        for name in module.__all__:
            assert hasattr(module, name)
            if callable(getattr(module, name)):
                assert getattr(module, name).__doc__, f"{name} has no docstring"


@pytest.mark.usefixtures("one_thread")
def test_usable_in_a_training_loop():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        pooling_ext.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        pooling_ext.AvgPool2d(2),
        pooling_ext.GlobalAvgPool2d(keepdim=False),
        nn.Linear(8, 2),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x = torch.randn(32, 1, 12, 12)
    target = (x.mean((1, 2, 3)) > 0).long()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = TF.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
