"""The report of a frozen model as data."""

from __future__ import annotations

from typing import Any

from ...errors import ArgumentError
from ...graph.report import FusionEntry, FusionReport
from .values import Fields

_ENTRIES = ("replaced", "skipped", "batch_norms_left")
_TEXTS = ("warnings", "folded", "uncalled", "beyond_limit")
_NUMBERS = ("batch_norms", "winograd_bytes")


def encode(report: FusionReport) -> dict[str, Any]:
    data: dict[str, Any] = {
        name: [[entry.path, entry.what, entry.why] for entry in getattr(report, name)] for name in _ENTRIES
    }
    data |= {name: sorted(report.folded) if name == "folded" else getattr(report, name) for name in _TEXTS}
    data |= {name: getattr(report, name) for name in _NUMBERS}
    return {**data, "details": report.details}


def decode(data: Fields) -> FusionReport:
    """The report that data stand for.

    Raises:
        ArgumentError: they stand for none.
    """
    report = FusionReport()
    for name in _ENTRIES:
        entries = data.items(name, list)
        setattr(report, name, [FusionEntry(*_texts(entry, name, 3)) for entry in entries])
    for name in _TEXTS:
        texts = data.items(name, str)
        setattr(report, name, set(texts) if name == "folded" else texts)
    for name in _NUMBERS:
        setattr(report, name, data.get(name, int))
    report.details = {path: _texts(lines, "details") for path, lines in data.get("details", dict).items()}
    return report


def _texts(values: Any, name: str, count: int | None = None) -> list[str]:
    of_text = type(values) is list and all(type(value) is str for value in values)
    if not of_text or count not in (None, len(values)):
        raise ArgumentError(f"report: {name} has {values!r}")
    return values
