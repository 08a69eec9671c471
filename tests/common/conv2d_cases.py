"""What the tests of conv2d compare by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pooling_ext
from pooling_ext.ops import conv_choice, conv_speeds

#: Of the largest element, in float32.
ERROR = 5e-5


def off(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest element."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected.double()).abs().max() / expected.abs().max())


def always_winograd(monkeypatch: Any) -> None:
    """Winograd's kernels do what they can, though PyTorch's may be faster."""
    monkeypatch.setattr(conv_speeds, "speedup", lambda *_: (2.0, True))
    monkeypatch.setattr(conv_choice, "LEAST_WORK", 0)
    monkeypatch.setattr(conv_choice, "HAS_AMX", False)
    monkeypatch.setattr(conv_choice.Conv, "winograd_work", 0)  # though tiles be mostly empty


def taken(function, *args, **options) -> list[tuple[str, str]]:
    found = pooling_ext.explain(function, *args, **options).decisions
    return [(decision.op, decision.backend) for decision in found]


def gradients(function, *tensors: Tensor | None, **options) -> tuple[Tensor, ...]:
    """The output for copies of ``tensors`` that ask for gradients, then those."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    output = function(*leaves, **options)
    grad = (torch.arange(output.numel()) % 17 - 8).view(output.shape).to(output.dtype)
    output.backward(grad)
    return output.detach(), *(x.grad for x in leaves if x is not None)
