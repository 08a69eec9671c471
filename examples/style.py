"""How the examples' pictures and tables look."""

from __future__ import annotations

from typing import Any

INK, FAINT, BEFORE, AFTER, THIRD = "#1f2933", "#d9dee4", "#9aa5b1", "#0b7285", "#e8890c"
#: For matplotlib's rc_context.
STYLE: dict[Any, Any] = {"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": FAINT}
STYLE |= dict.fromkeys(("text.color", "xtick.color", "ytick.color", "axes.labelcolor"), INK)


def speedup(before: float, after: float) -> str:
    """How many times less ``after`` is, in rich's markup."""
    ratio = before / after
    color = "green" if ratio >= 1.1 else "red" if ratio < 0.95 else "default"
    return f"[{color}]{ratio:.{0 if ratio >= 20 else 1 if ratio >= 2 else 2}f}x[/]"
