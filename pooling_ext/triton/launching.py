"""The one module from which Triton kernels are launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """A launch as it was asked for.

    Attributes:
        kernel: the function that ``triton.jit`` made.
        grid: how many programs there are along each axis.
        arguments: tensors, numbers and the values of ``tl.constexpr``, by the names of the parameters.
        constants: which of the parameters are ``tl.constexpr``.
        options: ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: frozenset[str]
    options: dict[str, int]


#: Sees each launch before it happens, and makes it unless that returns True.
Watcher = Callable[[Launch], bool]
_watcher: Watcher | None = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    **constants: Any,
) -> None:
    """Run ``kernel`` on the current device and stream, once for each element of ``grid``.

    Args:
        kernel: what ``triton.jit`` made.
        grid: up to three sizes; nothing runs where one of them is 0.
        args: the kernel's parameters in order, up to the ``tl.constexpr`` ones.
        constants: the ``tl.constexpr`` ones, by name.
    """
    if 0 in grid:
        return
    if _watcher is not None:
        names = [name for name in kernel.arg_names if name not in constants]
        arguments = dict(zip(names, args, strict=True)) | constants
        options = {"num_warps": num_warps, "num_stages": num_stages}
        if _watcher(Launch(kernel, grid, arguments, frozenset(constants), options)):
            return
    kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Show ``watcher`` every launch while the context lasts; what it returns True for does not run."""
    global _watcher
    before, _watcher = _watcher, watcher
    try:
        yield
    finally:
        _watcher = before
