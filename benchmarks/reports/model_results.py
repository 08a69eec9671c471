"""What runs of whole models found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

#: The parts of the suite.
TRAINING, INFERENCE, FAMILIES = "training", "inference", "families"
STEP, FORWARD = "training step", "inference"
EAGER, PATCHED, FROZEN, COMPILED = "eager", "patched", "frozen", "torch.compile"


class Setup(NamedTuple):
    """What rivals are compared on."""

    part: str
    task: str
    model: str
    batch: int
    dtype: str
    layout: str

    def __str__(self) -> str:
        return f"{self.model} {self.task}, batch {self.batch}, {self.dtype} {self.layout}"


@dataclass(frozen=True)
class Entry:
    """One rival, timed on one setup.

    Attributes:
        setting: what the rival was told, "" where there is only one way.
        ms: median time of a call.
        spread: interquartile range over the median.
        error: deviation from the model in float64, relative to its size; None if not checked.
        compile_s: seconds of the first call of a rival that compiles itself.
        cached: whether the compiler found earlier work of its own on disk.
    """

    setup: Setup
    rival: str
    setting: str
    ms: float
    spread: float
    error: float | None = None
    compile_s: float | None = None
    cached: bool | None = None

    def as_json(self) -> dict[str, Any]:
        return self.setup._asdict() | {k: v for k, v in asdict(self).items() if k != "setup"}


@dataclass(frozen=True)
class Memory:
    """What one training step takes.

    Attributes:
        live: bytes of torch's allocator live at most beyond model, optimizer and batch.
        rss: bytes that the process held at most, beyond what it held before its first step; None where
            the system does not tell.
    """

    model: str
    batch: int
    dtype: str
    rival: str
    live: int
    rss: int | None


@dataclass
class Models:
    """A whole run.

    Attributes:
        facts: the machine, the software and the settings.
        wrong: what gave a wrong result and was not timed, by setup and rival.
        absent: rivals that could not take part, and why.
    """

    facts: dict[str, Any]
    entries: list[Entry] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def best(self, **wanted: Any) -> dict[Setup, dict[str, Entry]]:
        """Each rival's fastest setting on the setups whose fields are ``wanted``."""
        found: dict[Setup, dict[str, Entry]] = {}
        for entry in self.entries:
            if all(getattr(entry.setup, name) == value for name, value in wanted.items()):
                rivals = found.setdefault(entry.setup, {})
                if entry.rival not in rivals or entry.ms < rivals[entry.rival].ms:
                    rivals[entry.rival] = entry
        return found

    def speedups(self, ours: str, theirs: str | None, **wanted: Any) -> dict[Setup, float]:
        """Of ``ours`` over ``theirs``, which is the best of other engines if None."""
        return dict(self._speedups(ours, theirs, wanted))

    def _speedups(self, ours: str, theirs: str | None, wanted: Any) -> Iterator[tuple[Setup, float]]:
        for setup, rivals in self.best(**wanted).items():
            others = [theirs] if theirs else [name for name in rivals if name not in (EAGER, PATCHED, FROZEN)]
            times = [rivals[name].ms for name in others if name in rivals]
            if ours in rivals and times:
                yield setup, min(times) / rivals[ours].ms

    def least(self, ours: str, theirs: str | None, **wanted: Any) -> float | None:
        return min(self.speedups(ours, theirs, **wanted).values(), default=None)

    def memory_pairs(self) -> list[tuple[Memory, Memory]]:
        """Eager's and the patched model's memory, for each model, batch size and dtype."""
        found: dict[tuple[str, int, str], dict[str, Memory]] = {}
        for memory in self.memory:
            found.setdefault((memory.model, memory.batch, memory.dtype), {})[memory.rival] = memory
        pairs = found.values()
        return [(pair[EAGER], pair[PATCHED]) for pair in pairs if EAGER in pair and PATCHED in pair]

    def as_json(self) -> dict[str, Any]:
        return {
            **self.facts,
            "wrong": self.wrong,
            "absent": self.absent,
            "memory": [asdict(memory) for memory in self.memory],
            "entries": [entry.as_json() for entry in self.entries],
        }
