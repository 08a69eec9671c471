"""``pytest --quick``: a few cases of every test, for every day.

Nothing here names a test, so there is nothing to keep up. What is marked slow, large or timing is left out.
Of each other test's cases a few are run, evenly spread over the list of them.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

#: Cases of one test.
FEW = 3
LEFT_OUT = ("slow", "large", "timing")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="a few cases of every test that is not slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    chosen = set(few([item for item in items if not any(map(item.get_closest_marker, LEFT_OUT))]))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def few(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of each function's cases the first, the last and what lies evenly between."""
    cases: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    return [
        same[(len(same) - 1) * i // max(min(FEW, len(same)) - 1, 1)]
        for same in cases.values()
        for i in range(min(FEW, len(same)))
    ]
