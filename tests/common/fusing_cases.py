"""Blocks whose forwards patch rewrites, and what a test compares them by."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Children for the forwards below; subclasses differ in their forward only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.flag = False
        self.downsample = None
        self.layers = nn.ModuleList([nn.BatchNorm2d(4)])
        self.pair = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))


def block(forward, **members) -> nn.Module:
    cls = type("Net", (Block,), {"forward": forward, "__module__": __name__, **members})
    net = cls().double()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return net


def tensors(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [x for item in output for x in tensors(item)] if isinstance(output, (list, tuple)) else []


def run(net: nn.Module, *args, **kwargs):
    """The output, the inputs afterwards, the gradients and the buffers."""
    leaves = [x.clone().requires_grad_() for x in args if isinstance(x, Tensor)]
    copies = iter([leaf.clone() for leaf in leaves])  # a forward may write into its input
    args = [next(copies) if isinstance(x, Tensor) else x for x in args]
    net.zero_grad()
    output = net(*args, **kwargs)
    if any(x.requires_grad for x in tensors(output)):
        sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in tensors(output)).backward()
    grads = [x.grad for x in (*leaves, *net.parameters())]
    return output, [x.detach() for x in args if isinstance(x, Tensor)], grads, list(net.buffers())


def assert_equal(net: nn.Module, twin: nn.Module, *args, rtol: float = 1e-9, **kwargs) -> None:
    ours, theirs = run(net, *args, **kwargs), run(twin, *args, **kwargs)
    assert type(ours[0]) is type(theirs[0])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol / 100)


def batch(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 4, 6, 6)), dtype=torch.float64)


def residual_block(self, x):
    identity = x
    out = self.inplace(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    if self.downsample is not None:
        identity = self.downsample(x)
    out += identity
    return self.inplace(out)


def stem(self, x):
    return self.pool(self.act(self.bn1(self.conv1(x))))


def flags(self, x):
    x = self.act(self.bn1(self.conv1(x)))
    if self.flag:
        x = x * 2
    if self.training:
        x = x + 1
    if self.downsample is not None:
        x = self.downsample(x)
    for layer in self.layers:
        x = layer(x)
    return x
