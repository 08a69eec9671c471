"""Checks many programs, in processes of their own: a crash is a fault too, and what patch keeps is let go."""

from __future__ import annotations

import collections
import multiprocessing
import time
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from .compare import SIDES, Fault, Verdict, check, strict
from .models import generate
from .source import Rejected, Source

#: How many programs PyTorch may reject before a seed is given up.
ATTEMPTS = 20
_PIECE = 250


@dataclass
class Summary:
    """What became of the graphs that ran.

    Attributes:
        graphs, fused: how many there were, and in how many something was fused.
        rejected: programs that PyTorch did not run; the next attempt of the seed took their place.
        faults: by seed.
        refused: freeze's reasons by seed, and the tags that explain them.
    """

    graphs: int = 0
    fused: int = 0
    rejected: int = 0
    faults: dict[int, list[Fault]] = field(default_factory=dict)
    refused: dict[int, tuple[str, frozenset[str]]] = field(default_factory=dict)

    def add(self, seed: int, tags: frozenset[str], rejected: int, verdict: Verdict) -> None:
        self.graphs += 1
        self.fused += verdict.fused
        self.rejected += rejected
        if verdict.faults:
            self.faults[seed] = verdict.faults
        if verdict.refused is not None:
            self.refused[seed] = verdict.refused, tags

    @property
    def refused_without_cause(self) -> dict[int, str]:
        """The refusals of programs that keep no state and draw no random numbers."""
        return {seed: why for seed, (why, tags) in self.refused.items() if not tags & {"state", "random"}}

    def __str__(self) -> str:
        graphs = max(self.graphs, 1)
        lines = [
            f"{self.graphs} graphs, {100 * self.fused / graphs:.1f}% with something fused; "
            f"{self.rejected} programs that PyTorch does not run",
            f"{len(self.faults)} graphs differ",
            f"freeze refused {len(self.refused)} ({100 * len(self.refused) / graphs:.2f}%), "
            f"{len(self.refused_without_cause)} of them without state or random numbers",
        ]
        kinds: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
        for seed, faults in self.faults.items():
            for fault in faults:
                kinds[fault.stage, fault.what].append(seed)
        for (stage, what), seeds in sorted(kinds.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(seeds):5d}  {stage}: {what}; seeds {', '.join(map(str, seeds[:8]))}")
        reasons: dict[str, list[int]] = collections.defaultdict(list)
        for seed, (why, _) in self.refused.items():
            reasons[why[:90]].append(seed)
        for why, seeds in sorted(reasons.items(), key=lambda item: -len(item[1])):
            lines.append(f"  {len(seeds):5d}  refused: {why}; seeds {', '.join(map(str, seeds[:8]))}")
        return "\n".join(lines)


def check_seed(
    seed: int, layout: bool = False, sides: tuple[str, ...] = SIDES
) -> tuple[Source, int, Verdict]:
    """The program of ``seed``, how many attempts PyTorch rejected before it, and what became of it."""
    for attempt in range(ATTEMPTS):
        source = generate(seed, attempt)
        try:
            return source, attempt, check(source, seed, layout, sides)
        except Rejected:
            continue
    raise Rejected(f"PyTorch runs none of {ATTEMPTS} programs of seed {seed}")


def run(seeds: range, layout: bool = False, sides: tuple[str, ...] = SIDES, progress: bool = True) -> Summary:
    """Check the programs of ``seeds`` in pieces, each in a forked process."""
    summary = Summary()
    began, left = time.monotonic(), collections.deque(range(seeds.start, seeds.stop, _PIECE))
    bounds = {first: min(first + _PIECE, seeds.stop) for first in left}
    while left:
        first = left.popleft()
        end = bounds[first]
        crashed = _piece(summary, first, end, (layout, sides), progress)
        if crashed is not None and crashed + 1 < end:
            left.appendleft(crashed + 1)
            bounds[crashed + 1] = end
        if progress:
            print(f"seed {end}: {len(summary.faults)} faults, {time.monotonic() - began:.0f} s", flush=True)
    return summary


def _piece(summary: Summary, first: int, end: int, options: tuple[Any, ...], progress: bool) -> int | None:
    """Check some seeds in a process; returns the one that ended it, if one did."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(send, first, end, options))
    worker.start()
    send.close()
    at = first
    try:
        while True:
            at, tags, rejected, verdict = receive.recv()
            if verdict is not None:
                summary.add(at, tags, rejected, verdict)
                if progress:
                    for fault in verdict.faults:
                        print(f"seed {at}: {fault}", flush=True)
                at += 1
    except EOFError:
        pass
    worker.join()
    if at == end:
        return None
    fault = Fault("process", f"ended by {worker.exitcode}", "see the output")
    summary.add(at, frozenset(), 0, Verdict([fault]))
    if progress:
        print(f"seed {at}: {fault}", flush=True)
    return at


def _work(send: Connection, first: int, end: int, options: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with strict():
        for seed in range(first, end):
            send.send((seed, None, None, None))  # so that whoever reads knows which one ended us
            try:
                source, rejected, verdict = check_seed(seed, *options)
            except Exception:
                traceback.print_exc()
                raise SystemExit(1) from None
            send.send((seed, source.tags, rejected, verdict))
    send.close()
