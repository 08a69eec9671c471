"""Freezes the parts of a model that can be traced, where the model as a whole cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ArgumentError
from .check import cloned, state_kept
from .region import Region

#: Freezes a module for a call: gives None where it cannot.
FreezeModule = Callable[[nn.Module, tuple, dict, str], "Region | None"]


class Part(nn.Module):
    """A frozen child in a model that runs as it is; for the model, it still is the child.

    Args:
        original: the child, whose attributes and methods others may use.
        region: what a call of it runs.
    """

    def __init__(self, original: nn.Module, region: Region):
        super().__init__()
        self.region = region
        self.__dict__["original"] = original  # not a child: it is not part of the frozen model

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.__dict__["original"]) if "original" in self.__dict__ else Part

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.region(*args, **kwargs)

    @contextmanager
    def unfrozen(self) -> Iterator[None]:
        """Let calls run the child itself."""
        region = self._modules["region"]
        self._modules["region"] = self.__dict__["original"]
        try:
            yield
        finally:
            self._modules["region"] = region

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original" not in self.__dict__:
                raise
            return getattr(self.__dict__["original"], name)

    def __reduce__(self) -> Any:
        return _part, (self.__dict__["original"], self.region)


def _part(original: nn.Module, region: Region) -> Part:
    return Part(original, region)


def freeze_parts(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str, freeze_module: FreezeModule
) -> nn.Module:
    """Freeze the children of ``root``, a private copy, that can be frozen, in place.

    Args:
        args, kwargs: what ``root`` is called with.
        path: where it is in the whole model.
    """
    with state_kept(root):
        calls = _record_calls(root, args, kwargs)
    done: dict[nn.Module, Part | None] = {}

    def descend(module: nn.Module, path: str) -> None:
        for name, child in list(module.named_children()):
            inside = f"{path}.{name}" if path else name
            if child not in done:
                given, done[child] = calls.get(child), None
                region = None if given is None else freeze_module(child, *given, inside)
                if region is not None:
                    done[child] = Part(child, region)
                else:
                    descend(child, inside)
            part = done[child]
            if part is not None:
                module._modules[name] = part

    descend(root, path)
    return root


def _record_calls(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[nn.Module, tuple[tuple, dict]]:
    """Run ``root`` and return the arguments of the modules that were always called in the same way."""
    calls: dict[nn.Module, Any] = {}
    kinds: dict[nn.Module, Any] = {}

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        kind = _kind((given, named))
        if kinds.setdefault(module, kind) != kind:
            calls[module] = None
        elif module not in calls:
            # A copy, since the model may go on to change them in place.
            calls[module] = cloned((given, named))

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in root.modules() if m is not root]
    try:
        with torch.no_grad():
            root(*args, **kwargs)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArgumentError(f"model does not take example: {first}") from error
    finally:
        for handle in handles:
            handle.remove()
    return {module: given for module, given in calls.items() if given is not None}


def _kind(tree: Any) -> Any:
    """What calls have in common that one frozen region may serve."""
    leaves, spec = pytree.tree_flatten(tree)
    kinds = [
        (x.dim(), x.is_floating_point(), x.device) if isinstance(x, Tensor) else (type(x), repr(x))
        for x in leaves
    ]
    return spec, kinds
