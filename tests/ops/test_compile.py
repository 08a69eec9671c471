"""Pools in whole models under Inductor, torch.export and autocast, beyond test_opspec_compile.py."""

from __future__ import annotations

import pytest
import torch
from helpers import gradient
from torch import nn

import pooling_ext
import pooling_ext.functional as F

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def inputs(*shape: int) -> torch.Tensor:
    return torch.rand(shape) + 0.1


@pytest.mark.native
def test_compiled_by_inductor():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        pooling_ext.MaxPool2d(3, 2, 1),
        pooling_ext.AvgPool2d(2, ceil_mode=True),
        pooling_ext.GlobalAvgPool2d(keepdim=False),
    )
    compiled = torch.compile(model, fullgraph=True)
    for x in (inputs(2, 3, 20, 22), inputs(2, 3, 20, 22).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(gradient(compiled, x), gradient(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.native
def test_compiled_with_ceil_mode_gradients_in_inductor():
    """A place where Inductor's own average pooling has had silently wrong gradients."""

    def pool(x):
        return F.avg_pool2d(x, 3, 2, 1, ceil_mode=True)

    x = inputs(1, 2, 6, 8)
    actual = gradient(torch.compile(pool, fullgraph=True), x)
    torch.testing.assert_close(actual, gradient(lambda x: nn.functional.avg_pool2d(x, 3, 2, 1, True), x))


def test_export_with_a_dynamic_batch():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pools = nn.Sequential(pooling_ext.MaxPool2d(3, 2, 1), pooling_ext.AdaptiveAvgPool2d(2))

        def forward(self, x):
            return self.pools(x)

    model = Model()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (inputs(2, 3, 9, 11),), dynamic_shapes={"x": {0: batch}})
    for size in (2, 7):
        x = inputs(size, 3, 9, 11)
        # Not to the last bit: adaptive pooling of known sizes is PyTorch's in a program.
        torch.testing.assert_close(program.module()(x), model(x))


def test_compiled_patched_model_under_autocast():
    from torchvision.models import squeezenet1_1

    model = squeezenet1_1(weights=None).eval()
    x = inputs(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        pooling_ext.patch(model)
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
