"""A clock of the tests' own for accelerate, a model that it watches, and what may not change."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_cases import Block

from pooling_ext import Frozen, memory
from pooling_ext.accelerating import measure
from pooling_ext.memory import MemoryReuse

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Clock:
    """Time that passes in forwards alone, by as much as ``cost`` says of the way that runs."""

    def __init__(self) -> None:
        self.now, self.reused, self.calls, self.frozen = 0.0, False, 0, False
        self.cost: Any = lambda **way: 1.0
        self.model: Any = None

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.calls += 1
        conv = next(m for m in self.model.modules() if isinstance(m, nn.Conv2d))
        self.now += self.cost(
            patched=type(self.model).forward is not Net.forward,
            channels_last=conv.weight.stride(1) == 1,
            reused=self.reused,
            frozen=self.frozen,
        )


class Net(nn.Module):
    """A residual block with what a step may change: running statistics, a counter, random numbers."""

    clock: Clock | None = None

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.block, self.drop, self.tick = Block(4), nn.Dropout(0.5), Tick()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.tick(self.block(self.relu(self.bn(self.conv(x))))))


class Tick(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if Net.clock is not None and not Net.clock.frozen and type(x) is Tensor:  # not where it is traced
            Net.clock.tick()
        if self.training:
            self.steps += 1
        return x


def install(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock, where neither time nor the process's memory is real from now on."""
    clock = Clock()

    def set_reused(value: bool) -> MemoryReuse:
        clock.reused = value
        return MemoryReuse(value, "large tensors reuse freed memory")

    def frozen_call(self: Frozen, *args: Any, **kwargs: Any) -> Any:
        clock.frozen = True
        try:
            clock.tick()
            return self.body(*args, **kwargs)
        finally:
            clock.frozen = False

    monkeypatch.setattr(memory, "reuse_cpu_memory", lambda: set_reused(True))
    monkeypatch.setattr(memory, "stop_reusing_cpu_memory", lambda: set_reused(False))
    monkeypatch.setattr(memory, "is_cpu_memory_reused", lambda: clock.reused)
    monkeypatch.setattr(measure, "clock", clock)
    monkeypatch.setattr(Net, "clock", clock)
    monkeypatch.setattr(Frozen, "__call__", frozen_call)
    monkeypatch.setattr(measure, "SECONDS", 4.0)
    monkeypatch.setattr(measure, "MOST_ROUNDS", 20)
    return clock


def net(clock: Clock, layout: dict[str, Any] | None = None) -> Any:
    clock.model = Net().to(**(layout or {}))
    return clock.model


def is_patched(model: nn.Module) -> bool:
    return type(model) is not Net


def state_of(model: nn.Module) -> dict[str, Any]:
    """What accelerate may not change, with where tensors are."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    state: dict[str, Any] = {}
    for name, tensor in tensors:
        grad = tensor.grad if tensor.is_leaf else None
        grad_state = None if grad is None else (id(grad), grad.tolist(), grad.stride())
        state[name] = id(tensor), tensor.tolist(), tensor.data_ptr(), tensor.stride(), grad_state
        hooks = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
        state[f"{name}'s hooks"] = [(id(found), dict(found)) for found in hooks if found is not None]
    for name, module in model.named_modules():
        hooks = {key: dict(value) for key, value in vars(module).items() if key.endswith("_hooks")}
        state[f"module {name}"] = type(module), module.training, hooks, getattr(module, "steps", None)
    state["random"] = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
    return state
