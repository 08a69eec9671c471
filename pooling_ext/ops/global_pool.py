"""Global pooling: one window over each plane, the head of most CNNs."""

from __future__ import annotations

from torch import Tensor

from ..windows import global_windows
from ._dispatch import public
from .avg_pool import avg_pool
from .lp_pool import lp_pool
from .max_pool import max_pool


@public
def global_avg_pool2d(input: Tensor, keepdim: bool = True) -> Tensor:
    """Mean of each plane, summed in float32 (float64 for float64).

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``; float32, float64, bfloat16 or float16, in any memory format.
        keepdim: return ``(N, C, 1, 1)`` if true, ``(N, C)`` if false.

    Raises:
        TypeError: the input is not a tensor.
        ArgumentError: the input's shape is out of range.
    """
    return _squeeze(avg_pool(input, global_windows(2, input.shape)), keepdim)


@public
def global_max_pool2d(input: Tensor, keepdim: bool = True) -> Tensor:
    """Maximum of each plane; arguments as :func:`global_avg_pool2d`, integer dtypes too."""
    return _squeeze(max_pool(input, global_windows(2, input.shape)), keepdim)


@public
def global_lp_pool2d(input: Tensor, norm_type: float, keepdim: bool = True, *, safe: bool = False) -> Tensor:
    """``norm_type`` norm of each plane; see :func:`lp_pool2d` and :func:`global_avg_pool2d`."""
    return _squeeze(lp_pool(input, norm_type, global_windows(2, input.shape), safe), keepdim)


def _squeeze(pooled: Tensor, keepdim: bool) -> Tensor:
    return pooled if keepdim else pooled.flatten(-3)
