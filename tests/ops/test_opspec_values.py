"""Every operator's outputs, gradients and running statistics beside its float64 reference."""

from __future__ import annotations

import pytest
from helpers import NATIVE, interpreted
from specs import CASES, each_on_backends, samples

from pooling_ext.functional import __all__ as functions
from pooling_ext.testing.checks import check_values

pytestmark = pytest.mark.usefixtures("convolutions_of_any_size")


@each_on_backends()
def test_values(backend, case):
    """In each dtype and layout; the same bits with gradients and without."""
    keeps_format = len(case.spec.wide) == 4 or (len(case.spec.wide) == 5 and (NATIVE or backend != "default"))
    shape = case.spec.small if interpreted(backend) else case.spec.wide
    for dtype, layout, grad_layout in samples(backend, case):
        try:
            check_values(case, case.tensors(shape, dtype, layout), keeps_format, grad_layout)
        except AssertionError as error:
            raise AssertionError(f"{dtype}, {layout}, the gradient {grad_layout}: {error}") from error


def test_every_function_has_a_spec():
    assert {case.spec.name for case in CASES} == set(functions)
    assert len({str(case) for case in CASES}) == len(CASES)
