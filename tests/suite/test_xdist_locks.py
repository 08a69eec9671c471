"""How the suite's processes take turns; threads with files of their own stand in for them."""

from __future__ import annotations

import fcntl
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from xdist_locks import Sharing, once


def item(*marks: str) -> SimpleNamespace:
    return SimpleNamespace(get_closest_marker=lambda name: name in marks or None)


@pytest.mark.usefixtures("one_thread")
def test_who_is_to_run_alone_does(tmp_path, monkeypatch):
    """The others do not wait for each other; one that is alone waits, and holds up those that come later."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    running: list[str] = []
    log: list[tuple[str, list[str]]] = []
    leave = {name: threading.Event() for name in ("first", "second", "alone", "late")}

    def run(name: str) -> None:
        turn = Sharing(tmp_path).pytest_runtest_protocol(item("timing") if name == "alone" else item())
        next(turn)
        log.append((name, [*running]))
        running.append(name)
        assert leave[name].wait(60)
        running.remove(name)
        with pytest.raises(StopIteration):
            next(turn)

    threads = {name: threading.Thread(target=run, args=(name,)) for name in leave}

    def start(name: str, is_up: Callable[[], bool]) -> None:
        threads[name].start()
        deadline = time.monotonic() + 60
        while not is_up() and time.monotonic() < deadline:
            time.sleep(0.01)

    def gate_is_shut() -> bool:
        with (tmp_path / "gate.lock").open("w") as gate:
            try:
                fcntl.flock(gate, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    start("first", lambda: "first" in running)
    start("second", lambda: "second" in running)
    assert log == [("first", []), ("second", ["first"])]
    start("alone", gate_is_shut)
    start("late", lambda: True)
    leave["first"].set()
    threads["first"].join(60)
    time.sleep(0.1)
    assert len(log) == 2
    leave["second"].set()
    leave["alone"].set()
    leave["late"].set()
    for thread in threads.values():
        thread.join(60)
    assert log[2:] == [("alone", []), ("late", [])]


def test_what_is_made_once(tmp_path):
    calls = []

    def make() -> str:
        calls.append(1)
        time.sleep(0.1)
        return "made"

    found = []
    threads = [threading.Thread(target=lambda: found.append(once(tmp_path / "it", make))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == ["made"] * 3 and calls == [1]
