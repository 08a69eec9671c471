"""``summary.md`` of what a run has found so far."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .runner import RESULTS

#: Failed tests and items that are listed.
_MOST = 60


def write(folder: Path) -> None:
    (folder / "summary.md").write_text(markdown(read(folder)))


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines; one that was cut off is left out."""
    lines = []
    for text in (folder / RESULTS).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def markdown(lines: list[dict[str, Any]]) -> str:
    return "\n\n".join(part for part in _parts(lines) if part) + "\n"


def _parts(lines: list[dict[str, Any]]) -> Iterator[str]:
    yield "# A run on a GPU"
    facts = next((line["facts"] for line in lines if "facts" in line), {})
    yield "\n".join(f"- {name}: {value}" for name, value in facts.items())
    steps = [line for line in lines if "item" not in line and "status" in line]
    yield _table("Steps", ("step", "status", "s"), [(x["step"], x["status"], x["seconds"]) for x in steps])
    yield from _measured(lines, facts)
    yield _convolutions(lines)
    tests = [line for line in lines if "test" in line]
    if tests:
        counts = Counter(line["outcome"] for line in tests)
        yield "## Tests\n\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        yield _list((x["test"], x.get("message", "")) for x in tests if x["outcome"] == "failed")
    bad = [line for line in lines if "item" in line and line.get("status", "ok") != "ok"]
    if bad:
        yield "## What failed"
        yield _list((f"{line['step']}, {line['item']}", line["status"]) for line in bad)
    left = [item for line in lines for item in line.get("not_begun", ())]
    yield f"Not begun: {', '.join(left)}." if left else ""


def _measured(lines: list[dict[str, Any]], facts: dict[str, Any]) -> Iterator[str]:
    """The tables of the suite "gpu"."""
    entries = [line["entry"] for line in lines if "entry" in line]
    if not entries:
        return
    try:
        from ..reports.gpu_report import Entry, Run, models, operators
    except ImportError as error:  # rich, perhaps
        yield f"{len(entries)} times are in {RESULTS}; no table can be made of them: {error}"
        return
    # Rivals are compared within an item, in one process.
    items: dict[Any, list[Entry]] = {}
    for line in lines:
        if "entry" in line:
            items.setdefault((line["step"], line["item"]), []).append(Entry(**line["entry"]))
    for table in (operators, models):
        grids = [table(Run({"copy_gb_s": float("nan")} | facts, found)) for found in items.values()]
        rows = [row for grid in grids for row in grid.rows]
        if rows:
            yield replace(grids[0], rows=rows).markdown().rstrip("\n")


def _convolutions(lines: list[dict[str, Any]]) -> str:
    rows = []
    for line in lines:
        if "convolution" not in line:
            continue
        times = line["ms"]
        first = next(iter(times), "")
        best = min(times, key=times.get, default="")
        rows.append((line["item"], line["convolution"], f"{first}: {times.get(first)}",
                     f"{best}: {times.get(best)}", "; ".join(line["wrong"]) or "none"))  # fmt: skip
    return _table("Convolutions", ("shape", "task", "PyTorch's, ms", "fastest, ms", "wrong"), rows)


def _table(title: str, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    if not rows:
        return ""
    lines = [header, ("---",) * len(header), *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def _list(pairs: Iterator[tuple[str, str]]) -> str:
    lines = [f"- {name}: {' '.join(why.split())}" for name, why in pairs]
    more = [f"- and {len(lines) - _MOST} more"] if len(lines) > _MOST else []
    return "\n".join(lines[:_MOST] + more)
