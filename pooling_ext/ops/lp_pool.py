"""Power-average (Lp) pooling: ``(sum of x ** p over the window) ** (1 / p)``.

Norms 1, 2 and 3 have kernels of their own; any other is composed of powers and average pooling.
As in PyTorch the power keeps its sign, so an odd norm of negative sums is NaN, and a window that
overhangs the input under ``ceil_mode`` is scaled up to a whole window's sum. ``safe=True`` pools
``|x| ** p`` instead, in float32 throughout, with gradient 0 where the output is 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .. import backends
from .._docstrings import pools
from ..arguments import as_float
from ..autograd import Differentiable, needs_autograd
from ..errors import ArgumentError
from ..windows import Windows, fixed_windows
from . import _library
from ._torch_function import public
from .avg_pool import FLOATS, avg_pool, spread
from .max_pool import max_pool

backends.register(
    "lp_pool", cpu=FLOATS, cuda=FLOATS, triton=FLOATS, triton_module="pooling_ext.triton.pool.lp_pool"
)

#: The norms 1 to this one have kernels.
_LARGEST_KERNEL_NORM = 3

_lp_pool_forward = _library.define(
    "lp_pool(Tensor input, {windows}, int norm_type, bool safe)",
    "Tensor",
    lambda input, output_size, *_: _library.empty(input, output_size),
)


def _lp_grad(
    grad: Tensor, input: Tensor, output: Tensor, channels_last: bool, windows: Windows, p: int, safe: bool
) -> Tensor:
    """Gradient of the input, written in differentiable operators so that it has one of its own.

    ``d output / d x = output ** (1 - p) * x ** (p - 1)``, scaled as the forward pass scales.
    """
    # PyTorch's formula ends in relu, whose gradient is 0 wherever the sum is 0.
    zero = output == 0
    if p > 1 and not safe and not torch.is_grad_enabled():
        # No one differentiates this, so infinities may come and go, and memory be used again.
        weighted = (output.pow(1 - p) * _window_size(windows, input) * grad).masked_fill_(zero, 0)
        shared = spread(weighted, input.shape, channels_last, windows, True, None)
        return shared.mul_(input if p == 2 else input.pow(p - 1))
    weighted = grad * _window_size(windows, input) * output.masked_fill(zero, 1).pow(1 - p)
    weighted = weighted.masked_fill(zero, 0)
    shared = spread(weighted, input.shape, channels_last, windows, True, None)
    if p == 1:
        return shared * input.sign() if safe else shared
    power = input if p == 2 else input.pow(p - 1)
    return shared * (power.abs() * input.sign() if safe and p % 2 else power)


def _window_size(windows: Windows, input: Tensor) -> int:
    if not windows.adaptive:
        return math.prod(windows.kernel_size)
    rank = len(windows.output_size)
    return math.prod(input.shape[input.dim() - rank :])


class _LPPool(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, windows: Windows, p: int, safe: bool) -> Tensor:
        return _lp_pool_forward(input, *windows, p, safe)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        input, *ctx.options = inputs
        ctx.channels_last = _library.keeps_channels_last(input, len(ctx.options[0].output_size))
        # The output may be overwritten before backward, as PyTorch's may.
        ctx.save_for_backward(input)
        ctx.save_for_forward(input, output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (input,) = ctx.saved_tensors
        windows, p, safe = ctx.options
        output = _lp_pool(input, windows, p, safe)  # of which second derivatives have need
        return _lp_grad(grads[0], input, output, ctx.channels_last, windows, p, safe), None, None, None


def _lp_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    input, output = ctx.saved_tensors
    windows, p, safe = ctx.options
    power = (input.abs() if safe else input).pow(p - 1) * (input.sign() if safe else 1)
    zero = output == 0
    weight = output.masked_fill(zero, 1).pow(1 - p).masked_fill(zero, 0) * _window_size(windows, input)
    return avg_pool(power * tangent, windows) * weight


_lp_pool = Differentiable(_LPPool, _lp_jvp)


def lp_pool(input: Tensor, norm_type: Any, windows: Windows, safe: bool = False) -> Tensor:
    """Pool ``input`` over ``windows`` by its ``norm_type`` norm."""
    if type(norm_type) not in (int, float):
        if isinstance(norm_type, Tensor) and (norm_type.requires_grad or norm_type.dim() > 0):
            return _composed_lp_pool(input, _checked_norms(norm_type, input), windows, safe)
        norm_type = _checked_norm(norm_type)
    if norm_type == 0:
        raise ArgumentError(f"norm_type must be a non-zero value, but got {norm_type}")
    if norm_type == math.inf:
        return max_pool(input.abs(), windows)
    if norm_type == -math.inf:
        return -max_pool(-input.abs(), windows)
    p = int(norm_type) if 1 <= norm_type <= _LARGEST_KERNEL_NORM else 0
    chosen = backends.choose_pool("lp_pool", input, windows)
    if chosen is backends.ATEN or p != norm_type:
        return _composed_lp_pool(input, float(norm_type), windows, safe)
    if not input.is_contiguous():
        if 0 in input.stride():
            # What PyTorch pools is a power, which is not expanded and keeps the order of the axes.
            input = input.clone()
        if len(windows.output_size) == 1 and _library.is_channels_last_1d(input):
            return lp_pool(input.unsqueeze(-2), norm_type, windows.flat, safe).squeeze(-2)
    if needs_autograd(input):
        return _lp_pool(input, windows, p, safe)
    return _lp_pool_forward(input, *windows, p, safe)


def _checked_norm(norm_type: Any) -> Any:
    """A number that is not one of Python's, as one."""
    if isinstance(norm_type, bool) or getattr(norm_type, "dtype", None) in (torch.bool, "bool"):
        raise TypeError(f"norm_type must be a number, but got {norm_type!r}")
    return as_float(norm_type, "norm_type")


