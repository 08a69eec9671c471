"""Docstrings of public names: they have the sections that a reader needs, and their examples run."""

from __future__ import annotations

import doctest
import inspect
import re

import pytest
import torch

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.backends import Decision, Explanation
from pooling_ext.graph.report import FusionEntry
from pooling_ext.memory import MemoryReuse, is_cpu_memory_reused, stop_reusing_cpu_memory

TENSORS = {f"F.{name}": getattr(F, name) for name in F.__all__}
TENSORS |= {name: getattr(pooling_ext, name) for name in pooling_ext.nn.__all__}
#: Those that take models, and classes of results and errors.
OTHERS = {
    name: getattr(pooling_ext, name)
    for name in pooling_ext.__all__
    if name not in TENSORS and not inspect.ismodule(getattr(pooling_ext, name))
}
PUBLIC = TENSORS | OTHERS
#: A section that a name does without: it has nothing of the kind.
WITHOUT = {
    "unpatch": {"Returns"},
    "reuse_cpu_memory": {"Args", "Raises"},
}


def sections_of(public: object) -> list[str]:
    return re.findall(r"^([A-Z][a-z]+):$", inspect.getdoc(public) or "", flags=re.M)


@pytest.mark.parametrize("name", TENSORS)
def test_functions_and_modules_have_all_sections(name):
    """In this order, after a summary."""
    assert sections_of(TENSORS[name]) == ["Args", "Shape", "Returns", "Raises", "Example"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_have_all_sections_but_shape(name):
    found = sections_of(OTHERS[name])
    if inspect.isclass(OTHERS[name]):
        is_error = issubclass(OTHERS[name], (Exception, Warning))
        assert found == (["Example"] if is_error else ["Attributes", "Example"])
    else:
        wanted = ["Args", "Returns", "Raises", "Example"]
        assert found == [section for section in wanted if section not in WITHOUT.get(name, ())]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_summary_is_one_line_that_ends(name):
    doc = inspect.getdoc(PUBLIC[name]) or ""
    assert re.match(r"\S[^\n]+\.(\n\n|$)", doc), doc.splitlines()[:2]


@pytest.mark.parametrize(
    "name", [*TENSORS, "patch", "unpatch", "freeze", "accelerate", "explain", "use_backend"]
)
def test_every_argument_is_described(name):
    public = PUBLIC[name]
    doc = inspect.getdoc(public) or ""
    args = doc.partition("Args:\n")[2].partition("\n\n")[0]
    parameters = [p for p in inspect.signature(public).parameters if p not in ("self", "function")]
    if name in ("Conv1d", "Conv2d", "Conv3d"):
        parameters = ["in_channels"]  # the others are PyTorch's, as it says
    assert [p for p in parameters if not re.search(rf"\b{p}\b", args)] == []


@pytest.mark.parametrize("kind", ["max_pool{}d", "avg_pool{}d", "lp_pool{}d", "adaptive_max_pool{}d"])
def test_help_is_as_full_in_every_dimension(kind):
    lines = [len((inspect.getdoc(getattr(F, kind.format(rank))) or "").splitlines()) for rank in (1, 2, 3)]
    divisor = "avg" in kind and "adaptive" not in kind  # which PyTorch's avg_pool1d does not have
    assert lines == [lines[1] - divisor, lines[1], lines[1]]


def test_dimensions_are_those_of_the_function():
    """So that one template does not tell of another function's axes."""
    one, two, three = (inspect.getdoc(getattr(F, f"max_pool{rank}d")) or "" for rank in (1, 2, 3))
    assert "(N, C, L)" in one and "(N, C, H, W)" in two and "(N, C, D, H, W)" in three
    assert "kH" not in one and "kD" not in two and "max_unpool3d" in three


@pytest.mark.native
@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name):
    names = {"torch": torch, "nn": torch.nn, "F": F, "pooling_ext": pooling_ext}
    tests = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs=names)
    reused = is_cpu_memory_reused()
    torch.manual_seed(0)
    written: list[str] = []
    try:
        assert sum(len(test.examples) for test in tests) > 0
        runner = doctest.DocTestRunner()
        for test in tests:
            runner.run(test, out=written.append)
    finally:
        if not reused:
            stop_reusing_cpu_memory()
    assert runner.failures == 0, "".join(written)


@pytest.mark.parametrize("public", [Decision, Explanation, FusionEntry, MemoryReuse])
def test_what_public_functions_return_is_described(public):
    """Not the signature that a dataclass gets for want of a docstring."""
    doc = public.__doc__ or ""
    assert len(doc) > 30 and not doc.startswith(f"{public.__name__}(")
