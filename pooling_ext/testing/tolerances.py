"""How far a result may lie from a float64 reference, for each dtype.

Kernels accumulate in float32 (float64 for float64) and round once to the output's dtype. So the
relative tolerance is that of the dtype, about one unit in the last place for the 16-bit ones, and the
absolute one that of the float32 sums, which shows where large terms cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """``|actual - expected| <= atol + rtol * |expected|``."""

    rtol: float
    atol: float


EXACT = Tolerance(0.0, 0.0)

TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-12, 1e-13),
    torch.float32: Tolerance(5e-6, 2e-6),
    torch.bfloat16: Tolerance(2**-7, 2e-6),
    torch.float16: Tolerance(2**-10, 2e-6),
}


def tolerance(dtype: torch.dtype) -> Tolerance:
    """The tolerance for sums and averages in ``dtype``; integers are exact."""
    return TOLERANCES.get(dtype, EXACT)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    exact: bool = False,
    scale: float = 1.0,
    what: str = "",
    slack: float = 0.0,
) -> None:
    """Compare ``actual`` with a reference of the same shape, which is first rounded to ``actual``'s dtype.

    Args:
        actual: what a kernel made.
        expected: the reference, as a rule float64; shapes must agree, dtypes need not.
        exact: allow no difference at all. NaNs are equal to each other either way.
        scale: multiplies the tolerance, for sums of large magnitude.
        what: named in the error.
        slack: allowed beyond the tolerance, where terms of a sum were rounded before.

    Raises:
        AssertionError: the shapes differ, or the values differ by more than the tolerance.
    """
    rtol, atol = EXACT if exact else tolerance(actual.dtype)
    torch.testing.assert_close(
        actual,
        expected.to(actual.dtype),
        rtol=rtol * scale,
        atol=atol * scale + slack,
        equal_nan=True,
        check_stride=False,
        msg=(lambda text: f"{what}: {text}") if what else None,
    )
