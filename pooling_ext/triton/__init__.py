"""Triton kernels for the library's low-level operators.

Module ``pooling_ext.triton.<op>`` holds a function for each low-level operator of ``pooling_ext.ops.<op>``,
of the same name and arguments. They are registered with PyTorch's dispatcher by name: neither Triton nor any
module here is imported before the first call.

With ``TRITON_INTERPRET=1`` in the environment before that, Triton's interpreter runs the kernels on CPU
tensors, one program after the other; ``use_backend("triton")`` then puts them in the CPU kernels' place.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch

#: Which module has the kernels of which low-level operators.
MODULES: dict[str, tuple[str, ...]] = {
    "add_relu_global_avg_pool": ("add_relu_global_avg_pool", "add_relu_global_avg_pool_backward"),
    "avg_pool": ("avg_pool", "avg_pool_backward"),
    "batch_norm_act": (
        "batch_norm_stats",
        "batch_norm_act",
        "batch_norm_act_sums",
        "batch_norm_act_backward",
        "batch_norm_act_training",
        "batch_norm_act_training_backward",
        "batch_norm_update_running",
    ),
    "batch_norm_relu_max_pool": (
        "batch_norm_relu_max_pool",
        "batch_norm_relu_max_pool_places",
        "batch_norm_relu_max_pool_sums",
        "batch_norm_relu_max_pool_backward",
    ),
    "conv": ("conv_bias_act", "conv_stats"),
    "conv_input_grad": ("conv_input_grad",),
    "lp_pool": ("lp_pool",),
    "max_pool": ("max_pool", "max_pool_places", "max_pool_gather", "max_pool_backward"),
}


@cache
def why_not() -> str | None:
    """Why Triton's kernels cannot run in this process, or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter is to run the kernels, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def register(library: torch.library.Library, dispatch_key: str, module: str) -> None:
    """Give ``library`` the kernels in ``module`` under ``dispatch_key``, in place of any that are there."""
    for name in MODULES[module]:
        library.impl(name, _Kernel(module, name), dispatch_key, allow_override=True)


class _Kernel:
    """A kernel that is imported when it is first called, and runs on its input's device."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name
        self.function: Any = None

    def __call__(self, input: torch.Tensor, *args: Any) -> Any:
        if self.function is None:
            self.function = getattr(importlib.import_module(f"{__name__}.{self.module}"), self.name)
        if input.is_cuda and input.get_device() != torch.cuda.current_device():
            with torch.cuda.device(input.device):
                return self.function(input, *args)
        return self.function(input, *args)
