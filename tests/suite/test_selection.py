"""Which tests `pytest --quick` runs, and which skips are failures where CI is set."""

from __future__ import annotations

from types import SimpleNamespace

import packages
import pytest
import quick


class Item:
    def __init__(self, nodeid: str, *marks: str):
        self.nodeid, self.marks = nodeid, marks

    def get_closest_marker(self, mark: str) -> bool:
        return mark in self.marks


def chosen(*items: Item, asked: bool = True) -> list[str]:
    config = SimpleNamespace(
        getoption=lambda name: asked, hook=SimpleNamespace(pytest_deselected=lambda items: None)
    )
    left = list(items)
    quick.pytest_collection_modifyitems(config, left)  # type: ignore[arg-type]
    return [one.nodeid for one in left]


def test_a_few_cases_of_each_test():
    many = [Item(f"a.py::test[{i}]") for i in range(9)]
    assert chosen(*many) == ["a.py::test[0]", "a.py::test[4]", "a.py::test[8]"]
    assert chosen(*many[:2], Item("a.py::other"), Item("b.py::test[0]")) == [
        "a.py::test[0]",
        "a.py::test[1]",
        "a.py::other",
        "b.py::test[0]",
    ]


@pytest.mark.parametrize("mark", quick.LEFT_OUT)
def test_what_takes_long_is_left_out(mark):
    assert chosen(Item("a.py::long", mark), Item("a.py::short", "native")) == ["a.py::short"]


def test_everything_unless_asked():
    many = [Item(f"a.py::test[{i}]", "slow") for i in range(9)]
    assert len(chosen(*many, asked=False)) == 9


def test_want_of_a_package_fails():
    with pytest.raises(pytest.skip.Exception) as skipped:
        pytest.importorskip("no_such_package_as_this")
    reason = f"Skipped: {skipped.value}"
    report = packages.fail_if_missing(SimpleNamespace(outcome="skipped", longrepr=("a.py", 1, reason)))
    assert report.outcome == "failed" and "no_such_package_as_this" in report.longrepr
    for outcome, longrepr in (("skipped", ("a.py", 1, "Skipped: needs a GPU")), ("passed", None)):
        report = packages.fail_if_missing(SimpleNamespace(outcome=outcome, longrepr=longrepr))
        assert (report.outcome, report.longrepr) == (outcome, longrepr)
