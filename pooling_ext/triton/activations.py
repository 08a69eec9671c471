# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportInvalidTypeForm=false
"""Activations and their derivatives in Triton, in float32 or float64.

The functions are PyTorch's, NaN and infinities included. ``ACTIVATION`` is one of
:data:`pooling_ext.ops.activations.ACTIVATIONS`, so that a kernel is compiled for each one that is used.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: 2 * sqrt(2 / pi)
_TWICE_ROOT = tl.constexpr(1.59576912160573071176)


@triton.jit
def activated(x, slope, ACTIVATION: tl.constexpr):
    """The activation of ``x``; ``slope`` is that of leaky_relu for negative numbers."""
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu6":
        return _up_to_six(x)
    elif ACTIVATION == "silu":
        share, _slope = _logistic(x)
        return x * share
    elif ACTIVATION == "hardswish":
        return x * (_up_to_six(x + 3.0) * (1.0 / 6.0))
    elif ACTIVATION == "leaky_relu":
        return tl.where(x > 0.0, x, x * tl.full(x.shape, slope, x.dtype))
    elif ACTIVATION == "gelu":
        return x * _normal_share(x)
    elif ACTIVATION == "gelu_tanh":
        share, _slope = _logistic(_twice_gelu_argument(x))
        return x * share
    elif ACTIVATION == "hardsigmoid":
        return _up_to_six(x + 3.0) * (1.0 / 6.0)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x


@triton.jit
def gradient(x, grad, slope, ACTIVATION: tl.constexpr):
    """``grad`` times the derivative of :func:`activated` at ``x``.

    Where the derivative is 0 nothing passes, be it infinite.
    """
    if ACTIVATION == "identity":
        return grad
    elif ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, grad)
    elif ACTIVATION == "relu6":
        return tl.where((x <= 0.0) | (x >= 6.0), 0.0, grad)
    elif ACTIVATION == "hardsigmoid":
        return tl.where((x > -3.0) & (x < 3.0), grad * (1.0 / 6.0), 0.0)
    elif ACTIVATION == "leaky_relu":
        factor = tl.full(x.shape, slope, x.dtype)
        return tl.where(x > 0.0, grad, tl.where(factor == 0.0, 0.0, factor * grad))
    else:
        factor = _derivative(x, ACTIVATION)
        return tl.where(factor == 0.0, 0.0, factor * grad)


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        share, steepness = _logistic(x)
        return share + x * steepness
    elif ACTIVATION == "hardswish":
        return tl.where(x <= -3.0, 0.0, tl.where(x < 3.0, x * (1.0 / 3.0) + 0.5, 1.0))
    elif ACTIVATION == "gelu":
        return _normal_share(x) + x * (0.39894228040143267794 * tl.exp(-0.5 * x * x))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        share, steepness = _logistic(_twice_gelu_argument(x))
        inner = _TWICE_ROOT + 3.0 * 0.044715 * _TWICE_ROOT * x * x
        return share + x * inner * steepness


@triton.jit
def _up_to_six(x):
    return tl.where(x < 0.0, 0.0, tl.where(x > 6.0, 6.0, x))


@triton.jit
def _logistic(x):
    """``1 / (1 + exp(-x))`` and its derivative, of which nothing is lost where the function is near 1."""
    power = tl.exp(tl.where(x < 0.0, x, -x))
    share = 1.0 / (1.0 + power)
    return tl.where(x < 0.0, power * share, share), power * share * share


@triton.jit
def _normal_share(x):
    """What gelu multiplies its argument by: the normal distribution's share below it."""
    return 0.5 + 0.5 * tl.erf(x * 0.70710678118654752440)


@triton.jit
def _twice_gelu_argument(x):
    """gelu_tanh's ``(1 + tanh(z)) / 2`` is the logistic function of ``2 * z``."""
    return x * (_TWICE_ROOT + _TWICE_ROOT * 0.044715 * x * x)
