"""Runs steps one after the other, each in processes of its own and within its time, whatever they do."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS, LOG = "results.jsonl", "log.txt"
#: Names the file to which a step's processes may add lines of JSON by themselves.
LINES = "POOLING_EXT_GPU_LINES"
#: Seconds from the request to end until a process is killed; what a killed one may take to be gone.
GRACE, GONE = 3.0, 5.0
#: Seconds that a worker may take to start, beside those of its first item.
START = 45.0
_POLL = 0.05


@dataclass(frozen=True)
class Step:
    """A part of a run.

    Attributes:
        name: unique in its run.
        seconds: its part of the run's time. What the steps before left over is added.
        command: what to run; of a worker, what its items are added to.
        items: what a worker is to do, one after the other. A new one goes on after an item that broke it.
        item_seconds: the most that one of them may take.
        lanes: how many workers share the items.
        program: what the command needs on PATH; the step is left out without it.
        environment: variables added to the process's.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    items: tuple[str, ...] = ()
    item_seconds: float = 20.0
    lanes: int = 1
    program: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Runner:
    """Runs steps and writes what they find.

    Args:
        folder: where ``results.jsonl`` and ``log.txt`` are written.
        report: is called after each step, to make what is made of the lines.
        clock: seconds that only grow.
    """

    def __init__(
        self, folder: Path, report: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder, self.report, self.clock = folder, report, clock
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()

    def line(self, **content: Any) -> None:
        with self._lock, (self.folder / RESULTS).open("a") as file:
            file.write(json.dumps(content) + "\n")

    def run(self, steps: Sequence[Step]) -> bool:
        """Run ``steps``; false if one of them did not end well."""
        deadline = self.clock()
        well = True
        for step in steps:
            deadline += step.seconds
            start = self.clock()
            try:
                status = self._run(step, deadline)
            except Exception as error:  # the others are of interest too
                status = f"failed: {type(error).__name__}: {error}"
            self.line(step=step.name, status=status, seconds=round(self.clock() - start, 1))
            well &= status == "ok" or status.startswith("left out")
            self.report()
        return well

    def _run(self, step: Step, deadline: float) -> str:
        if step.program is not None and shutil.which(step.program) is None:
            return f"left out: there is no {step.program}"
        if deadline - self.clock() <= GRACE:
            return "not begun: no time was left"
        self.line(step=step.name, begins=True)
        with (self.folder / LOG).open("a") as log:
            log.write(f"\n==== {step.name}: {' '.join(step.command)}\n")
            log.flush()
            if not step.items:
                return self._command(step, log, deadline)
            statuses: list[str] = []
            lanes = [
                threading.Thread(
                    target=lambda part=part: statuses.append(self._lane(step, part, log, deadline))
                )
                for part in (step.items[lane :: step.lanes] for lane in range(step.lanes))
                if part
            ]
            for lane in lanes:
                lane.start()
            for lane in lanes:
                lane.join()
            return next((status for status in statuses if status != "ok"), "ok")

    def _start(self, step: Step, command: Sequence[str], log: IO[str], output: Any) -> subprocess.Popen[str]:
        lines = {LINES: str((self.folder / RESULTS).resolve())}
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | lines | step.environment
        # A session of its own, so that what it starts ends with it.
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=log,
            text=True, start_new_session=True,
        )  # fmt: skip

    def _command(self, step: Step, log: IO[str], deadline: float) -> str:
        process = self._start(step, step.command, log, log)
        while process.poll() is None:
            if self.clock() > deadline - GRACE:
                # pytest writes its report then.
                _end(process, signal.SIGINT, GRACE)
                return "timed out"
            time.sleep(_POLL)
        _end(process, signal.SIGKILL, GONE)  # what it left behind
        return "ok" if process.returncode == 0 else _status(process.returncode)

    def _lane(self, step: Step, items: Sequence[str], log: IO[str], deadline: float) -> str:
        """Have workers do ``items``; one that ends or hangs in the midst of them is followed by another."""
        left: list[str] = list(items)
        failed: list[str] = []
        while left:
            if self.clock() > deadline - GRACE:
                self.line(step=step.name, not_begun=left)
                return "timed out"
            done, current, why = self._worker(step, left, log, deadline, failed)
            if current is None and why is not None:
                self.line(step=step.name, not_begun=left[done:], why=why)
                return why
            if why is not None:
                self.line(step=step.name, item=current, status=why)
                failed.append(str(current))
                done += 1
            left = left[done:]
        return f"failed: {len(failed)} of {len(items)}" if failed else "ok"

    def _worker(
        self, step: Step, items: Sequence[str], log: IO[str], deadline: float, failed: list[str]
    ) -> tuple[int, str | None, str | None]:
        """How many items one worker did, at which it ended and why; None for both where it did all.

        Those that it says have failed are added to ``failed``.
        """
        process = self._start(step, [*step.command, *items], log, subprocess.PIPE)
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        done, current = 0, None
        limit = self.clock() + START + step.item_seconds
        while True:
            try:
                text = lines.get(timeout=_POLL)
            except queue.Empty:
                if process.poll() is not None:
                    reader.join(_POLL)
                    if not reader.is_alive() and lines.empty():
                        break
                if self.clock() > min(limit, deadline - GRACE):
                    _end(process, signal.SIGKILL, GONE)
                    return done, current, "timed out"
                continue
            if text is None:
                break
            content = _json(text)
            if content is None:
                log.write(text)
                log.flush()
            elif "begin" in content:
                current, limit = content["begin"], self.clock() + step.item_seconds
            else:
                self.line(step=step.name, **content)
                if "status" in content:
                    failed += [] if content["status"] == "ok" else [str(current)]
                    done, current, limit = done + 1, None, self.clock() + step.item_seconds
        with suppress(subprocess.TimeoutExpired):
            process.wait(GONE)
        _end(process, signal.SIGKILL, GONE)
        # One that ends itself between two items does so since the GPU takes nothing more from it.
        if current is None and done:
            return done, None, None
        return done, current, _status(process.returncode)


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for text in stream:
        lines.put(text)
    lines.put(None)


def _json(text: str) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _status(returncode: int | None) -> str:
    if returncode is not None and returncode < 0:
        return f"crashed: signal {-returncode}"
    return f"failed: exit status {returncode}"


def _end(process: subprocess.Popen[str], first: int, seconds: float) -> None:
    """Ask a process and all that it started to end, and see to it after ``seconds``."""
    for number in (first, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGKILL:
            return


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)
