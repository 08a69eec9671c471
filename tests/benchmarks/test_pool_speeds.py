"""The speeds of pooling that the benchmarks set out to reach, in short."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")

from benchmarks.harness.suite import LAYOUTS
from benchmarks.harness.timing import measure
from benchmarks.reports import targets
from pooling_ext.backends import cpu_library
from pooling_ext.testing.shapes import CASES

pytestmark = [pytest.mark.native, pytest.mark.timing, pytest.mark.no_poison]

NAMED = {case.name: case for case in CASES}
GOALS = {target.what: target for target in targets.POOL}
#: A machine that is busy, or has another balance of memory and processor, does not decide.
MARGIN, TURNS, SECONDS = 1.25, 5, 0.3


@pytest.fixture(autouse=True)
def _skip_without_vectors():
    if cpu_library.module.isa == "baseline":
        pytest.skip("the goals are for AVX2 and AVX-512")


def ratios(theirs: Callable[[], Tensor], ours: Callable[[], Tensor], enough: Callable[[float], bool]):
    """Their time over ours, measured till it is enough."""
    found = []
    with torch.no_grad():
        for _ in range(TURNS):
            times = measure({"theirs": theirs, "ours": ours}, SECONDS)
            found.append(times["theirs"].ms / times["ours"].ms)
            if enough(found[-1]):
                break
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maximum_over_reading_once(layout):
    case, goal = NAMED["resnet-stem"], GOALS["ResNet stem max forward, time over reading once, float32"].goal
    x = torch.randn(case.shape).contiguous(memory_format=LAYOUTS[layout])
    flat, pool = torch.randn(x.numel()), case.ours()
    found = ratios(flat.sum, lambda: pool(x), lambda ratio: 1 / ratio <= goal * MARGIN)
    assert 1 / max(found) <= goal * MARGIN, found


@pytest.mark.parametrize("name", ["resnet-stem-avg", "densenet-transition", "inception-avg", "inception-aux"])
def test_average_of_bfloat16(name):
    case, goal = NAMED[name], GOALS["average forward, NHWC bfloat16, slowest"].goal
    x = torch.randn(case.shape).bfloat16().contiguous(memory_format=torch.channels_last)
    theirs, ours = case.torch(), case.ours()
    found = ratios(lambda: theirs(x), lambda: ours(x), lambda ratio: ratio >= goal)
    assert max(found) >= goal / MARGIN, found


@pytest.mark.parametrize("name", ["resnet-gap", "large-gap"])
def test_global_average(name):
    case, goal = NAMED[name], GOALS["global average forward, NCHW float32"].goal
    x = torch.randn(case.shape)
    theirs, ours = case.torch(), case.ours()
    found = ratios(lambda: theirs(x), lambda: ours(x), lambda ratio: ratio >= goal)
    assert max(found) >= goal / MARGIN, found
