"""Which of several ways to do one thing is fastest on this GPU: measured once, and remembered on disk.

The file is JSON for people to read and to delete: a section for each card, PyTorch and Triton version, in
it for each call the way that won and what each took. ``POOLING_EXT_TUNING_FILE`` names another file (by
default ``pooling_ext/tuning.json`` in the user's cache folder), ``POOLING_EXT_TUNE=0`` turns measuring off:
then the first way is taken where nothing is remembered.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

#: Runs to warm up, runs in a measurement, and measurements of which the median counts.
_WARM_UP, _RUNS, _REPEATS = 3, 5, 5

_choices: dict[tuple[str, str], str] = {}  # (card, call) -> way
_loaded: set[str] = set()  # cards
_lock = threading.RLock()  # what is measured may itself have parts to be measured


def fastest(call: str, ways: Mapping[str, Callable[[], Any]], device: torch.device) -> str:
    """The name of the fastest of ``ways`` to do ``call`` on ``device``.

    Args:
        call: names what is done, shapes, dtypes and options included.
        ways: functions of no arguments that do the same. The first is the one to fall back on.
        device: a CUDA device.

    Returns:
        What is remembered for the call if it is one of ``ways``; else what is now measured and remembered.
        The first where measuring is turned off, or impossible since a CUDA graph is being captured.

    Raises:
        Exception: what the first way raised, if no way worked.
    """
    card = card_name(device)
    known = recall(card, call)
    if known is not None and known in ways:
        return known
    first = next(iter(ways))
    if (
        len(ways) == 1
        or os.environ.get("POOLING_EXT_TUNE") == "0"
        or torch.cuda.is_current_stream_capturing()
    ):
        return first
    with _lock:  # two threads that measure at a time would measure each other
        known = _choices.get((card, call))
        if known is not None and known in ways:
            return known
        times, failures = measure(ways, lambda way: milliseconds(way, device))
        if not times:
            raise failures[first]
        best = min(times, key=lambda way: times[way])
        _choices[card, call] = best
    remember(card, call, best, times)
    return best


def measure(
    ways: Mapping[str, Callable[[], Any]], clock: Callable[[Callable[[], Any]], float]
) -> tuple[dict[str, float], dict[str, Exception]]:
    """What ``clock`` says of each way, and what those that do not work raised."""
    times: dict[str, float] = {}
    failures: dict[str, Exception] = {}
    for name, way in ways.items():
        try:
            times[name] = clock(way)
        except Exception as error:  # a configuration that needs more than the card has, say
            failures[name] = error
    return times, failures


def milliseconds(way: Callable[[], Any], device: torch.device) -> float:
    """The median time of a call on the device's current stream."""
    for _ in range(_WARM_UP):
        way()
    stream = torch.cuda.current_stream(device)
    found = []
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        for _ in range(_RUNS):
            way()
        end.record(stream)
        end.synchronize()
        found.append(start.elapsed_time(end) / _RUNS)
    return statistics.median(found)


@cache
def _versions() -> str:
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"torch {torch.__version__}, triton {triton}"


def card_name(device: torch.device) -> str:
    """The section of the file: card, PyTorch and Triton version."""
    return f"{torch.cuda.get_device_name(device)}, {_versions()}"


# --- the file ------------------------------------------------------------------------------------


def path() -> Path:
    """Where choices are remembered."""
    named = os.environ.get("POOLING_EXT_TUNING_FILE")
    if named:
        return Path(named)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pooling_ext" / "tuning.json"


def recall(card: str, call: str) -> str | None:
    """What won when ``call`` was measured, in this process or an earlier one."""
    if card not in _loaded:
        with _lock:
            for known, entry in _read(path()).get(card, {}).items():
                if isinstance(entry, dict) and isinstance(entry.get("fastest"), str):
                    _choices.setdefault((card, known), entry["fastest"])
            _loaded.add(card)
    return _choices.get((card, call))


def remember(card: str, call: str, best: str, times: Mapping[str, float]) -> None:
    """Write what was measured to the file, beside what other processes have written meanwhile.

    Where the file cannot be written the choice holds for this process, with a warning.
    """
    entry = {"fastest": best, "milliseconds": {way: float(f"{time:.4g}") for way, time in times.items()}}
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _locked(file):
            content = _read(file)
            content.setdefault(card, {})[call] = entry
            _replace(file, json.dumps(content, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        warnings.warn(f"pooling_ext cannot remember what is fastest on this GPU: {error}", stacklevel=2)


def forget() -> None:
    """Forget what this process knows, so that the file is read again."""
    with _lock:
        _choices.clear()
        _loaded.clear()


def _read(file: Path) -> dict[str, dict[str, Any]]:
    """The file's sections; none where there is no file, or what is in it is not ours."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"pooling_ext ignores {file}, which it cannot read: {error}", stacklevel=2)
        return {}
    if not isinstance(content, dict):
        return {}
    return {card: section for card, section in content.items() if isinstance(section, dict)}


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keep other processes that write ``file`` out; where there are no such locks the last one wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(file.with_name(file.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(file: Path, content: str) -> None:
    """Write ``file`` so that whoever reads it sees the old content or the new."""
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(content)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
