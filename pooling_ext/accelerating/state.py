"""Runs a model many times and leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..freezing.check import random_state_kept, state_kept

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
#: Tensors of the model, each with data to have instead.
Layout = list[tuple[Tensor, Tensor]]


def tensors_of(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers, each once.

    Raises:
        ArgumentError: one has no data.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if nn.parameter.is_lazy(tensor):
            raise ArgumentError(
                f"model must have run once before it is measured, but {name} is not initialized"
            )
        if tensor.is_meta:
            raise ArgumentError(f"model must have data to be measured, but {name} is on the meta device")
    return [tensor for _, tensor in tensors]


@contextmanager
def set_aside(model: nn.Module) -> Iterator[None]:
    """Let the model run on copies of its tensors, without gradients and their hooks, and end as it began.

    Afterwards parameters, buffers, gradients, plain attributes, the modes of all modules and the random state
    are what they were, to the bit and at the same addresses.
    """
    held = [_Held(tensor) for tensor in tensors_of(model)]
    modes = [(module, module.training) for module in model.modules()]
    with random_state_kept(), torch.no_grad(), state_kept(model):
        try:
            for one in held:
                one.replace()
            yield
        finally:
            for one in held:
                one.restore()
            for module, training in modes:
                if module.training != training:
                    module.training = training  # of a ScriptModule too, which has no such attribute
            torch.clear_autocast_cache()  # of casts of the copies


class _Held:
    """A tensor, and what running the model may change of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.data = tensor, tensor.data
        self.grad = tensor.grad if tensor.is_leaf else None
        found = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks) if tensor.is_leaf else ()
        self.hooks = [(hooks, dict(hooks)) for hooks in found if hooks]

    def replace(self) -> None:
        for hooks, _ in self.hooks:
            hooks.clear()  # to set none leaves the latter kind in place
        self.tensor.data = self.data.clone()
        if self.tensor.is_leaf:
            self.tensor.grad = None

    def restore(self) -> None:
        self.tensor.data = self.data
        if self.tensor.is_leaf:
            self.tensor.grad = self.grad
        for hooks, held in self.hooks:
            hooks.update(held)


def other_layouts(model: nn.Module) -> dict[str, Layout]:
    """The memory formats that the model could have, by name, but for its own.

    As ``model.to(memory_format=...)``, they are those of parameters and buffers of four and five dimensions.
    """
    tensors = [tensor for tensor in tensors_of(model) if tensor.dim() in _CHANNELS_LAST]
    found = {}
    for name in ("contiguous", "channels_last"):
        layout = []
        for tensor in tensors:
            format = torch.contiguous_format if name == "contiguous" else _CHANNELS_LAST[tensor.dim()]
            data = tensor.detach()
            other = data.to(memory_format=format)
            if other is not data and other.stride() != data.stride():
                layout.append((tensor, other))
        if layout:
            found[name] = layout
    return found


def without_gradients(model: nn.Module) -> None:
    """Let a step begin as after ``zero_grad``."""
    for tensor in model.parameters():
        tensor.grad = None


def lay_out(layout: Layout) -> None:
    """Give tensors other data."""
    for tensor, data in layout:
        tensor.data = data
