"""What the suites over operators' specs share: their cases on each backend, and what small inputs need."""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch
from helpers import NATIVE, interpreted

from pooling_ext.testing.opspec import LAYOUTS, OpCase, Tensors, cases
from pooling_ext.testing.specs import SPECS

CASES = cases(SPECS)
EACH = pytest.mark.parametrize("case", CASES, ids=str)
#: One of each operator and formula: those of other ranks differ in their windows alone.
OF_IMAGES = [case for case in CASES if len(case.spec.wide) == 4]
#: Operators that keep their dtype under autocast, and have kernels for meta tensors.
POOLS_AND_NORMS = [case for case in OF_IMAGES if not case.spec.autocast]
#: For an interpreter, a few thousand elements in a second: the first options of each operator.
FIRST = [next(iter(spec.cases())) for spec in SPECS if not next(iter(spec.cases())).spec.autocast]


def each_on_backends(images_alone: bool = False) -> pytest.MarkDecorator:
    """Parametrizes a test with ``backend`` and ``case``; GPUs, and their stand-ins, do no convolutions."""
    every = POOLS_AND_NORMS if images_alone else [case for case in CASES if not case.spec.autocast]
    of = {"default": CASES, "cuda": every, "triton": FIRST, "cuda-cuda": every, "triton-cuda": every}
    return pytest.mark.parametrize(
        ("backend", "case"),
        [
            pytest.param(name, case, id=f"{name}-{case}", marks=pytest.mark.gpu if "-" in name else ())
            for name, found in of.items()
            for case in found
        ],
        indirect=["backend"],
    )


def derivatives_of(case: OpCase) -> Tensors:
    """Small arguments in float64, without what training updates."""
    return case.tensors(case.spec.small, torch.float64, buffers=False)


def samples(backend: str, case: OpCase) -> list[tuple[torch.dtype, str, str]]:
    """Dtypes with layouts of the input and of the output's gradient.

    Every pair of the first two; in the interpreter each of them once.
    """
    dtypes = case.spec.dtypes
    if backend == "default" and not NATIVE:  # PyTorch sums 16 bits in 16 bits, and pools them in few ranks
        dtypes = tuple(dtype for dtype in dtypes if dtype in (torch.float32, torch.float64))
    pairs = list(product(dtypes, LAYOUTS))
    if interpreted(backend):
        count = max(len(dtypes), len(LAYOUTS))
        pairs = [(dtypes[i % len(dtypes)], LAYOUTS[i % len(LAYOUTS)]) for i in range(count)]
    grads = cycle(("contiguous", "channels_last", "expanded", "sliced", "contiguous"))
    return [(*pair, grad) for pair, grad in zip(pairs, grads, strict=False)]
