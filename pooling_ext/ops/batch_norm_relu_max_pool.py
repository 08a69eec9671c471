"""Batch normalisation, ReLU and max pooling as one operator: the stem of a ResNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._dispatch import public
from .batch_norm_act import batch_norm_act
from .max_pool import max_pool2d


@public
def batch_norm_relu_max_pool(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    kernel_size: Any = 3,
    stride: Any = 2,
    padding: Any = 1,
    dilation: Any = 1,
    ceil_mode: bool = False,
    *,
    process_group: Any = None,
) -> Tensor:
    """``max_pool2d(relu(batch_norm(input)))`` without writing what is pooled.

    Arguments are those of :func:`batch_norm_act` and :func:`max_pool2d`.
    """
    output = batch_norm_act(
        input, running_mean, running_var, weight, bias, training, momentum, eps, process_group=process_group
    )
    return max_pool2d(output, kernel_size, stride, padding, dilation, ceil_mode)
