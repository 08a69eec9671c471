"""patch and unpatch: put our operators into a model that is already built."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from .errors import ArgumentError
from .nn import REPLACES

_ORIGINAL = {ours: theirs for theirs, ours in REPLACES.items()}
_POOLING_BASES = (*REPLACES, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


@dataclass(frozen=True)
class PatchEntry:
    """One module that :func:`patch` looked at: its dotted path, its class, and what became of it."""

    path: str
    what: str
    why: str


@dataclass
class PatchReport:
    """What :func:`patch` replaced and what it skipped, with reasons; print it for a table."""

    replaced: list[PatchEntry] = field(default_factory=list)
    skipped: list[PatchEntry] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("", "module", "class", "")]
        rows += [("replaced", entry.path, entry.what, entry.why) for entry in self.replaced]
        rows += [("skipped", entry.path, entry.what, entry.why) for entry in self.skipped]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
        ]
        lines.append(f"{len(self.replaced)} replaced, {len(self.skipped)} skipped")
        return "\n".join(line.rstrip() for line in lines)


def patch(model: nn.Module, *, strict: bool = False) -> PatchReport:
    """Make the pooling modules of ``model`` run on our operators, in place.

    A module keeps its identity, attributes, hooks and mode; its class becomes our subclass of it,
    so ``isinstance`` checks, ``state_dict``, ``copy.deepcopy`` and pickling go on working.

    Args:
        model: any module. It may be patched already.
        strict: raise, and leave the model as it was, if a pooling module has to be skipped.

    Returns:
        A :class:`PatchReport`.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
        ArgumentError: ``strict`` is set and a pooling module cannot be replaced.
    """
    report = PatchReport()
    found: list[nn.Module] = []
    for path, module in _modules(model):
        what = type(module).__name__
        ours = REPLACES.get(type(module))
        if ours is not None:
            found.append(module)
            report.replaced.append(PatchEntry(path, what, f"{ours.__module__}.{ours.__qualname__}"))
        elif type(module) in _ORIGINAL:
            report.skipped.append(PatchEntry(path, what, "is one of ours already"))
        elif isinstance(module, _POOLING_BASES):
            why = "has no counterpart here" if type(module) in _POOLING_BASES else "has a class of its own"
            report.skipped.append(PatchEntry(path, what, why))
    failed = [entry for entry in report.skipped if entry.why != "is one of ours already"]
    if strict and failed:
        listed = "; ".join(f"{entry.path} ({entry.what}) {entry.why}" for entry in failed)
        raise ArgumentError(f"patch(strict=True) cannot replace every pooling module of model: {listed}")
    for module in found:
        module.__class__ = REPLACES[type(module)]
        module.__dict__["_pooling_ext_patched"] = True
    return report


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`: give back their classes to the modules it changed.

    Modules that were built as ours from the start stay as they are.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    for _, module in _modules(model):
        if module.__dict__.pop("_pooling_ext_patched", False):
            module.__class__ = _ORIGINAL[type(module)]


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    return [(path or "(root)", module) for path, module in model.named_modules()]
