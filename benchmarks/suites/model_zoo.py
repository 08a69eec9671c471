"""The models that the suite "model" runs: torchvision's classifiers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from ..harness.suite import LAYOUTS


@dataclass(frozen=True)
class ModelCase:
    """A classifier by torchvision's name, and what it is run on when families are compared.

    Attributes:
        batch: images.
        size: pixels a side; fewer than usual, which leaves calls a larger share and takes less time.
    """

    name: str
    batch: int = 4
    size: int = 160


#: The smallest member of every family, or the one usually run.
FAMILIES = (
    ModelCase("alexnet"),
    ModelCase("vgg11", 2, 96),
    ModelCase("vgg11_bn", 2, 96),
    ModelCase("squeezenet1_1"),
    ModelCase("resnet18", 4, 128),
    ModelCase("resnet50", 4, 96),
    ModelCase("resnext50_32x4d", 4, 96),
    ModelCase("wide_resnet50_2", 4, 64),
    ModelCase("densenet121", 4, 96),
    ModelCase("inception_v3", 2, 299),  # its auxiliary head takes no less
    ModelCase("googlenet", 4, 128),
    ModelCase("mobilenet_v2"),
    ModelCase("mobilenet_v3_small"),
    ModelCase("mobilenet_v3_large"),
    ModelCase("shufflenet_v2_x0_5"),
    ModelCase("mnasnet0_5"),
    ModelCase("efficientnet_b0"),
    ModelCase("efficientnet_v2_s", 4, 128),
    ModelCase("regnet_x_400mf"),
    ModelCase("regnet_y_400mf"),
    ModelCase("convnext_tiny", 4, 96),
    ModelCase("swin_t", 4, 96),
    ModelCase("maxvit_t", 2, 224),  # these two take no other
    ModelCase("vit_b_32", 2, 224),
)

#: Pixels a side elsewhere, and where they are others.
SIZE = 224
SIZES = {"inception_v3": 299, "efficientnet_v2_s": 384}


def known() -> list[ModelCase]:
    """All of torchvision's classifiers."""
    return [ModelCase(name) for name in torchvision.models.list_models(module=torchvision.models)]


def make(name: str, batch: int, layout: str, size: int | None = None) -> tuple[nn.Module, Tensor]:
    """A model with random weights, the same ones each time, and a batch of random images.

    ``size`` is their pixels a side, of which the model decides otherwise.
    """
    torch.manual_seed(0)
    extra = {"init_weights": True} if name in ("inception_v3", "googlenet") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of initializations that take long
        model = torchvision.models.get_model(name, **extra)
    size = size or SIZES.get(name, SIZE)
    images = torch.randn(batch, 3, size, size)
    format = LAYOUTS[layout]
    return model.to(memory_format=format), images.contiguous(memory_format=format)  # type: ignore[call-overload]
