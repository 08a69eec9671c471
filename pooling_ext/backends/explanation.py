"""What :func:`pooling_ext.explain` returns."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Decision:
    """The backend that one call took, with the reasons of those that did not."""

    op: str
    backend: str
    declined: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.declined.items()])


@dataclass
class Explanation:
    """The result of :func:`pooling_ext.explain`: one :class:`Decision` for each operator call, in order."""

    decisions: list[Decision]

    @property
    def backend(self) -> str | None:
        """The backend of the call; None when there was none or they differ."""
        names = {decision.backend for decision in self.decisions}
        return names.pop() if len(names) == 1 else None

    def __str__(self) -> str:
        if not self.decisions:
            return "no pooling_ext operator was called"
        return "\n".join(str(decision) for decision in self.decisions)
