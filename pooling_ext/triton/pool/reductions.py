# pyright: basic, reportGeneralTypeIssues=false, reportArgumentType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportCallIssue=false
"""What the kernels of windows and those of whole planes reduce by."""

from __future__ import annotations

import triton
import triton.language as tl

MAX = tl.constexpr("max")
MEAN = tl.constexpr("mean")


@triton.constexpr_function
def accumulator(pointer, reduction):
    """What values of a pointer's dtype are reduced in: sums and 16-bit maxima in float32."""
    dtype = pointer.dtype.element_ty
    if dtype.is_fp64() or dtype.is_int():
        return dtype
    return tl.float32


@triton.jit
def wins(v, best):
    """Whether ``v``, which comes later, replaces ``best``: the first of equals stays, NaN beats all."""
    better = v > best
    if v.dtype.is_floating():
        better |= v != v
    return better


@triton.jit
def larger(a, b):
    """The larger one; NaN if either is."""
    if a.dtype.is_floating():
        most = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    else:
        most = tl.maximum(a, b)
    return most


@triton.jit
def power(x, NORM: tl.constexpr, MAGNITUDE: tl.constexpr):
    """``x ** NORM``, or ``|x| ** NORM``; ``x`` itself for the norms 0 (an average) and 1."""
    if MAGNITUDE:
        x = tl.abs(x)
    result = x
    for _ in tl.static_range(1, NORM):
        result *= x
    return result


@triton.jit
def root(x, NORM: tl.constexpr):
    """``x ** (1 / NORM)``; NaN where the odd root of a negative number is asked for, as in PyTorch."""
    if NORM == 2:
        x = tl.sqrt(x)
    elif NORM == 3:
        x = tl.exp2(tl.log2(x) / 3)
    return x
