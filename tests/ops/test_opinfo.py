"""PyTorch's own samples: what its pooling operators are tested with must give the same here."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import NATIVE, assert_same, dtype_id, has_empty_window, our_op

from pooling_ext.testing.tolerances import assert_close

pytest.importorskip("expecttest")  # which PyTorch's samples import
from torch.testing._internal.common_methods_invocations import op_db

OPS = {
    op.name.removeprefix("nn.functional."): op
    for op in op_db
    if re.fullmatch(r"nn\.functional\.(adaptive_)?(max|avg|lp)_pool[123]d", op.name)
}

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [(name, dtype) for name, op in sorted(OPS.items()) for dtype in sorted(op.dtypes, key=str)]


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def widen(result: Any) -> Any:
    return result.double() if isinstance(result, torch.Tensor) and result.is_floating_point() else result


def test_op_db_has_every_operator():
    assert set(OPS) == {f"{kind}_pool{rank}d" for kind in ("max", "avg") for rank in (1, 2, 3)} | {
        f"adaptive_{kind}_pool{rank}d" for kind in ("max", "avg") for rank in (1, 2, 3)
    }


@pytest.mark.parametrize("name, dtype", CASES, ids=dtype_id)
def test_samples(name, dtype):
    """Values, shapes, dtypes, strides and gradients.

    Averages in 16 bits are compared with PyTorch's in float64, since it rounds at every addition. So
    without the compiled kernels, which do not, they are not compared.
    """
    op, exact = OPS[name], "max" in name
    count = 0
    for sample in op.sample_inputs("cpu", dtype, requires_grad=dtype.is_floating_point):
        count += 1
        what = f"{name}({list(sample.input.shape)}, {sample.args}, {sample.kwargs})"
        expected = op.op(sample.input, *sample.args, **sample.kwargs)
        actual = our_op(name)(sample.input, *sample.args, **sample.kwargs)
        coarse = not NATIVE and dtype in (torch.bfloat16, torch.float16)
        empty = has_empty_window(name, sample.input, *sample.args, **sample.kwargs)
        if exact and not empty:
            assert_same(actual, expected, what)
        elif exact:
            # PyTorch's indices are out of range there, and its backward would write to them.
            assert_same(outputs(actual)[0], outputs(expected)[0], what)
        else:
            wide = op.op(widen(sample.input), *sample.args, **sample.kwargs)
            if not coarse:
                assert_close(actual, wide, what=what)
            assert_same(torch.zeros_like(actual), torch.zeros_like(expected), what)
        if not dtype.is_floating_point or not outputs(actual)[0].numel():
            continue
        grad = torch.randn(outputs(actual)[0].shape).to(dtype)
        (ours,) = torch.autograd.grad(outputs(actual)[0], sample.input, grad)
        assert ours.dtype == dtype and ours.isfinite().all(), what
        if empty or coarse:
            continue
        wide_input = sample.input.detach().double().requires_grad_()
        wide = outputs(op.op(wide_input, *sample.args, **sample.kwargs))[0]
        (theirs,) = torch.autograd.grad(wide, wide_input, grad.double())
        assert_close(ours, theirs, what=f"gradient of {what}")
    assert count > 0


@pytest.mark.parametrize("name", sorted(OPS))
def test_error_inputs(name):
    """What PyTorch refuses is refused, with a TypeError, a ValueError or PyTorch's own kind of error."""
    count = 0
    for error in OPS[name].error_inputs("cpu"):
        count += 1
        sample = error.sample_input
        with pytest.raises(Exception) as theirs:
            OPS[name].op(sample.input, *sample.args, **sample.kwargs)
        with pytest.raises((TypeError, ValueError, theirs.type)):
            our_op(name)(sample.input, *sample.args, **sample.kwargs)
    assert count > 0


@pytest.mark.parametrize("name", sorted(OPS))
def test_the_errors_are_those_that_code_for_pytorch_catches(name):
    """``except RuntimeError`` around a PyTorch call goes on working: values out of range are both."""
    for error in OPS[name].error_inputs("cpu"):
        sample = error.sample_input
        with pytest.raises(RuntimeError):
            our_op(name)(sample.input, *sample.args, **sample.kwargs)
