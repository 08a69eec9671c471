"""Torchvision's models give the same patched as unpatched, in training and in evaluation."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FrozenBatchNorm2d

import pooling_ext


def classifier(name: str, head: str | None = None, **options: Any) -> nn.Module:
    """A model by its name; ``head`` is the path of a large last layer that is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    if head is not None:
        setattr(model, head, nn.Sequential(nn.Dropout(), nn.LazyLinear(4)))
    return model


def inception() -> nn.Module:
    model = classifier("inception_v3", init_weights=False)
    # So that the auxiliary output works for small images.
    model.AuxLogits.conv1 = torchvision.models.inception.BasicConv2d(128, 768, kernel_size=1)
    return model


def vgg(batch_norm: bool) -> nn.Module:
    features = torchvision.models.vgg.make_layers([16, "M", 32, "M", 64, 64, "M"], batch_norm)
    model = torchvision.models.VGG(features)
    model.classifier = nn.Sequential(nn.Dropout(), nn.LazyLinear(4))
    return model


def resnet(**options: Any) -> nn.Module:
    block = torchvision.models.resnet.Bottleneck
    return torchvision.models.ResNet(block, [2, 1, 1, 1], num_classes=4, **options)


def convnext() -> nn.Module:
    stages = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    return torchvision.models.ConvNeXt(stages, num_classes=4)


def on_resnet18(model: Any, head: Any, auxiliary: Any = None) -> nn.Module:
    """A segmentation model; torchvision's builders take ResNet-50 at least."""
    layers = {"layer4": "out", "layer3": "aux"} if auxiliary else {"layer4": "out"}
    backbone = IntermediateLayerGetter(classifier("resnet18"), layers)
    return model(backbone, head(512, 3), auxiliary and auxiliary(256, 3))


#: A small member of each family: how to make it, the image's size, and how many chains and how many
#: pooling modules and functions are replaced.
MODELS: dict[str, tuple[Any, int, int, int]] = {
    "alexnet": (lambda: classifier("alexnet", "classifier"), 64, 0, 4),
    "vgg": (lambda: vgg(False), 32, 0, 4),
    "vgg_bn": (lambda: vgg(True), 32, 4, 4),
    "squeezenet1_1": (lambda: classifier("squeezenet1_1"), 64, 0, 4),
    "resnet18": (lambda: classifier("resnet18"), 64, 20, 2),
    "bottlenecks": (resnet, 32, 20, 2),
    "resnext": (lambda: resnet(groups=32, width_per_group=4), 32, 20, 2),
    "densenet121": (lambda: classifier("densenet121"), 32, 121, 5),
    "googlenet": (lambda: classifier("googlenet", init_weights=False), 64, 59, 16),
    "inception_v3": (inception, 107, 96, 16),
    "mobilenet_v2": (lambda: classifier("mobilenet_v2"), 32, 52, 1),
    "mobilenet_v3_small": (lambda: classifier("mobilenet_v3_small"), 32, 34, 10),
    "shufflenet_v2_x0_5": (lambda: classifier("shufflenet_v2_x0_5"), 64, 56, 1),
    "mnasnet0_5": (lambda: classifier("mnasnet0_5"), 32, 52, 0),
    "efficientnet_b0": (lambda: classifier("efficientnet_b0"), 32, 49, 17),
    "regnet_x_400mf": (lambda: classifier("regnet_x_400mf"), 32, 71, 1),
    "regnet_y_400mf": (lambda: classifier("regnet_y_400mf"), 32, 53, 17),
    "convnext": (convnext, 32, 0, 1),
    "fcn": (lambda: on_resnet18(segmentation.fcn.FCN, FCNHead, FCNHead), 32, 22, 1),
    "deeplabv3": (lambda: on_resnet18(segmentation.deeplabv3.DeepLabV3, DeepLabHead), 32, 27, 2),
    "lraspp": (lambda: segmentation.lraspp_mobilenet_v3_large(weights_backbone=None), 32, 47, 9),
}


def tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output or ()
    return [x for value in values for x in tensors(value)]


def step(model: nn.Module, *args: Any) -> tuple[Any, list[Tensor | None], list[Tensor]]:
    """Output, gradients and buffers of one forward and backward pass."""
    torch.manual_seed(1)  # dropout, stochastic depth, sampled proposals
    model.zero_grad()
    output = model(*args)
    losses = [
        (x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view(x.shape)).sum() for x in tensors(output)
    ]
    sum(losses).backward()
    return output, [p.grad for p in model.parameters()], list(model.buffers())


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal to a tolerance that is relative to each tensor's largest element."""
    assert type(ours[0]) is type(theirs[0])
    ours, theirs = (tensors(ours[0]), *ours[1:]), (tensors(theirs[0]), *theirs[1:])
    for one, other in zip(ours, theirs, strict=True):
        sizes = [float(y.detach().abs().max()) if y is not None and y.numel() else 0.0 for y in other]
        for x, y, size in zip(one, other, sizes, strict=True):
            assert (x is None) == (y is None)
            if x is not None:  # some gradients are 0 but for rounding, beside others that are not
                torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9 * size + 1e-13 * max(sizes))


def counts(report: pooling_ext.PatchReport) -> tuple[int, int]:
    """How many chains, and how many pooling modules and functions, were replaced; convolutions aside."""
    fused = ("conv_bn_act", "batch_norm_act", "batch_norm_relu_max_pool", "add_relu_global_avg_pool")
    found = sum(entry.why.endswith(fused) for entry in report.replaced)
    convs = sum(entry.why.endswith("Conv2d") for entry in report.replaced)
    return found, len(report.replaced) - found - convs


