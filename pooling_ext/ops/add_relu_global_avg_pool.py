"""Residual add, ReLU and global average pooling as one operator: the tail of a ResNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._dispatch import public
from .global_pool import global_avg_pool2d


@public
def add_relu_global_avg_pool(input: Tensor, residual: Tensor, keepdim: bool = True) -> Tensor:
    """Mean of each plane of ``relu(input + residual)``, which is never written.

    Args:
        input: ``(N, C, H, W)``; float32, float64, bfloat16 or float16.
        residual: the input's shape and dtype.
        keepdim: return ``(N, C, 1, 1)`` if true, ``(N, C)`` if false.
    """
    return global_avg_pool2d(F.relu(input + residual), keepdim)
