"""What the tests of the CPU's direct convolutions, of images and depthwise, have in common.

Data are small integers wherever that is possible: sums are exact then, and results are compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FLOATS, dtype_id
from instruction_sets import run_on
from torch import Tensor

from pooling_ext.testing.tolerances import assert_close

LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "offset", "expanded")
EVERY_DTYPE = pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
BOTH_FORMATS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def every(cases: Iterable[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def assert_exact(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert_close(actual, expected, exact=True, what=what)


def assert_same_for_any_threads(
    every_result: Callable[[Any, torch.dtype, str], Iterable[Tensor]], cases: Iterable[Any], layout: str
) -> None:
    """That the results of ``cases`` have the same bits for one thread and for more."""
    threads = torch.get_num_threads()
    try:
        for case in cases:
            for dtype in (torch.float32, torch.bfloat16):
                torch.set_num_threads(1)
                expected = list(every_result(case, dtype, layout))
                for count in (2, 3, 64):
                    torch.set_num_threads(count)
                    for one, other in zip(every_result(case, dtype, layout), expected, strict=True):
                        assert torch.equal(one, other), (case, dtype, count)
    finally:
        torch.set_num_threads(threads)


def assert_passes_on(isa: str, file: str) -> None:
    """That a test file's ``check_every_instruction_set_case`` passes in a process that uses ``isa``."""
    path = Path(file)
    script = (
        f"import sys; sys.path.insert(0, {str(path.parent)!r})\n"
        f"import {path.stem} as tests\nfrom pooling_ext.backends import cpu_library\n"
        "tests.check_every_instruction_set_case()\nprint(cpu_library.module.isa)"
    )
    assert run_on(isa, script) == [isa]
