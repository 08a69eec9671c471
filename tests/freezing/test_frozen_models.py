"""freeze: the same results as the model in eval mode, on every family of torchvision."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from freezing_cases import build, error, layers, randomize, run
from torch import nn

import pooling_ext
from pooling_ext.freezing.layers import FrozenBatchNormAct, PackedConv, PackedLinear
from pooling_ext.graph.activations import RELU

FAMILIES = [
    "alexnet",
    "vgg11",
    "vgg11_bn",
    "squeezenet1_1",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "densenet121",
    "inception_v3",
    "googlenet",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "efficientnet_b0",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "convnext_tiny",
]

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_poison]


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model = build(name).eval()
    size = 75 if name == "inception_v3" else 64
    x = torch.randn(2, 3, size, size)
    exact = run(copy.deepcopy(model).double(), x.double())
    frozen = pooling_ext.freeze(model, x)
    actual = run(frozen, x)
    assert actual.dtype == torch.float32 and not actual.requires_grad
    assert error(actual, exact) < max(4 * error(run(model, x), exact), 5e-6)
    for batch in (1, 3):  # other batch sizes than the example's
        more = torch.randn(batch, 3, size, size)
        torch.testing.assert_close(
            run(frozen, more), run(model, more), rtol=1e-3, atol=1e-4 * exact.abs().max().item()
        )
    assert not frozen.report.skipped
    assert not [m for m in frozen.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    low = pooling_ext.freeze(model, x, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = run(model, x)
    bound = max(error(run(copy.deepcopy(model).bfloat16(), x.bfloat16()), exact), error(autocast, exact))
    assert error(run(low, x), exact) < 2 * bound
    assert run(low, x).dtype == torch.float32
    assert run(low, x.bfloat16()).dtype == torch.bfloat16


def test_everything_of_a_resnet_is_folded():
    frozen = pooling_ext.freeze(build("resnet50"), torch.randn(1, 3, 64, 64))
    convs = layers(frozen, PackedConv)
    assert len(convs) == 53 and len(layers(frozen, PackedLinear)) == 1
    if all(conv.packed for conv in convs):
        assert sum(conv.residual == "overwrite" for conv in convs) == 16
    assert sum(conv.activation is None for conv in convs) == 4  # the downsampling ones
    assert all(conv.bias is not None for conv in convs)
    assert not layers(frozen, nn.ReLU)
    text = str(frozen.report)
    assert "to fuse" not in text
    assert "layer1.0.conv3" in text and "BatchNorm2d layer1.0.bn3, add, relu" in text
    assert "layer4.2.conv3" in repr(frozen) and "Frozen(ResNet, float32)" in repr(frozen)


def test_norm_before_convolution_stays_one_pass():
    frozen = pooling_ext.freeze(build("densenet121"), torch.randn(1, 3, 64, 64))
    norms = layers(frozen, FrozenBatchNormAct)
    assert len(norms) == 62 and all(norm.activation == RELU for norm in norms[:-1])


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large"])
def test_segmentation(name):
    model = randomize(
        torchvision.models.get_model(name, weights=None, weights_backbone=None, aux_loss=None)
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    expected, actual = run(model, x), run(pooling_ext.freeze(model, x), x)
    assert type(actual) is type(expected) and list(actual) == list(expected)
    assert error(actual["out"], expected["out"].double()) < 1e-4


def test_detection_is_frozen_in_parts():
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, min_size=96, max_size=128
    ).eval()
    images = [torch.rand(3, 96, 128), torch.rand(3, 80, 96)]
    frozen = pooling_ext.freeze(model, (images,))
    expected, actual = run(model, images), run(frozen, images)
    for one, other in zip(actual, expected, strict=True):
        assert one["boxes"].shape == other["boxes"].shape
        torch.testing.assert_close(one["boxes"], other["boxes"], rtol=1e-2, atol=1e-1)
    assert frozen.report.skipped[0].path == "(root)" and "traced" in frozen.report.skipped[0].why
    assert len(layers(frozen, PackedConv)) > 53
    assert any(entry.path == "backbone.body.conv1" for entry in frozen.report.replaced)
