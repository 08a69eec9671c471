"""Batch norms that go on with an activation, as other libraries have them, and blocks made of them."""

from __future__ import annotations

import torch
import torch.nn.functional as TF
from torch import nn


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the batch norm is written out, then come modules."""

    def __init__(self, channels: int, act: nn.Module | None = None, **options):
        super().__init__(channels, **options)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        batch_statistics = self.training or (self.running_mean is None and self.running_var is None)
        x = TF.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            batch_statistics,
            factor,
            self.eps,
        )
        return self.act(self.drop(x))


class InheritedNormAct(nn.BatchNorm2d):
    def forward(self, input):
        return TF.relu(super().forward(input), inplace=True)


class SyncNormAct(nn.SyncBatchNorm):
    """As timm's SyncBatchNormAct."""

    def forward(self, x):
        x = super().forward(x)
        if hasattr(self, "act"):
            x = self.act(x)
        return x


class Scaled(nn.BatchNorm2d):
    """Not a batch norm and an activation."""

    def forward(self, input):
        return super().forward(input) * 2.0


class OtherMomentum(NormAct):
    """Not torch.nn's batch norm."""

    def forward(self, x):
        y = TF.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.5, self.eps
        )
        return self.act(y)


class Uncounted(NormAct):
    """As OtherMomentum, but for the counter alone."""

    def forward(self, x):
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return self.act(TF.batch_norm(x, *statistics, self.training, self.momentum, self.eps))


class DropPath(nn.Module):
    """As timm's: does nothing for a probability of 0."""

    def __init__(self, probability: float = 0.0):
        super().__init__()
        self.probability = probability

    def forward(self, x):
        if self.probability == 0.0 or not self.training:
            return x
        kept = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.probability)
        return x * kept / (1 - self.probability)


class Block(nn.Module):
    """A residual block with all that stands between its steps in other libraries."""

    def __init__(self, norm=NormAct):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.space = nn.Identity()
        self.bn1 = norm(8)
        self.aa = nn.Identity()
        self.conv2 = nn.Conv2d(8, 4, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.drop_block = nn.Dropout2d(0.0)
        self.drop_path = DropPath()
        self.act2 = nn.ReLU()

    def forward(self, x):
        y = self.aa(self.bn1(self.space(self.conv1(x))))
        y = self.drop_path(self.drop_block(self.bn2(self.conv2(y))))
        return self.act2(y + x)


def settled(net: nn.Module) -> nn.Module:
    """In float64, with statistics and parameters that are not the initial ones."""
    net = net.double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return net


def with_drop(norm, probability):
    norm.drop = nn.Dropout2d(probability)
    return norm


class Untraceable(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), norm

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.norm(self.conv(x))
