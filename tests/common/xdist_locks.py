"""How the suite's processes share a machine where pytest-xdist runs several (``pytest -n auto``)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

#: Whether this is one of several processes.
WORKER = "PYTEST_XDIST_WORKER" in os.environ


class Sharing:
    """A process's part: one thread, but the whole machine for tests that measure time.

    Any number of tests hold the lock "tests" at a time, or one that is marked "timing". Each goes through
    "gate" before, where one that waits for the rest to end holds up all that come later. Of those that are
    marked "large" one runs at a time, with others beside it.
    """

    def __init__(self, folder: Path):
        """``folder`` is the run's, and the same in all its processes."""
        names = ("gate", "tests", "memory")
        self.gate, self.tests, self.memory = ((folder / f"{name}.lock").open("w") for name in names)
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # First those that measure, since no slow one holds them up then; then slow ones, since whoever is
        # done can take over some of the rest.
        items.sort(key=lambda item: (not marked(item, "timing"), not marked(item, "large", "slow")))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        alone, large = marked(item, "timing"), marked(item, "large")
        fcntl.flock(self.gate, fcntl.LOCK_EX)
        fcntl.flock(self.tests, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(self.gate, fcntl.LOCK_UN)
        if large:
            fcntl.flock(self.memory, fcntl.LOCK_EX)
        torch.set_num_threads(self.threads if alone else 1)
        try:
            return (yield)
        finally:
            fcntl.flock(self.memory, fcntl.LOCK_UN)
            fcntl.flock(self.tests, fcntl.LOCK_UN)


def marked(item: pytest.Item, *names: str) -> bool:
    return any(item.get_closest_marker(name) for name in names)


def once(path: Path, make: Callable[[], str]) -> str:
    """What ``make`` returns, which the first process to ask for ``path`` calls while others wait."""
    with path.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        if not text:
            text = make()
            file.write(text)
        return text
