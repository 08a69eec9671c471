"""Global pooling: one window over each plane, the head of most CNNs."""

from __future__ import annotations

from torch import Tensor

from ..windows import global_windows
from ._torch_function import public
from .avg_pool import avg_pool
from .lp_pool import lp_pool
from .max_pool import max_pool


@public
def global_avg_pool2d(input: Tensor, keepdim: bool = True) -> Tensor:
    """The mean of each plane, summed in float32 (float64 for float64).

    Args:
        input: a tensor, see Shape; float32, float64, bfloat16 or float16; any strides.
        keepdim: keep the two axes that are pooled, with size 1.

    Shape:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        output: ``(N, C, 1, 1)`` or ``(C, 1, 1)``; without ``keepdim`` ``(N, C)`` or ``(C,)``.

    Returns:
        A tensor of the input's dtype.

    Raises:
        TypeError: the input is not a tensor.
        ArgumentError: the input's shape is out of range.

    Example:
        >>> F.global_avg_pool2d(torch.arange(8.0).reshape(1, 2, 2, 2), keepdim=False)
        tensor([[1.5000, 5.5000]])
    """
    return _squeeze(avg_pool(input, global_windows(2, input.shape)), keepdim)


@public
def global_max_pool2d(input: Tensor, keepdim: bool = True) -> Tensor:
    """The maximum of each plane.

    Args:
        input: a tensor, see Shape; float32, float64, bfloat16, float16 or an integer dtype; any strides.
        keepdim: keep the two axes that are pooled, with size 1.

    Shape:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        output: ``(N, C, 1, 1)`` or ``(C, 1, 1)``; without ``keepdim`` ``(N, C)`` or ``(C,)``.

    Returns:
        A tensor of the input's dtype.

    Raises:
        TypeError: the input is not a tensor.
        ArgumentError: the input's shape is out of range.

    Example:
        >>> F.global_max_pool2d(torch.arange(8.0).reshape(1, 2, 2, 2), keepdim=False)
        tensor([[3., 7.]])
    """
    return _squeeze(max_pool(input, global_windows(2, input.shape)), keepdim)


@public
def global_lp_pool2d(input: Tensor, norm_type: float, keepdim: bool = True, *, safe: bool = False) -> Tensor:
    """The ``norm_type`` norm of each plane; :func:`lp_pool2d` with one window.

    Args:
        input: a tensor, see Shape; float32, float64, bfloat16 or float16; any strides.
        norm_type: the norm p, not 0; ``inf`` is the largest and ``-inf`` the smallest ``|x|``.
        keepdim: keep the two axes that are pooled, with size 1.
        safe: pool ``|x| ** p`` in float32, with a finite gradient at 0.

    Shape:
        input: ``(N, C, H, W)`` or ``(C, H, W)``.
        output: ``(N, C, 1, 1)`` or ``(C, 1, 1)``; without ``keepdim`` ``(N, C)`` or ``(C,)``.

    Returns:
        A tensor of the input's dtype.

    Raises:
        TypeError: an argument has the wrong type.
        ArgumentError: ``norm_type`` or the input's shape is out of range.

    Example:
        >>> F.global_lp_pool2d(torch.arange(8.0).reshape(1, 2, 2, 2), 1, keepdim=False)
        tensor([[ 6., 22.]])
    """
    return _squeeze(lp_pool(input, norm_type, global_windows(2, input.shape), safe), keepdim)


def _squeeze(pooled: Tensor, keepdim: bool) -> Tensor:
    return pooled if keepdim else pooled.flatten(-3)
