"""Tries the ways that a model can run in, and keeps the fastest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import memory
from ..errors import ArgumentError
from ..freezing import Frozen, freeze
from ..patching import patch
from ..patching.api import set_classes
from . import steps
from .measure import Way, in_turn
from .report import AS_IT_WAS, FROZEN, MEMORY, PATCHED, AccelerateReport
from .state import Layout, lay_out, other_layouts, set_aside, without_gradients

#: The least part of the time that has to be saved.
LEAST_GAIN = 0.02


@dataclass
class Trial:
    """One call of accelerate that measures.

    Args:
        call: the positional and keyword arguments that ``example`` stands for.
        report: is filled in.
        model, example, training, dtype: see :func:`accelerate`.
    """

    model: nn.Module
    example: Any
    call: steps.Call
    training: bool
    dtype: torch.dtype | None
    report: AccelerateReport

    def __post_init__(self) -> None:
        self.device = device_of(self.model, self.call)
        self.frozen: Frozen | None = None
        #: Modules whose class patch changes, with the classes that they had and have.
        self.classes: list[tuple[nn.Module, type[nn.Module], type[nn.Module]]] = []
        self.new_memory = False
        what = "training step" if self.training else "inference"
        self.report.measured = f"{what}, {steps.described(self.call)}"

    @torch.inference_mode(False)  # in which all tensors would be such as cannot be trained
    def run(self) -> nn.Module:
        """Measure, and return what is fastest."""
        try:
            with set_aside(self.model):
                try:
                    self._measure()
                finally:
                    self._set_classes(patched=False)
        except BaseException:
            self._undo_memory()
            raise
        self.report.chosen = chosen = _fastest(self.report.milliseconds)
        if chosen == AS_IT_WAS and self._undo_memory():
            self.report.memory = "reused no longer, as nothing saves time"
        if chosen == FROZEN:
            assert self.frozen is not None
            return self.frozen
        self._set_classes(patched=PATCHED in chosen)
        for name, layout in other_layouts(self.model).items():
            if name in chosen:
                lay_out(layout)
        return self.model

    def _measure(self) -> None:
        if self.training != self.model.training:
            self.model.train(self.training)
        layouts = other_layouts(self.model) if self.training else {}
        self.own: Layout = [(tensor, tensor.data) for layout in layouts.values() for tensor, _ in layout]
        base = self._way(AS_IT_WAS, self.model)
        self._probe_model(base)
        alone: float | None = None
        if self.device.type == "cpu":
            if not memory.is_cpu_memory_reused():
                # By itself: once memory has been reused, it is not mapped afresh for a while.
                alone = in_turn([base], self.device)[0][AS_IT_WAS]
            self.new_memory = reuse_memory(self.report)
            base = self._way(MEMORY, self.model) if self.new_memory else base
        ways = self._patched_ways(layouts) if self.training else self._frozen_ways()
        found, self.report.rounds = in_turn([base, *filter(self._runs, ways)], self.device)
        if self.new_memory and alone is not None:
            # Where reuse saves nothing by itself, what was measured in turn compares better.
            before = found.pop(MEMORY) if _saves_too_little(found[MEMORY], alone) else alone
            found = {AS_IT_WAS: before, **found}
        self.report.milliseconds = found

    def _patched_ways(self, layouts: dict[str, Layout]) -> list[Way]:
        before = [(module, type(module)) for module in self.model.modules()]
        try:
            self.report.fusion = patch(self.model)
        except Exception as error:
            self.report.notes.append(f"not patched: {error}")
        self.classes = [(module, cls, type(module)) for module, cls in before if type(module) is not cls]
        named: dict[str, Layout] = {PATCHED: []} if self.classes else {}
        named |= {f"{PATCHED}, {name}" if self.classes else name: layout for name, layout in layouts.items()}
        return [self._way(name, self.model, True, layout) for name, layout in named.items()]

    def _frozen_ways(self) -> list[Way]:
        try:
            self.frozen = freeze(self.model, self.example, self.dtype)
        except Exception as error:
            self.report.notes.append(f"not frozen: {error}")
            return []
        self.report.fusion = self.frozen.report
        return [self._way(FROZEN, self.frozen)]

    def _way(self, name: str, model: nn.Module, patched: bool = False, layout: Layout | None = None) -> Way:
        def prepare() -> Callable[[], Any]:
            self._set_classes(patched)
            lay_out([*self.own, *(layout or [])])
            torch.clear_autocast_cache()  # of another layout's casts
            call = steps.copied(self.call)
            if not self.training:
                return partial(steps.inference, model, call)
            without_gradients(model)
            return partial(steps.training_step, model, call, self.device, self.dtype)

        return Way(name, prepare)

    def _set_classes(self, patched: bool) -> None:
        set_classes([(module, after if patched else before) for module, before, after in self.classes])

    def _probe_model(self, way: Way) -> None:
        """Run the model once.

        Raises:
            ArgumentError: it does not run.
        """
        try:
            differentiated = way.prepare()()
        except Exception as error:
            raise ArgumentError(
                f"example must be what model ({type(self.model).__name__}) takes, but it raises "
                f"{type(error).__name__}: {error}"
            ) from error
        if self.training and not differentiated:
            self.report.notes.append("no output needs gradients, so a step is a forward alone")

    def _runs(self, way: Way) -> bool:
        """Run another way once; the report says where it does not run."""
        try:
            way.prepare()()
        except Exception as error:
            self.report.notes.append(f"{way.name}: raises {type(error).__name__}: {error}")
            return False
        return True

    def _undo_memory(self) -> bool:
        if self.new_memory:
            memory.stop_reusing_cpu_memory()
        return self.new_memory


def _fastest(milliseconds: dict[str, float]) -> str:
    """The fastest way, where each has to save enough over those before it, which change less."""
    best, least = AS_IT_WAS, milliseconds[AS_IT_WAS]
    for name, taken in milliseconds.items():
        if not _saves_too_little(taken, least):
            best, least = name, taken
    return best


def _saves_too_little(after: float, before: float) -> bool:
    return after >= (1 - LEAST_GAIN) * before


def reuse_memory(report: AccelerateReport) -> bool:
    """Reuse CPU memory; whether it was not before and is now."""
    before = memory.is_cpu_memory_reused()
    reuse = memory.reuse_cpu_memory()
    report.memory = reuse.reason
    return bool(reuse) and not before


def device_of(*trees: Any) -> torch.device:
    """The device of the first tensor in modules or nests."""
    for tree in trees:
        leaves = (
            [*tree.parameters(), *tree.buffers()] if isinstance(tree, nn.Module) else pytree.tree_leaves(tree)
        )
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                return leaf.device
    return torch.device("cpu")
