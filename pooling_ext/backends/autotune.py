"""Which of several candidates for a call is fastest on this GPU: measured once, and remembered on disk.

The file is JSON for people to read and to delete: a section for each card, PyTorch and Triton version, in
it for each call the candidate that won, what each took, and which gave a wrong result.
``POOLING_EXT_TUNING_FILE`` names another file (by default ``pooling_ext/tuning.json`` in the user's cache
folder), ``POOLING_EXT_TUNE=0`` turns measuring off: then the first candidate is taken where nothing is
remembered.
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
from torch import Tensor
from torch.utils import _pytree as pytree

#: Runs to warm up, runs in a measurement, and measurements of which the median counts.
_WARM_UP, _RUNS, _REPEATS = 3, 5, 5

_choices: dict[tuple[str, str], str] = {}  # (card, call) -> candidate
_loaded: set[str] = set()  # cards
_lock = threading.RLock()  # what is measured may itself have parts to be measured


def fastest(call: str, candidates: Mapping[str, Callable[[], Any]], device: torch.device) -> str:
    """The name of the fastest of ``candidates`` for ``call`` on ``device``.

    Args:
        call: names what is done, shapes, dtypes and options included.
        candidates: functions of no arguments that do the same. The first is the one to fall back on.
        device: a CUDA device.

    Returns:
        What is remembered for the call if it is one of ``candidates``; else what is now measured and
        remembered: the fastest whose result is that of the first one that works, within rounding. Others
        are warned of. The first where measuring is turned off, or impossible since a CUDA graph is being
        captured.

    Raises:
        Exception: what the first candidate raised, if none worked.
    """
    card = card_name(device)
    known = recall(card, call)
    if known is not None and known in candidates:
        return known
    first = next(iter(candidates))
    if (
        len(candidates) == 1
        or os.environ.get("POOLING_EXT_TUNE") == "0"
        or torch.cuda.is_current_stream_capturing()
    ):
        return first
    with _lock:  # two threads that measure at a time would measure each other
        known = _choices.get((card, call))
        if known is not None and known in candidates:
            return known
        times, failures = measure(candidates, lambda candidate: milliseconds(candidate, device))
        if not times:
            raise failures[first]
        best, wrong = _fastest_right(call, candidates, times)
        _choices[card, call] = best
    remember(card, call, best, times, wrong)
    return best


def _fastest_right(
    call: str, candidates: Mapping[str, Callable[[], Any]], times: Mapping[str, float]
) -> tuple[str, dict[str, str]]:
    """The fastest that agrees with the first of those that work; and what is wrong with faster ones."""
    reference = next(iter(times))
    expected: Any = None
    wrong: dict[str, str] = {}
    for name in sorted(times, key=lambda candidate: times[candidate]):
        if name == reference:
            break
        try:
            if expected is None:
                expected = candidates[reference]()
            reason = difference(candidates[name](), expected)
        except Exception as error:  # there is memory for one result, say, but not for two
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            return name, wrong
        wrong[name] = reason
        warnings.warn(
            f"pooling_ext does not take {name!r} for {call}, since its result differs from that of "
            f"{reference!r}: {reason}",
            stacklevel=2,
        )
    return reference, wrong


def measure(
    candidates: Mapping[str, Callable[[], Any]], clock: Callable[[Callable[[], Any]], float]
) -> tuple[dict[str, float], dict[str, Exception]]:
    """What ``clock`` says of each candidate, and what those that do not work raised."""
    times: dict[str, float] = {}
    failures: dict[str, Exception] = {}
    for name, candidate in candidates.items():
        try:
            times[name] = clock(candidate)
        except Exception as error:  # a configuration that needs more than the card has, say
            failures[name] = error
    return times, failures


#: How far results of two candidates may lie apart, each element against its size and the tensor's root mean
#: square. A few roundings in 16 bits; in float32, TF32's and Winograd's.
ROUNDING = {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8, torch.float32: 2.0**-8, torch.float64: 1e-6}
#: The part of the elements that may lie farther: those a ReLU's mask switched on or off by a rounding.
SWITCHED = 1e-4
#: Elements that are compared at a time, in float32.
_AT_ONCE = 1 << 24


def difference(result: Any, expected: Any) -> str | None:
    """In what ``result`` differs from ``expected`` by more than rounding, or None.

    Args:
        result, expected: tensors, and sequences of them; all else is not compared. Where ``expected`` is not
            finite, ``result`` may be anything. The coarsest dtype among the tensors says what is rounding.
    """
    found, right = pytree.tree_leaves(result), pytree.tree_leaves(expected)
    pairs = [pair for pair in zip(found, right, strict=True) if isinstance(pair[1], Tensor)]
    allowed = max((ROUNDING.get(theirs.dtype, 0.0) for _, theirs in pairs), default=0.0)
    for number, (ours, theirs) in enumerate(pairs):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            kinds = (f"{x.dtype} {tuple(x.shape)}" for x in (ours, theirs))
            return f"output {number} is {' and not '.join(kinds)}"
        far = _far_elements(ours, theirs, allowed)
        if far > SWITCHED * theirs.numel():
            return f"{far} of {theirs.numel()} elements of output {number} are off by more than {allowed:.2g}"
    return None


def _far_elements(ours: Tensor, theirs: Tensor, allowed: float) -> int:
    if theirs.numel() == 0:
        return 0
    step = max(1, _AT_ONCE * theirs.shape[0] // theirs.numel()) if theirs.dim() else 1
    parts = list(zip(torch.atleast_1d(ours).split(step), torch.atleast_1d(theirs).split(step), strict=True))
    squares = sum(_finite(part).square().sum(dtype=torch.float64) for _, part in parts)
    scale = float((squares / theirs.numel()) ** 0.5)
    far = 0
    for mine, right in parts:
        near = (mine.double() if right.dtype == torch.float64 else mine.float()) - _finite(right)
        # NaN compares as false: where only ours is not finite it is far.
        close = near.abs() <= allowed * (_finite(right).abs() + scale)
        far += int((~(close | ~right.isfinite())).sum())
    return far


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x.double() if x.dtype == torch.float64 else x.float(), 0.0, 0.0, 0.0)


def milliseconds(candidate: Callable[[], Any], device: torch.device) -> float:
    """The median time of a call on the device's current stream."""
    for _ in range(_WARM_UP):
        candidate()
    stream = torch.cuda.current_stream(device)
    found = []
    for _ in range(_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        for _ in range(_RUNS):
            candidate()
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


def remember(
    card: str, call: str, best: str, times: Mapping[str, float], wrong: Mapping[str, str] | None = None
) -> None:
    """Write what was measured to the file, beside what other processes have written meanwhile.

    Where the file cannot be written the choice holds for this process, with a warning.
    """
    milliseconds = {candidate: float(f"{time:.4g}") for candidate, time in times.items()}
    entry: dict[str, Any] = {"fastest": best, "milliseconds": milliseconds}
    if wrong:
        entry["wrong"] = dict(wrong)
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
