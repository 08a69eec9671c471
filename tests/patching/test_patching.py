"""patch and unpatch: the report, what is replaced and skipped, and undoing it."""

from __future__ import annotations

import pytest
import torch
import torchvision
from patching_cases import classes, resnet18, small
from torch import nn

import pooling_ext
from pooling_ext import PatchReport


def test_report():
    model = small()
    report = pooling_ext.patch(model)
    assert isinstance(report, PatchReport)
    # Its convolution is replaced too, where kernels of ours are the faster ones.
    pools = [(entry.path, entry.what) for entry in report.replaced if entry.what != "Conv2d"]
    assert pools == [
        ("1", "MaxPool2d"),
        ("2.1", "AvgPool2d"),
        ("3", "LPPool2d"),
        ("4", "AdaptiveAvgPool2d"),
    ]
    text = str(report)
    assert "2.1" in text and "AvgPool2d" in text and f"{len(report.replaced)} replaced, 0 skipped" in text
    assert "no convolution, BatchNorm and ReLU to fuse" in text


def test_report_names_the_parts_of_chains():
    report = pooling_ext.patch(resnet18())
    assert [(entry.path, entry.what) for entry in report.replaced[:4]] == [
        ("(root)", "conv1-bn1-relu-maxpool"),
        ("maxpool", "MaxPool2d"),
        ("layer1.0", "conv1-bn1-relu"),
        ("layer1.0", "conv2-bn2-add-relu"),
    ]
    entry = report.replaced[2]
    assert entry.why == "pooling_ext.functional.conv_bn_act"
    assert "layer2.0.downsample  Conv2d(0)-BatchNorm2d(1)" in str(report)
    assert "to fuse" not in str(report)


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


def test_patching_twice_and_unpatching_twice():
    model = small()
    report = pooling_ext.patch(model)
    again = pooling_ext.patch(model, strict=True)
    assert not again.replaced and len(again.skipped) == len(report.replaced) >= 4
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


def test_unpatch_restores_exactly():
    model = resnet18()
    plain = [(type(module), dict(module.__dict__)) for module in model.modules()]
    pooling_ext.patch(model)
    assert type(model) is not torchvision.models.ResNet and isinstance(model, torchvision.models.ResNet)
    assert repr(model) == repr(resnet18())
    pooling_ext.unpatch(model)
    assert [(type(module), module.__dict__) for module in model.modules()] == plain


def test_patching_a_fused_model_twice():
    model = resnet18()
    first = pooling_ext.patch(model)
    before = classes(model)
    again = pooling_ext.patch(model, strict=True)
    assert not again.replaced and len(again.skipped) == len(first.replaced)
    assert classes(model) == before
    # What was replaced since is patched then.
    model.layer1[0] = resnet18().layer1[0]
    assert [entry.path for entry in pooling_ext.patch(model).replaced] == ["layer1.0"] * 2
    assert classes(model) == before


def test_a_model_that_changed_is_planned_anew():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    pooling_ext.patch(model)
    model.append(nn.ReLU())
    (entry,) = pooling_ext.patch(model).replaced
    assert entry.what == "Conv2d(0)-BatchNorm2d(1)-ReLU(2)"
    pooling_ext.unpatch(model)
    assert type(model) is nn.Sequential


def test_nothing_changes_if_patch_fails(monkeypatch):
    from pooling_ext.patching import api

    model = resnet18()
    before = classes(model)
    set_class, calls = api._set_class, []

    def failing(module, cls):
        calls.append(cls)
        if len(calls) == 10:
            raise TypeError("__class__ assignment")
        set_class(module, cls)

    monkeypatch.setattr(api, "_set_class", failing)
    with pytest.raises(TypeError, match="assignment"):
        pooling_ext.patch(model)
    assert classes(model) == before
    assert not any("pooling_ext" in key for module in model.modules() for key in vars(module))


def test_unpatch_does_not_take_a_class_that_was_made_later():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    pooling_ext.patch(model)
    model.__class__ = type("Wrapped", (type(model),), {})
    with pytest.raises(ValueError, match=r"\(root\).*Wrapped"):
        pooling_ext.unpatch(model)
