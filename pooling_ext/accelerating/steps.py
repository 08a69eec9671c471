"""The calls that accelerate measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Call = tuple[tuple[Any, ...], dict[str, Any]]


def copied(call: Call) -> Call:
    """Arguments of their own for a call, which may change them."""

    def copy(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return pytree.tree_map(copy, call)


def training_step(
    model: Callable[..., Any], call: Call, device: torch.device, dtype: torch.dtype | None
) -> bool:
    """A forward, and the backward of the sum of all outputs; whether there was anything to differentiate.

    Args:
        dtype: that of ``torch.autocast``, float32 for none, None for whatever is in effect.
    """
    args, kwargs = call
    with torch.inference_mode(False), torch.enable_grad():
        with _autocast(device, dtype):
            outputs = model(*args, **kwargs)
        found = [x for x in tensors_in(outputs) if x.requires_grad]
        if found:
            # Ones in memory, as a loss's gradient would be, where a sum's is one number for all elements.
            torch.autograd.backward(found, [torch.ones_like(x) for x in found])
    return bool(found)


def inference(model: Callable[..., Any], call: Call) -> None:
    """A forward without gradients."""
    args, kwargs = call
    with torch.no_grad():
        model(*args, **kwargs)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    if dtype is None:
        return nullcontext()
    if dtype is torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def tensors_in(outputs: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples, dictionaries and dataclasses, however nested."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from tensors_in(value)
    elif isinstance(outputs, (list, tuple, set, frozenset)):
        for value in outputs:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        for field in dataclasses.fields(outputs):
            yield from tensors_in(getattr(outputs, field.name))


def described(call: Call) -> str:
    """The dtypes and shapes of the tensors among the arguments."""
    shown = [
        f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
        for x in pytree.tree_leaves(call)
        if isinstance(x, Tensor)
    ]
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")
