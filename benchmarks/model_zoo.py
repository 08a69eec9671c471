"""The models that the suite "model" runs: torchvision's classifiers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from .suite import LAYOUTS


@dataclass(frozen=True)
class ModelCase:
    """A classifier by torchvision's name, with the batch size it is run in when families are compared."""

    name: str
    batch: int = 8


#: The smallest member of every family, or the one usually run.
FAMILIES = (
    ModelCase("alexnet"),
    ModelCase("vgg11", 4),
    ModelCase("vgg11_bn", 4),
    ModelCase("squeezenet1_1"),
    ModelCase("resnet18"),
    ModelCase("resnet50", 4),
    ModelCase("resnext50_32x4d", 4),
    ModelCase("wide_resnet50_2", 4),
    ModelCase("densenet121", 4),
    ModelCase("inception_v3", 4),
    ModelCase("googlenet"),
    ModelCase("mobilenet_v2"),
    ModelCase("mobilenet_v3_small"),
    ModelCase("shufflenet_v2_x0_5"),
    ModelCase("mnasnet0_5"),
    ModelCase("efficientnet_b0"),
    ModelCase("efficientnet_v2_s", 4),
    ModelCase("regnet_x_400mf"),
    ModelCase("regnet_y_400mf"),
    ModelCase("convnext_tiny", 4),
    ModelCase("swin_t", 4),
    ModelCase("maxvit_t", 4),
    ModelCase("vit_b_32", 4),
)

#: Pixels a side, and where they are others.
SIZE = 224
SIZES = {"inception_v3": 299, "efficientnet_v2_s": 384}


def known() -> list[ModelCase]:
    """All of torchvision's classifiers."""
    return [ModelCase(name) for name in torchvision.models.list_models(module=torchvision.models)]


def make(name: str, batch: int, layout: str) -> tuple[nn.Module, Tensor]:
    """A model with random weights, the same ones each time, and a batch of random images."""
    torch.manual_seed(0)
    extra = {"init_weights": True} if name in ("inception_v3", "googlenet") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initialisations that take long
        model = torchvision.models.get_model(name, **extra)
    size = SIZES.get(name, SIZE)
    images = torch.randn(batch, 3, size, size)
    format = LAYOUTS[layout]
    return model.to(memory_format=format), images.contiguous(memory_format=format)  # type: ignore[call-overload]
