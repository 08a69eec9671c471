"""Defines the library's low-level operators.

The schema, the shape rule and the vmap rule of an operator are registered here from Python; its
kernels are registered from C++ (``csrc/launchers``) when the compiled part is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._prims_common import suggest_memory_format
from torch.compiler import is_compiling
from torch.library import Library

library = Library("pooling_ext", "DEF")

#: The fields of windows.Windows, as operator arguments.
WINDOWS = "SymInt[] output_size, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation"


def define(
    signature: str, returns: str, fake: Callable[..., Any], tensors: int = 1, vmap: bool = True
) -> Any:
    """Define ``pooling_ext::<signature>`` and return its overload.

    Args:
        signature: name and arguments; ``{windows}`` stands for the fields of ``Windows``.
        returns: the schema's return type.
        fake: computes the outputs' metadata for fake and meta tensors.
        tensors: how many leading arguments are tensors ``(*, channels, *spatial)``; vmap folds its
            dimension into their batch.
        vmap: whether there is a vmap rule.
    """
    signature = signature.replace("{windows}", WINDOWS)
    name = signature.split("(")[0]
    qualified = f"pooling_ext::{name}"
    library.define(f"{signature} -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    # Autograd Functions call the operators, so that none has a gradient of its own; PyTorch's
    # stand-in for a missing one takes a third of a tiny call's time.
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(qualified, fake, lib=library)
    operator = getattr(torch.ops.pooling_ext, name).default
    if vmap:
        torch.library.register_vmap(qualified, _folding_vmap(operator, tensors), lib=library)
    return operator


def suggests_channels_last(input: torch.Tensor) -> bool:
    """Whether a result for ``input`` is to be in a channels-last format."""
    if type(input) is torch.Tensor and not is_compiling() and input.dim() > 3:
        # PyTorch's answer for nearly every tensor, in a tenth of the time.
        if input.stride(1) * input.shape[1] > input.stride(-1):
            return False
        if min(input.shape) > 1 and input.is_contiguous(memory_format=memory_format(input.dim() - 2, True)):
            return True
    return suggest_memory_format(input) in (torch.channels_last, torch.channels_last_3d)


def keeps_channels_last(input: torch.Tensor, rank: int) -> bool:
    """Whether a pooling operator's result for ``input`` is to be in a channels-last format."""
    return rank > 1 and input.dim() == rank + 2 and suggests_channels_last(input)


def is_channels_last_1d(input: torch.Tensor) -> bool:
    """Whether the channels of ``(N, C, L)`` lie together, as in a transposed ``(N, L, C)``."""
    if input.is_contiguous() or input.dim() != 3:
        return False
    return suggests_channels_last(input.unsqueeze(-2))


def memory_format(rank: int, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if rank == 2 else torch.channels_last_3d


def empty(like: torch.Tensor, spatial: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialized tensor with ``like``'s batch and channels, and its memory format if it is batched."""
    rank = len(spatial)
    return torch.empty(
        (*like.shape[: like.dim() - rank], *spatial),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=memory_format(rank, keeps_channels_last(like, rank)),
    )


def _folding_vmap(operator: Any, tensors: int) -> Callable[..., Any]:
    """A vmap rule that pools all samples of all batches in one call."""
    arguments = [argument.name for argument in operator._schema.arguments]
    windows_at = arguments.index("output_size")
    input_size_at = arguments.index("input_size") if "input_size" in arguments else None

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        rank = len(args[windows_at])
        size = info.batch_size
        stacked = [
            x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:tensors], in_dims[:tensors], strict=True)
        ]
        # (size, channels, *spatial) is already a batch; (size, batch, channels, *spatial) is folded.
        fold = stacked[0].dim() == rank + 3
        folded = [x.flatten(0, 1) if fold else x for x in stacked]
        rest = list(args[tensors:])
        if input_size_at is not None:
            sizes = args[input_size_at]
            leading = [size * sizes[0], *sizes[1:]] if fold else [size, *sizes]
            rest[input_size_at - tensors] = leading
        result = operator(*folded, *rest)
        outputs = result if isinstance(result, tuple) else (result,)
        if fold:
            outputs = tuple(y.unflatten(0, (size, y.shape[0] // size)) for y in outputs)
        if isinstance(result, tuple):
            return outputs, (0,) * len(outputs)
        return outputs[0], 0

    return rule
