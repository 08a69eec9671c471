"""The Triton kernels: whether they can run, and how PyTorch's dispatcher calls them.

A kernel is a function in the module that its operator has registered (``triton_module``). The
dispatcher has it by name: neither Triton nor that module is imported before the first call.

With ``TRITON_INTERPRET=1`` in the environment before that, Triton's interpreter runs the kernels on CPU
tensors, one program after the other; ``use_backend("triton")`` then puts them in the CPU kernels' place.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch


@cache
def why_not() -> str | None:
    """Why Triton's kernels cannot run in this process, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter is to run the kernels, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@dataclass
class Kernel:
    """A kernel that is imported when it is first called, and runs on its input's device."""

    module: str
    name: str
    function: Any = field(default=None, compare=False)

    def __call__(self, input: torch.Tensor, *args: Any) -> Any:
        if self.function is None:
            self.function = getattr(importlib.import_module(self.module), self.name)
        if input.is_cuda and input.get_device() != torch.cuda.current_device():
            with torch.cuda.device(input.device):
                return self.function(input, *args)
        return self.function(input, *args)
