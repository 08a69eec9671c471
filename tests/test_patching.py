"""patch and unpatch on small models and on torchvision's."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchvision
from torch import nn

import pooling_ext
from pooling_ext import PatchReport


def resnet18():
    return torchvision.models.resnet18(weights=None)


def squeezenet():
    return torchvision.models.squeezenet1_1(weights=None)


def densenet():
    return torchvision.models.densenet121(weights=None)


def googlenet():
    return torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=False)


def shufflenet():
    return torchvision.models.shufflenet_v2_x0_5(weights=None)


#: How many pooling modules each has.
MODELS = [
    pytest.param(resnet18, 2, id="resnet18"),
    pytest.param(squeezenet, 4, id="squeezenet1_1"),
    pytest.param(densenet, 4, id="densenet121"),
    pytest.param(googlenet, 14, id="googlenet"),
    pytest.param(shufflenet, 1, id="shufflenet"),
]


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.MaxPool2d(3, 2, 1),
        nn.Sequential(nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)),
        nn.LPPool2d(2, 2),
        nn.AdaptiveAvgPool2d(1),
    )


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("build, pools", MODELS)
def test_torchvision(build, pools):
    """The same outputs, gradients, names and state; unpatch restores every class."""
    model = build().eval()
    before, names = classes(model), [name for name, _ in model.named_modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model(x)
    report = pooling_ext.patch(model)
    assert len(report.replaced) == pools and not report.skipped
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in model.named_modules()] == names
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    explanation = pooling_ext.explain(model, x)
    assert len(explanation.decisions) == pools
    pooling_ext.unpatch(model)
    assert classes(model) == before
    assert not pooling_ext.explain(model, x).decisions
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_training_step():
    """Gradients of every parameter, with patched and unpatched pooling."""
    torch.manual_seed(0)
    model = resnet18().train()
    x = torch.randn(4, 3, 64, 64)
    twin = copy.deepcopy(model)
    pooling_ext.patch(model)
    for net in (model, twin):
        net(x).square().mean().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=f"gradient of {name}")


def test_report():
    model = small()
    report = pooling_ext.patch(model)
    assert isinstance(report, PatchReport)
    assert [(entry.path, entry.what) for entry in report.replaced] == [
        ("1", "MaxPool2d"),
        ("2.1", "AvgPool2d"),
        ("3", "LPPool2d"),
        ("4", "AdaptiveAvgPool2d"),
    ]
    text = str(report)
    assert "2.1" in text and "AvgPool2d" in text and "4 replaced, 0 skipped" in text


def test_identity_attributes_mode_and_hooks_stay():
    model = small().eval()
    pool = model[1]
    calls = []
    pool.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    pool.tag = "mine"
    pooling_ext.patch(model)
    assert model[1] is pool and isinstance(pool, nn.MaxPool2d) and isinstance(pool, pooling_ext.MaxPool2d)
    assert (pool.kernel_size, pool.stride, pool.padding, pool.tag, pool.training) == (3, 2, 1, "mine", False)
    x = torch.randn(1, 3, 20, 20)
    model(x)
    assert calls == [(1, 4, 9, 9)]
    model.train()
    assert pool.training
    pooling_ext.unpatch(model)
    assert type(pool) is nn.MaxPool2d and pool.tag == "mine"
    model(x)
    assert len(calls) == 2
    assert not any("pooling_ext" in key for module in model.modules() for key in vars(module))


def test_copies_of_a_patched_model():
    model = small()
    pooling_ext.patch(model)
    x = torch.rand(1, 3, 20, 20)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert classes(twin) == classes(model)
        assert torch.equal(twin(x), model(x))
        pooling_ext.unpatch(twin)
        assert classes(twin) == classes(small())
    assert type(model[1]) is pooling_ext.MaxPool2d


def test_patching_twice_and_unpatching_twice():
    model = small()
    pooling_ext.patch(model)
    again = pooling_ext.patch(model, strict=True)
    assert not again.replaced and len(again.skipped) == 4
    assert all("already" in entry.why for entry in again.skipped)
    pooling_ext.unpatch(model)
    pooling_ext.unpatch(model)
    assert classes(model) == classes(small())


def test_ours_from_the_start_stay_ours():
    model = nn.Sequential(pooling_ext.MaxPool2d(2, padding="same"), nn.MaxPool2d(2))
    pooling_ext.patch(model)
    pooling_ext.unpatch(model)
    assert [type(module) for module in model] == [pooling_ext.MaxPool2d, nn.MaxPool2d]


class OddPool(nn.MaxPool2d):
    """A class of its own, whose forward must not be taken away."""

    def forward(self, input):
        return super().forward(input) + 1


def test_what_is_skipped_and_why():
    model = nn.Sequential(OddPool(2), nn.FractionalMaxPool2d(2, output_size=2), nn.MaxPool2d(2))
    report = pooling_ext.patch(model)
    assert [entry.path for entry in report.replaced] == ["2"]
    assert [(entry.path, entry.what) for entry in report.skipped] == [
        ("0", "OddPool"),
        ("1", "FractionalMaxPool2d"),
    ]
    assert all(entry.why for entry in report.skipped)
    assert type(model[0]) is OddPool
    assert "OddPool" in str(report) and "1 replaced, 2 skipped" in str(report)


def test_strict_is_all_or_nothing():
    model = nn.Sequential(nn.MaxPool2d(2), OddPool(2), nn.AvgPool2d(2))
    before = classes(model)
    with pytest.raises(ValueError, match=r"1 \(OddPool\)"):
        pooling_ext.patch(model, strict=True)
    assert classes(model) == before
    assert not any("pooling_ext" in key for module in model.modules() for key in vars(module))


def test_a_pool_by_itself():
    pool = nn.MaxPool2d(2)
    report = pooling_ext.patch(pool)
    assert len(report.replaced) == 1 and type(pool) is pooling_ext.MaxPool2d
    pooling_ext.unpatch(pool)
    assert type(pool) is nn.MaxPool2d


def test_a_pool_used_twice_is_patched_once():
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(pool, nn.ReLU(), pool)
    assert len(pooling_ext.patch(model).replaced) == 1
    assert model[0] is model[2] is pool
    assert model(torch.rand(1, 1, 8, 8)).shape == (1, 1, 2, 2)


def test_nothing_to_patch():
    report = pooling_ext.patch(nn.Linear(2, 2), strict=True)
    assert not report.replaced and not report.skipped
    assert "0 replaced, 0 skipped" in str(report)


def test_channels_last_and_lower_precision():
    model = squeezenet().eval().to(torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(1, 3, 96, 96).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        pooling_ext.patch(model)
        actual = model(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_max_pooling_models_are_bitwise_equal():
    """SqueezeNet's features use max pooling alone, which is exact."""
    features = squeezenet().eval().features
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = features(x)
        pooling_ext.patch(features)
        assert torch.equal(features(x), expected)
