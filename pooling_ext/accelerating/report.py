"""What accelerate did to a model, and what it measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..graph.report import FusionReport

#: Ways to run a model: before anything was done to it, and what may be done.
AS_IT_WAS, MEMORY, PATCHED, FROZEN = "as it was", "memory reused", "patched", "frozen"


@dataclass
class AccelerateReport:
    """The report of :func:`accelerate`: what was kept, and the time of each way that was tried.

    Print it for a table.

    Attributes:
        chosen: the way that the returned model runs, such as "patched, channels_last"; "as it was" where no
            other way saved enough.
        milliseconds: the median time of a call, by way. Empty where nothing was measured.
        rounds: how often each way was measured.
        measured: what was measured, such as "training step, float32 (16, 3, 224, 224)".
        memory: whether freed CPU memory is reused from now on, or why not.
        fusion: what :func:`patch` or :func:`freeze` did, also where it was undone; None if neither could.
        notes: what was left out, and why.

    Example:
        >>> model = pooling_ext.accelerate(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()))
        >>> report = model.accelerate_report
        >>> report.chosen, report.speedup, report.notes
        ('patched', None, ['not measured without an example'])
    """

    chosen: str = AS_IT_WAS
    milliseconds: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    measured: str = ""
    memory: str = ""
    fusion: FusionReport | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def before(self) -> float | None:
        """Milliseconds of the model as it was; None where nothing was measured."""
        return self.milliseconds.get(AS_IT_WAS)

    @property
    def after(self) -> float | None:
        """Milliseconds of the model as it was returned; None where nothing was measured."""
        return self.milliseconds.get(self.chosen)

    @property
    def speedup(self) -> float | None:
        """``before`` over ``after``; None where nothing was measured."""
        return self._speedup(self.chosen)

    def _speedup(self, way: str) -> float | None:
        before, after = self.before, self.milliseconds.get(way)
        return before / after if before is not None and after else None

    def __str__(self) -> str:
        lines = []
        if self.milliseconds:
            lines.append(f"{self.measured}: medians of {self.rounds} rounds, * is kept")
            width = max(map(len, self.milliseconds))
            for way, taken in self.milliseconds.items():
                sign = "*" if way == self.chosen else " "
                speedup = self._speedup(way)
                shown = "" if speedup is None else f"  {speedup:5.2f}x"
                lines.append(f"{sign} {way:<{width}}  {taken:9.4g} ms{shown}")
        else:
            lines.append(f"{self.chosen}, not measured")
        if self.fusion is not None:
            replaced, skipped = len(self.fusion.replaced), len(self.fusion.skipped)
            undone = ", undone" if self.chosen in (AS_IT_WAS, MEMORY) else ""
            lines.append(f"layers: {replaced} replaced, {skipped} skipped{undone}")
        if self.memory:
            lines.append(f"memory: {self.memory}")
        lines += [f"note: {text}" for text in self.notes]
        return "\n".join(lines)
