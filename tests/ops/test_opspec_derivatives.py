"""Every operator's derivatives: both modes and orders against differences, torch.func, checkpoints."""

from __future__ import annotations

import pytest
import torch
from helpers import interpreted
from specs import EACH, OF_IMAGES, derivatives_of, each_on_backends

from pooling_ext.testing import checks
from pooling_ext.testing.opspec import ACTIVATIONS, with_layout

pytestmark = pytest.mark.usefixtures("convolutions_of_any_size")
OF_EACH_KIND = pytest.mark.parametrize("case", OF_IMAGES, ids=str)


@each_on_backends(images_alone=True)
def test_first_derivatives(backend, case):
    checks.check_first_derivatives(case, derivatives_of(case), fast=interpreted(backend))


@EACH
def test_second_derivatives(case):
    checks.check_second_derivatives(case, derivatives_of(case))


@OF_EACH_KIND
@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced", "expanded"])
def test_derivatives_of_layouts(case, layout):
    """Those of the same values in another layout are the same, to the order of additions."""
    tensors = derivatives_of(case)
    for name in tensors.keys() & set(ACTIVATIONS):  # each sample as the first, as an expanded one is
        tensors[name] = tensors[name][:1].repeat(len(tensors[name]), 1, 1, 1)
    checks.check_layout(case, tensors, layout)


@OF_EACH_KIND
def test_transforms(case):
    checks.check_transforms(case, derivatives_of(case))


@EACH
def test_outputs_may_be_written_in_place(case):
    for dtype in set(case.spec.dtypes) & {torch.float32, torch.bfloat16}:
        for layout in ("contiguous", "channels_last"):
            tensors = case.tensors(case.spec.wide, dtype, buffers=False)
            moved = {n: with_layout(x, layout) if n in ACTIVATIONS else x for n, x in tensors.items()}
            checks.check_written_in_place(case, moved)


@OF_EACH_KIND
def test_checkpointing(case):
    checks.check_checkpointing(case, derivatives_of(case))


@pytest.mark.parametrize(
    "case", [case for case in OF_IMAGES if "relu" in case.spec.name or "norm_act" in case.spec.name], ids=str
)
def test_memory_is_released(case):
    checks.check_released(case, derivatives_of(case))


@OF_EACH_KIND
def test_gradient_penalty(case):
    for dtype in (torch.float32, torch.bfloat16):
        if dtype in case.spec.dtypes:
            checks.check_gradient_penalty(case, case.tensors(case.spec.small, dtype, buffers=False))
