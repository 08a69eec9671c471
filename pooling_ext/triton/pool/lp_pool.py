"""Power-average pooling in Triton; the operator is defined in pooling_ext/ops/lp_pool.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .avg_pool import pool_means

Ints = Sequence[int]


def lp_pool(
    input: Tensor,
    output_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    norm_type: int,
    safe: bool,
) -> Tensor:
    """The ``norm_type`` norms of all windows."""
    windows = (output_size, kernel_size, stride, padding, dilation)
    return pool_means(input, windows, norm=norm_type, magnitude=safe)
