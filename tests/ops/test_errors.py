"""Bad arguments: a TypeError or a ValueError whose message names the argument."""

from __future__ import annotations

import pytest
import torch
from helpers import our_op
from torch import nn

import pooling_ext
import pooling_ext.functional as F

X = torch.zeros(1, 2, 6, 6)

#: Values of the wrong type, and values out of range, with the argument's name in the message.
MAX_ERRORS = [
    ({"kernel_size": "3"}, TypeError, "kernel_size"),
    ({"kernel_size": 2.0}, TypeError, "kernel_size"),
    ({"kernel_size": None}, TypeError, "kernel_size"),
    ({"kernel_size": True}, TypeError, "kernel_size"),
    ({"kernel_size": (2, 2.5)}, TypeError, "kernel_size"),
    ({"kernel_size": 0}, ValueError, "kernel_size"),
    ({"kernel_size": -1}, ValueError, "kernel_size"),
    ({"kernel_size": (2, 2, 2)}, ValueError, "kernel_size"),
    ({"kernel_size": ()}, ValueError, "kernel_size"),
    ({"kernel_size": 7}, ValueError, "kernel_size"),
    ({"kernel_size": 2**62}, ValueError, "kernel_size"),
    ({"kernel_size": 2, "stride": 0}, ValueError, "stride"),
    ({"kernel_size": 2, "stride": (1, -1)}, ValueError, "stride"),
    ({"kernel_size": 2, "stride": "1"}, TypeError, "stride"),
    ({"kernel_size": 2, "padding": 2}, ValueError, "padding"),
    ({"kernel_size": 2, "padding": -1}, ValueError, "padding"),
    ({"kernel_size": 2, "padding": 0.5}, TypeError, "padding"),
    ({"kernel_size": 2, "padding": None}, TypeError, "padding"),
    ({"kernel_size": 2, "padding": "full"}, ValueError, "padding"),
    ({"kernel_size": 2, "padding": (1, 1, 1)}, ValueError, "padding"),
    ({"kernel_size": 2, "padding": (2, 0, 0, 0)}, ValueError, "padding"),
    ({"kernel_size": 2, "padding": (0, 0, 0, -1)}, ValueError, "padding"),
    ({"kernel_size": 2, "ceil_mode": "yes"}, TypeError, "ceil_mode"),
]
DILATION_ERRORS = [
    ({"kernel_size": 2, "dilation": 0}, ValueError, "dilation"),
    ({"kernel_size": 2, "dilation": "2"}, TypeError, "dilation"),
    ({"kernel_size": 2, "dilation": (1, 2, 3)}, ValueError, "dilation"),
    ({"kernel_size": 4, "dilation": 2}, ValueError, "dilation"),
]
AVG_ERRORS = [
    ({"kernel_size": 2, "divisor_override": 0}, ValueError, "divisor_override"),
    ({"kernel_size": 2, "divisor_override": 1.5}, TypeError, "divisor_override"),
    ({"kernel_size": 2, "divisor_override": True}, TypeError, "divisor_override"),
]
ADAPTIVE_ERRORS = [
    ({"output_size": -1}, ValueError, "output_size"),
    ({"output_size": (2, -1)}, ValueError, "output_size"),
    ({"output_size": 2.0}, TypeError, "output_size"),
    ({"output_size": "2"}, TypeError, "output_size"),
    ({"output_size": (2, 2, 2)}, ValueError, "output_size"),
    ({"output_size": ()}, ValueError, "output_size"),
]
LP_ERRORS = [
    ({"norm_type": 0, "kernel_size": 2}, ValueError, "norm_type"),
    ({"norm_type": "2", "kernel_size": 2}, TypeError, "norm_type"),
    ({"norm_type": None, "kernel_size": 2}, TypeError, "norm_type"),
    ({"norm_type": True, "kernel_size": 2}, TypeError, "norm_type"),
    ({"norm_type": 2, "kernel_size": 0}, ValueError, "kernel_size"),
    ({"norm_type": 2, "kernel_size": 2, "stride": 0}, ValueError, "stride"),
    ({"norm_type": 2, "kernel_size": 2, "padding": 2}, ValueError, "padding"),
]
CASES = (
    [("max_pool2d", *error) for error in MAX_ERRORS + DILATION_ERRORS]
    + [("avg_pool2d", *error) for error in MAX_ERRORS + AVG_ERRORS]
    + [("adaptive_max_pool2d", *error) for error in ADAPTIVE_ERRORS]
    + [("adaptive_avg_pool2d", *error) for error in ADAPTIVE_ERRORS]
    + [("lp_pool2d", *error) for error in LP_ERRORS]
    + [("global_lp_pool2d", {"norm_type": 0}, ValueError, "norm_type")]
)


@pytest.mark.parametrize(
    "name, kwargs, kind, named",
    [
        pytest.param(*case, id=f"{case[0]}-{','.join(f'{k}={v}' for k, v in case[1].items())}")
        for case in CASES
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_bad_arguments(name, kwargs, kind, named, requires_grad):
    with pytest.raises(kind, match=named):
        our_op(name)(X.clone().requires_grad_(requires_grad), **kwargs)


@pytest.mark.parametrize("rank", [1, 2, 3], ids="{}d".format)
@pytest.mark.parametrize(
    "name", ["max_pool", "avg_pool", "lp_pool", "adaptive_max_pool", "adaptive_avg_pool"]
)
def test_bad_inputs(name, rank):
    args = (2, 2) if name == "lp_pool" else (2,)
    pool = our_op(f"{name}{rank}d")
    for dim in (0, 1, rank, rank + 3):
        with pytest.raises(ValueError, match="input"):
            pool(torch.zeros((4,) * dim), *args)
    with pytest.raises(ValueError, match="input"):
        pool(torch.zeros(2, 3, *(4,) * (rank - 1), 0), *args)
    for not_a_tensor in ([[1.0]], None, 1.0):
        with pytest.raises(TypeError, match="input"):
            pool(not_a_tensor, *args)


def test_values_are_shown():
    with pytest.raises(ValueError, match=r"kernel_size=\(7, 7\)") as caught:
        F.max_pool2d(X, 7)
    assert "[1, 2, 6, 6]" in str(caught.value)
    with pytest.raises(ValueError, match="'full'"):
        F.max_pool2d(X, 2, padding="full")


def test_missing_and_unknown_arguments():
    with pytest.raises(TypeError, match="kernel_size"):
        F.max_pool2d(X)
    with pytest.raises(TypeError, match="kernel"):
        F.max_pool2d(X, 2, kernel=3)
    with pytest.raises(TypeError):
        F.max_pool2d()


def test_errors_are_both_value_and_runtime_errors():
    assert issubclass(pooling_ext.ArgumentError, ValueError)
    assert issubclass(pooling_ext.ArgumentError, RuntimeError)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"), pooling_ext.use_backend("gpu"):
        pass


@pytest.mark.parametrize("function", [pooling_ext.patch, pooling_ext.unpatch], ids=["patch", "unpatch"])
def test_patch_takes_modules_only(function):
    with pytest.raises(TypeError, match="model"):
        function(torch.zeros(1))


def test_modules_check_on_call_as_torch_does():
    module = pooling_ext.MaxPool2d(0)
    assert isinstance(module, nn.MaxPool2d)
    with pytest.raises(ValueError, match="kernel_size"):
        module(X)
