"""Under ``CI=1`` a test that is skipped for want of a package fails: there everything is installed.

Such a skip is ``pytest.importorskip``'s, be it of a test or of a whole file.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

#: How its reason begins.
MISSING = "could not import"


def fail_if_missing(report: Any) -> Any:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if MISSING in reason:
            report.outcome = "failed"
            report.longrepr = f"{reason}, and CI is set: no test may be skipped for want of a package"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    return fail_if_missing(report) if os.environ.get("CI") else report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    return fail_if_missing(report) if os.environ.get("CI") else report