def _checked_norms(norm_type: Tensor, input: Tensor) -> Tensor:
    """A norm that is learned, or differs from place to place."""
    if norm_type.is_complex() or norm_type.dtype == torch.bool:
        raise TypeError(f"norm_type must be a number, but got {norm_type.dtype}")
    if norm_type.device != input.device and (norm_type.dim() > 0 or norm_type.is_meta):
        raise ArgumentError(
            f"norm_type must be on input's device {input.device}, but got one on {norm_type.device}"
        )
    rest = zip(reversed(norm_type.shape), reversed(input.shape), strict=False)
    if norm_type.dim() > input.dim() or any(size not in (1, whole) for size, whole in rest):
        raise ArgumentError(
            f"norm_type must be a number, or broadcast to input's shape {tuple(input.shape)}, but got "
            f"{tuple(norm_type.shape)}"
        )
    return norm_type


def _composed_lp_pool(input: Tensor, p: Any, windows: Windows, safe: bool) -> Tensor:
    size = _window_size(windows, input)
    if not safe:
        mean = avg_pool(input.pow(p), windows)
        return (mean.sign() * mean.abs().relu()).mul(size).pow(1 / p)
    wide = input if input.dtype == torch.float64 else input.float()
    magnitude = wide.abs()
    zero = magnitude == 0
    # The zeros are taken out before the powers, so that no infinite slope meets a zero gradient.
    # By where(): masked_fill() makes its result contiguous.
    power = torch.where(zero, 1.0, magnitude).pow(p)
    of_zero = (
        torch.where(p > 0, 0.0, math.inf).to(power.dtype)
        if isinstance(p, Tensor)
        else 0.0
        if p > 0
        else math.inf
    )
    power = torch.where(zero, of_zero, power)
    total = avg_pool(power, windows) * size
    flat = (total == 0) | total.isinf()
    root = torch.where(flat, 1.0, total).pow(1 / p)
    limit = total.detach().pow(1 / p)
    return torch.where(flat, limit, root).to(input.dtype)


@public
@pools("lp_pool", rank=2)
def lp_pool2d(
    input: Tensor,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
    *,
    padding: Any = 0,
    safe: bool = False,
) -> Tensor:
    """Power-average pooling over 2-d planes; a drop-in for :func:`torch.nn.functional.lp_pool2d`.

    An output is ``(sum of x ** p over the window) ** (1 / p)``.
    """
    windows = fixed_windows(2, input.shape, kernel_size, stride, padding, 1, ceil_mode)
    return lp_pool(input, norm_type, windows, safe)


@public
@pools("lp_pool", rank=1)
def lp_pool1d(
    input: Tensor,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
    *,
    padding: Any = 0,
    safe: bool = False,
) -> Tensor:
    """Power-average pooling over sequences; a drop-in for :func:`torch.nn.functional.lp_pool1d`.

    An output is ``(sum of x ** p over the window) ** (1 / p)``.
    """
    windows = fixed_windows(1, input.shape, kernel_size, stride, padding, 1, ceil_mode)
    return lp_pool(input, norm_type, windows, safe)


@public
@pools("lp_pool", rank=3)
def lp_pool3d(
    input: Tensor,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
    *,
    padding: Any = 0,
    safe: bool = False,
) -> Tensor:
    """Power-average pooling over 3-d volumes; a drop-in for :func:`torch.nn.functional.lp_pool3d`.

    An output is ``(sum of x ** p over the window) ** (1 / p)``.
    """
    windows = fixed_windows(3, input.shape, kernel_size, stride, padding, 1, ceil_mode)
    return lp_pool(input, norm_type, windows, safe)
