"""What the tests of conv2d compare by."""

from __future__ import annotations

from torch import Tensor

import pooling_ext

#: Of the largest element, in float32.
ERROR = 5e-5


def off(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max())


def taken(function, *args, **options) -> list[tuple[str, str]]:
    found = pooling_ext.explain(function, *args, **options).decisions
    return [(decision.op, decision.backend) for decision in found]
