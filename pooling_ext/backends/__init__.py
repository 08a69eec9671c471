"""The backends of the operators: the CPU's, CUDA's and Triton's kernels, and PyTorch's own operators.

An operator registers itself (:func:`register`); :func:`choose` says who takes a call. ``registry`` has the
ordered list and its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .explanation import Decision, Explanation
from .operators import Operator
from .registry import PLAIN_TENSORS, REGISTRY, Backend, Call

BACKENDS = REGISTRY.backends
CPU, CUDA, TRITON, ATEN = BACKENDS

register = REGISTRY.register
choose = REGISTRY.choose
choose_pool = REGISTRY.choose_pool
offers = REGISTRY.offers
recording = REGISTRY.recording
record = REGISTRY.record


def forced() -> str | None:
    """The backend that :func:`use_backend` asks for."""
    return REGISTRY.forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use only the backend ``name``, or PyTorch's operators where it does not support a call.

    The choice holds for the whole process while the context lasts. ``POOLING_EXT_BACKEND`` in the
    environment sets it from the start.

    Args:
        name: "aten", "cpu", "cuda" or "triton" (which takes CPU tensors where ``TRITON_INTERPRET=1`` is set).

    Returns:
        A context manager.

    Raises:
        ArgumentError: there is no backend of that name.

    Example:
        >>> x = torch.randn(1, 8, 9, 9)
        >>> with pooling_ext.use_backend("aten"):
        ...     print(pooling_ext.explain(F.max_pool2d, x, 3).backend)
        aten
    """
    before = REGISTRY.forced
    REGISTRY.force(name)
    try:
        yield
    finally:
        REGISTRY.force(before)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Run ``function(*args, **kwargs)`` without gradients and say which backend each call in it takes.

    Args:
        function: a function or module of this library, or anything that calls them, such as a patched model.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        An :class:`~pooling_ext.backends.Explanation`; print it to read it.

    Raises:
        Exception: whatever ``function`` raises.

    Example:
        >>> x = torch.zeros(1, 8, 9, 9, dtype=torch.complex64)
        >>> print(pooling_ext.explain(F.global_avg_pool2d, x))
        avg_pool: aten
          not cpu: avg_pool has no CPU kernel for torch.complex64
          not cuda: the input is on cpu
          not triton: the input is on cpu
    """
    with REGISTRY.recorded() as decisions, torch.no_grad():
        function(*args, **kwargs)
    return Explanation(decisions)


__all__ = [
    "ATEN",
    "BACKENDS",
    "CPU",
    "CUDA",
    "PLAIN_TENSORS",
    "REGISTRY",
    "TRITON",
    "Backend",
    "Call",
    "Decision",
    "Explanation",
    "Operator",
    "choose",
    "choose_pool",
    "explain",
    "forced",
    "offers",
    "record",
    "recording",
    "register",
    "use_backend",
]
