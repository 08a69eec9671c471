"""Windows, values and layouts of the tests of CUDA's kernels that pool maxima."""

from __future__ import annotations

import pytest
import torch
from helpers import dtype_id

WINDOWS = [(3, 2, 1), (2, 2, 0), (3, 1, 1)]
windows = pytest.mark.parametrize("window", WINDOWS, ids=lambda w: "k{}s{}p{}".format(*w))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
formats = pytest.mark.parametrize(
    "format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)
NAN, INF = float("nan"), float("inf")
VALUES = {
    # Few, so that maxima are tied; zeros of both signs; and what the fast comparison leaves to the exact one.
    "ties": [-1.0, 0.0, -0.0, 1.0],
    "nan": [NAN, -NAN, 1.0, 0.0, -0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "infinities": [INF, -INF, -INF, -INF, -INF, -INF, 1.0],
    "nan and infinities": [NAN, INF, -INF, -0.0, 0.0],
}


def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, format: torch.memory_format) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(VALUES[name], dtype=dtype)
    chosen = values[torch.randint(len(values), shape, generator=generator)]
    return chosen.to(memory_format=format)
