"""Every operator under torch.compile, torch.export, fake tensors and autocast; opcheck of what is below."""

from __future__ import annotations

import pytest
import torch
from helpers import LAYOUTS, NATIVE, require_native, with_layout
from specs import OF_IMAGES, POOLS_AND_NORMS

from pooling_ext.testing import checks
from pooling_ext.testing.specs import SPECS

pytestmark = pytest.mark.usefixtures("fresh_compiler", "convolutions_of_any_size")
OF_EACH_KIND = pytest.mark.parametrize("case", OF_IMAGES, ids=str)
EACH_POOL_AND_NORM = pytest.mark.parametrize("case", POOLS_AND_NORMS, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def sides(case, *sizes):
    """The case's small shape with other sides."""
    return [(batch, case.spec.small[1], *rest) for batch, *rest in sizes]


# Modules under functional_call are not compiled; test_a_network compiles conv_bn_act.
@pytest.mark.parametrize("case", [case for case in OF_IMAGES if case.spec.name != "conv_bn_act"], ids=str)
def test_compiled(case):
    checks.check_compiled(case, sides(case, (2, 9, 11)))


@EACH_POOL_AND_NORM
def test_compiled_with_dynamic_shapes(case):
    """One compilation serves all sizes alike in parity, in up to 255 elements, in uneven adaptive windows."""
    graphs = checks.check_compiled(case, sides(case, (2, 10, 11), (4, 14, 13), (3, 8, 17)))
    # One for inference, one for training.
    assert graphs == 2 or not NATIVE


@OF_EACH_KIND
def test_exported(case):
    checks.check_exported(case, case.spec.small)


@DTYPES
@EACH_POOL_AND_NORM
def test_meta_and_fake_tensors(case, dtype):
    if dtype == torch.bfloat16:
        require_native()
    for layout in LAYOUTS:
        for shape in (case.spec.small, (0, *case.spec.small[1:])):
            checks.check_fake(case, case.tensors(shape, dtype, layout))
    if case.spec.takes_unbatched:
        checks.check_fake(case, case.tensors(case.spec.small[1:], dtype))


@DTYPES
@EACH_POOL_AND_NORM
def test_autocast_leaves_the_dtype_alone(case, dtype):
    if dtype == torch.bfloat16:
        require_native()
    checks.check_autocast(case, case.tensors(case.spec.small, dtype))


LOW_LEVEL = [call for spec in SPECS for call in spec.low_level()] if NATIVE else []


@pytest.mark.native
@pytest.mark.parametrize("call", LOW_LEVEL, ids=lambda call: call[0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_low_level(call, layout):
    # What winograd_weight makes (36 points of a tile) has a layout of its own.
    label, op, args = call
    planes = [isinstance(a, torch.Tensor) and a.dim() > 2 and a.shape[1] != 36 for a in args]
    args = tuple(with_layout(a, layout) if p else a for a, p in zip(args, planes, strict=True))
    checks.check_low_level((label, op, args))


@pytest.mark.native
def test_every_low_level_operator_has_a_sample():
    names = {
        name.removeprefix("pooling_ext::")
        for name in torch._C._dispatch_get_all_op_names()
        if "pooling_ext::" in name
    }
    # Those of GPUs alone are checked where Triton's interpreter runs them, in test_conv_corners.py.
    names = {
        name
        for name in names
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"pooling_ext::{name}", "CPU")
    }
    assert names == {op._qualified_op_name.removeprefix("pooling_ext::") for _, op, _ in LOW_LEVEL}
