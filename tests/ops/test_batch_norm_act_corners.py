"""batch_norm_act: special values, determinism, backends and bad arguments."""

from __future__ import annotations

import pytest
import torch
from batch_norm_cases import (
    LAYOUT,
    RESIDUAL,
    TRAINING,
    arguments,
    assert_results,
    composition,
    expected,
    results,
)
from helpers import (
    BACKENDS,
    assert_same,
    run_python,
)

import pooling_ext
import pooling_ext.functional as F

# --- special values -------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize(
    "where, value",
    [(where, sign * float("inf")) for where in ("input", "residual", "bias") for sign in (1, -1)]
    # Not an infinite weight, with which PyTorch's result is a matter of its order of operations.
    + [(where, float("nan")) for where in ("input", "residual", "weight", "bias")],
)
@LAYOUT
@TRAINING
def test_nan_and_infinity(backend, training, layout, where, value):
    """They reach what they reach in PyTorch's operators."""
    tensors = arguments((3, 5, 4, 6), torch.float32, layout, residual=True)
    tensors[where] = tensors[where].clone()
    tensors[where][(1, 2, 3, 4) if where in ("input", "residual") else 2] = value
    grad = torch.randn(3, 5, 4, 6)
    actual = results(F.batch_norm_act, tensors, grad, training=training)
    theirs = results(composition, tensors, grad, training=training)
    for name, result in actual.items():
        torch.testing.assert_close(
            result, theirs[name], rtol=1e-4, atol=1e-4, equal_nan=True, check_stride=False, msg=name
        )


@BACKENDS
def test_overflow_to_infinity(backend):
    x = torch.tensor([6e4, -6e4, 1.0, 2.0], dtype=torch.float16).reshape(4, 1)
    output = F.batch_norm_act(x, torch.zeros(1), torch.full((1,), 0.25), eps=0.0, activation="identity")
    assert output.flatten().tolist() == [float("inf"), -float("inf"), 2.0, 4.0]


@BACKENDS
def test_a_channel_of_one_value(backend):
    """A variance of zero: the output is the bias, and the gradient finite."""
    tensors = arguments((3, 5, 4, 6))
    tensors["input"] = torch.full((3, 5, 4, 6), 1234.5)
    actual = results(F.batch_norm_act, tensors, training=True, activation="identity")
    assert_same(actual["output"], tensors["bias"].reshape(1, 5, 1, 1).expand(3, 5, 4, 6), "", False)
    assert actual["input"].isfinite().all()


# --- determinism ----------------------------------------------------------------------------------

THREADS = """
import hashlib, sys, torch
from batch_norm_cases import arguments, results
import pooling_ext.functional as F
def stem(input, weight, bias, running_mean, running_var, training, residual=None):
    return F.batch_norm_relu_max_pool(input, running_mean, running_var, weight, bias, training)
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    bits = hashlib.sha256()
    for function in (F.batch_norm_act, stem):
        for layout in ("contiguous", "channels_last"):
            for dtype in (torch.float32, torch.bfloat16):
                for shape in ((4, 19, 50, 50), (64, 70, 7, 7)):
                    tensors = arguments(shape, dtype, layout, residual=function is not stem)
                    for result in results(function, tensors, training=True).values():
                        bits.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    print(bits.hexdigest())
"""


@pytest.mark.native
def test_independent_of_the_number_of_threads():
    result = run_python(THREADS)
    assert result.returncode == 0, result.stderr
    assert len(set(result.stdout.split())) == 1


@BACKENDS
@LAYOUT
@RESIDUAL
def test_twice_gives_the_same_bits(backend, residual, layout):
    tensors = arguments((5, 19, 20, 20), torch.float32, layout, residual)
    grad = torch.randn(5, 19, 20, 20)
    first = results(F.batch_norm_act, tensors, grad, training=True)
    second = results(F.batch_norm_act, tensors, grad, training=True)
    for name, value in first.items():
        assert_same(value, second[name], name)


# --- backends and arguments -----------------------------------------------------------------------


@BACKENDS
def test_explain(backend):
    tensors = arguments((2, 3, 4, 4))
    explanation = pooling_ext.explain(F.batch_norm_act, **tensors)
    assert explanation.backend == backend.partition("-")[0]
    with pooling_ext.use_backend("aten"):
        explanation = pooling_ext.explain(F.batch_norm_act, **tensors)
    assert explanation.backend == "aten" and "'aten' was asked for" in str(explanation)


@RESIDUAL
@TRAINING
def test_the_aten_backend(training, residual):
    tensors = arguments((3, 5, 4, 6), residual=residual)
    with pooling_ext.use_backend("aten"):
        actual = results(F.batch_norm_act, tensors, training=training)
    assert_results(actual, expected(tensors, training=training))


GOOD = arguments((2, 3, 4, 4), residual=True)
ERRORS = [
    ({"weight": torch.ones(4)}, ValueError, r"weight.*\(3,\).*\(4,\)"),
    ({"bias": torch.ones(1, 3)}, ValueError, r"bias.*\(1, 3\)"),
    ({"running_mean": torch.ones(2)}, ValueError, "running_mean"),
    ({"running_var": torch.ones(4)}, ValueError, "running_var"),
    ({"running_mean": None}, ValueError, "running_mean"),
    ({"running_var": None}, ValueError, "running_var"),
    ({"residual": torch.ones(2, 3, 4, 5)}, ValueError, r"residual.*\(2, 3, 4, 5\)"),
    ({"activation": "mish"}, ValueError, "activation.*'mish'"),
    ({"activation": None}, ValueError, "activation"),
    ({"eps": -1e-5}, ValueError, "eps"),
    ({"eps": 0.0, "training": True}, ValueError, "eps"),
    ({"eps": "1"}, TypeError, "eps"),
    ({"eps": None}, TypeError, "eps"),
    ({"momentum": None, "training": True}, TypeError, "momentum"),
    ({"momentum": "0.1", "training": True}, TypeError, "momentum"),
    ({"weight": [1.0, 1.0, 1.0]}, TypeError, "weight"),
    ({"bias": 0.0}, TypeError, "bias"),
    ({"weight": torch.ones(3, dtype=torch.long)}, TypeError, "weight.*int64"),
    ({"running_mean": 0}, TypeError, "running_mean"),
    ({"residual": 1.0}, TypeError, "residual"),
    ({"input": torch.ones(3)}, ValueError, r"input.*\(3,\)"),
    ({"input": torch.tensor(1.0)}, ValueError, "input"),
]


@pytest.mark.parametrize(
    "changed, kind, named",
    [pytest.param(*case, id=f"{','.join(case[0])}-{i}") for i, case in enumerate(ERRORS)],
)
@pytest.mark.parametrize("backend", ["cpu", "aten"])
def test_bad_arguments(backend, changed, kind, named):
    call = {**GOOD, **changed}
    with pooling_ext.use_backend(backend), pytest.raises(kind, match=named):
        F.batch_norm_act(**call)


def test_not_a_tensor():
    with pytest.raises(TypeError, match="input"):
        F.batch_norm_act([[1.0]], torch.zeros(1), torch.ones(1))
