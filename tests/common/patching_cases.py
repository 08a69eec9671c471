"""Models for patch, and what tells which classes they have."""

from __future__ import annotations

import torchvision
from torch import nn


def resnet18():
    return torchvision.models.resnet18(weights=None, num_classes=10)


def small_resnet():
    """For comparisons in training; batch norms over few values magnify rounding, so give it 4 x 64 x 64."""
    block = torchvision.models.resnet.BasicBlock
    return torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10).double()


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
