"""A pytest plugin: each test's outcome as a line of JSON when it is known, and no test on a broken GPU.

After an access out of bounds every call of CUDA fails in that process. pytest-xdist starts another in place
of one that ends, so a process that can no longer use the GPU ends itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from typing import Any

import pytest
import torch

from .runner import LINES


def _line(**content: Any) -> None:
    if LINES in os.environ:
        with open(os.environ[LINES], "a") as file:
            file.write(json.dumps(content) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.failed or report.when == "call":
        more = {} if report.passed else {"message": _message(report)}
        _line(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), **more)
    if report.failed and os.environ.get("PYTEST_XDIST_WORKER") and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(1)
    return report


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr)[:300]
