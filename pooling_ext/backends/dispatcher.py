"""The kernels that Python gives to PyTorch's dispatcher, and takes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Kernels = Mapping[str, Callable[..., Any]]


class Slot:
    """The kernels that Python has registered under one dispatch key, in place of those from C++."""

    def __init__(self, dispatch_key: str):
        self.dispatch_key = dispatch_key
        self._library: torch.library.Library | None = None
        self._held: dict[str, Callable[..., Any]] = {}

    def hold(self, kernels: Kernels) -> None:
        """Register ``kernels``, by the name of the low-level operator, and no others.

        Registering takes a while, so nothing is done where they are there already.
        """
        if self._held.keys() - kernels.keys() or any(kernels[name] != k for name, k in self._held.items()):
            self.clear()
        for name in sorted(kernels.keys() - self._held.keys()):
            if self._library is None:
                self._library = torch.library.Library("pooling_ext", "IMPL")
            self._library.impl(name, kernels[name], self.dispatch_key, allow_override=True)
            self._held[name] = kernels[name]

    def clear(self) -> None:
        """Take all of them back: the kernels from C++, if there are any, are called again."""
        if self._library is not None:
            self._library._destroy()
        self._library, self._held = None, {}
