"""The functions and methods that a file may name. Loading looks a name up here, and nowhere else.

All of them compute with tensors and numbers: none reads files, imports, compiles, or calls what it is given.
"""

from __future__ import annotations

import builtins
import importlib
import math
import operator
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

from ... import functional as F
from ...errors import ArgumentError
from ...graph import op_tables, proxies
from .values import Unsupported

_MORE = """
    pad batch_norm addcmul addcdiv lerp logsumexp log2 log10 log1p expm1 exp2 sinh cosh tan asin
    acos atan atan2 asinh acosh atanh erfc erfinv lgamma trunc frac hypot logit sinc xlogy tril triu
    diag diag_embed outer dot mv addmv addbmm inner kron cross cumprod median nanmedian nansum
    nanmean mode kthvalue argsort var_mean std_mean isfinite nan_to_num count_nonzero bincount
    scatter_add scatter_reduce index_add index_copy index_fill index_put masked_select
    masked_scatter take take_along_dim meshgrid cdist fold channel_shuffle bitwise_and bitwise_or
    bitwise_xor bitwise_not logical_xor celu hardshrink softshrink tanhshrink fill zero int long
    short byte bool char is_complex copy positive searchsorted bucketize true_divide divide multiply
    subtract negative clip absolute vector_norm matrix_norm upsample_nearest upsample_bilinear
"""
#: Operators of PyTorch by name, as functions and as methods of tensors; each may end in _, for in place.
NAMES = frozenset((*op_tables.FRESH, *op_tables.VIEWS, *op_tables.LAYOUT, *op_tables.RANDOM, *_MORE.split()))
#: Attributes that a graph may ask a value for.
ATTRIBUTES = frozenset(
    ["shape", "ndim", "dtype", "device", "layout", "is_cuda", "T", "mT", "H", "mH", "real", "imag", "data"]
)
_OPERATORS = """
    getitem setitem add sub mul truediv floordiv mod pow matmul neg pos abs invert not_ and_ or_ xor
    lshift rshift eq ne lt le gt ge iadd isub imul itruediv
"""
_MATH = "ceil floor sqrt trunc log log2 exp pow prod"
#: Functions of other packages, which are imported where a file names one.
_ELSEWHERE = {
    "torchvision.models.swin_transformer": (
        "shifted_window_attention",
        "_patch_merging_pad",
        "_get_relative_position_bias",
    ),
}


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {"builtins.getattr": builtins.getattr}
    for prefix, namespace in (("torch", torch), ("torch.nn.functional", TF), ("torch.linalg", torch.linalg)):
        for name in sorted(NAMES):
            for form in (name, f"{name}_"):
                function = getattr(namespace, form, None)
                if callable(function) and not isinstance(function, type):
                    found[f"{prefix}.{form}"] = function
    for name in F.__all__:
        found[f"pooling_ext.{name}"] = getattr(F, name)
    for function in (proxies.expect_length, *proxies.IN_PLACE_FUNCTIONS.values()):
        found[f"pooling_ext.graph.{function.__name__}"] = function
    for prefix, namespace, names in (("operator", operator, _OPERATORS), ("math", math, _MATH)):
        for name in names.split():
            found[f"{prefix}.{name}"] = getattr(namespace, name)
    return found


@cache
def _names() -> dict[Callable[..., Any], str]:
    found: dict[Callable[..., Any], str] = {}
    for name, function in _functions().items():
        found.setdefault(function, name)
    return found


def name_of(function: Any) -> str:
    """The name that stands for a function in files.

    Raises:
        Unsupported: there is none.
    """
    try:
        known = _names().get(function)
    except TypeError:  # it cannot be hashed
        known = None
    if known is not None:
        return known
    for module, names in _ELSEWHERE.items():
        for name in names if module in sys.modules else ():
            if getattr(sys.modules[module], name, None) is function:
                return f"{module}.{name}"
    called = getattr(function, "__qualname__", repr(function))
    raise Unsupported(f"it calls {getattr(function, '__module__', None)}.{called}")


def function_named(name: Any) -> Callable[..., Any]:
    """The function that a name stands for.

    Raises:
        ArgumentError: it stands for none here.
    """
    found = _functions().get(name) if type(name) is str else None
    if found is not None:
        return found
    module, _, attribute = name.rpartition(".") if type(name) is str else ("", "", "")
    if attribute in _ELSEWHERE.get(module, ()):
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ArgumentError(f"it calls {name}, which is not here: {error}") from error
    raise ArgumentError(f"it calls {name!r}, which no frozen model does, or this PyTorch has not")


def is_method(name: Any) -> bool:
    """Whether a graph may call a method of that name."""
    if type(name) is not str or not hasattr(Tensor, name):
        return False
    return name in NAMES or (name.endswith("_") and name[:-1] in NAMES)


def attribute_problem(args: Any, kwargs: Any) -> str | None:
    """Why a graph may not call ``getattr`` with these arguments, or None."""
    if len(args) == 2 and not kwargs and type(args[1]) is str and args[1] in ATTRIBUTES:
        return None
    return f"it asks for the attribute {args[1]!r}" if len(args) > 1 else "it asks for an attribute"