@pytest.mark.parametrize("name", MODELS)
def test_same_as_unpatched(name, monkeypatch):
    build, size, norms, pools = MODELS[name]
    torch.manual_seed(0)
    model = build().double()
    # Batch norms over few values would magnify rounding.
    x = torch.randn(8 if size < 64 else 4, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        model.eval()(x)  # lazy layers
    plain = [(type(module), dict(module.__dict__)) for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    twin = copy.deepcopy(model)

    report = pooling_ext.patch(model, strict=True)
    assert counts(report) == (norms, pools)
    assert report.batch_norms == report.batch_norms_fused == norms
    assert ("to fuse" in str(report)) == (norms == 0)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    called: list[nn.Module] = []
    forward = nn.BatchNorm2d.forward
    for training in (True, False):
        model.train(training), twin.train(training)
        with monkeypatch.context() as context:
            # No batch norm runs by itself.
            context.setattr(nn.BatchNorm2d, "forward", lambda m, x: (called.append(m), forward(m, x))[1])
            ours = step(model, x)
        assert not called
        assert_same(ours, step(twin, x))
    with torch.no_grad():
        torch.testing.assert_close(tensors(model(x)), tensors(twin(x)), rtol=1e-7, atol=1e-9)
    pooling_ext.unpatch(model)
    for module, (cls, fields) in zip(model.modules(), plain, strict=True):
        fields["training"] = False
        assert type(module) is cls and module.__dict__ == fields


@pytest.mark.native
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", MODELS)
def test_with_every_kernel(name, layout, convolutions_of_any_size):
    """Every convolution that has kernels here runs on them: training as accurate as unpatched."""
    build, size, *_ = MODELS[name]
    torch.manual_seed(0)
    model = build()
    x = torch.randn(8 if size < 64 else 4, 3, size, size).to(memory_format=layout)
    with torch.no_grad():
        model.eval()(x)  # lazy layers
    model.train().to(memory_format=layout)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    pooling_ext.patch(model, strict=True)
    (ours, our_grads, _), (theirs, their_grads, _) = step(model, x), step(eager, x)
    wanted, wanted_grads, _ = step(exact, x.double())
    assert error(tensors(ours), tensors(wanted)) < max(10 * error(tensors(theirs), tensors(wanted)), 1e-4)
    # Rounding moves a few elements across ReLU's corner, where gradients jump.
    assert error(our_grads, wanted_grads) < max(20 * error(their_grads, wanted_grads), 0.02)


def error(found: list[Any], wanted: list[Any]) -> float:
    """The norm of what is off, relative to all of them."""
    pairs = [(a.double(), b) for a, b in zip(found, wanted, strict=True) if b is not None]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    return (off / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
)
RESNETS += ("resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2")
OTHERS = ("densenet161", "densenet169", "densenet201", "vgg16_bn", "mobilenet_v3_large", "shufflenet_v2_x2_0")
OTHERS += ("mnasnet1_3", "efficientnet_v2_s", "efficientnet_b4")


@pytest.mark.parametrize("name", [*RESNETS, *OTHERS])
def test_every_batch_norm_is_in_a_chain(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    report = pooling_ext.patch(model, strict=True)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert counts(report)[0] == report.batch_norms == report.batch_norms_fused == norms
    if name in RESNETS:
        added = sum("-add-relu" in entry.what for entry in report.replaced)
        assert added == sum(len(getattr(model, f"layer{i}")) for i in range(1, 5))


@pytest.mark.parametrize("norm_layer", [FrozenBatchNorm2d, nn.BatchNorm2d])
def test_detection(norm_layer):
    """Losses and gradients in training, boxes in evaluation."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=norm_layer, trainable_layers=5
    )
    options = {"min_size": 64, "max_size": 64, "rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 50}
    model = FasterRCNN(backbone, num_classes=3, **options)
    twin = copy.deepcopy(model)
    # By the direct convolution, so that no maximum or ReLU is decided by its rounding.
    report = pooling_ext.patch(model, strict=True, exact=True)
    frozen = norm_layer is FrozenBatchNorm2d
    assert counts(report)[0] == (0 if frozen else 20)
    assert "backbone.body.maxpool" in [entry.path for entry in report.replaced]
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    boxes = torch.tensor([[4.0, 4.0, 30.0, 30.0], [20.0, 10.0, 60.0, 40.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])}] * 2
    results = []
    for net in (model, twin):
        torch.manual_seed(1)
        losses = net.train()(images, targets)
        sum(losses.values()).backward()
        with torch.no_grad():
            results.append((losses, [p.grad for p in net.parameters()], net.eval()(images)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-4)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * (float(other.abs().max()) + 1e-3))
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-3, atol=1e-3)


def test_checkpointing_inside_a_model():
    """DenseNet's memory_efficient layers keep their own forward, as a trace would lose the checkpoints."""
    torch.manual_seed(0)
    options = {"growth_rate": 4, "block_config": (2, 1), "num_init_features": 8, "memory_efficient": True}
    model = torchvision.models.DenseNet(**options).double()
    twin = copy.deepcopy(model)
    report = pooling_ext.patch(model)
    assert [entry.what for entry in report.skipped] == ["_DenseLayer"] * 3
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    assert_same(step(model, x), step(twin, x))


def test_attributes_that_choose_a_path():
    """GoogLeNet's forward looks at aux_logits and transform_input each time."""
    torch.manual_seed(0)
    model = classifier("googlenet", init_weights=False, aux_logits=False).double().eval()
    twin = copy.deepcopy(model)
    pooling_ext.patch(model)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    for net in (model, twin):
        net.transform_input = True
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x))
        model.transform_input = False
        assert not torch.allclose(model(x), twin(x))
