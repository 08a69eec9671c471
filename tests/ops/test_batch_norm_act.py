"""batch_norm_act: values and gradients, by shape, layout, dtype and activation."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from batch_norm_cases import (
    LAYOUT,
    RESIDUAL,
    TRAINING,
    arguments,
    assert_results,
    composition,
    copies,
    expected,
    results,
)
from helpers import (
    BACKENDS,
    dtype_id,
    with_layout,
)
from torch import Tensor

import pooling_ext.functional as F
from pooling_ext.ops.activations import ACTIVATIONS
from pooling_ext.testing.tolerances import assert_close

# --- values and gradients -------------------------------------------------------------------------


CURVED = [name for name in ACTIVATIONS if name not in ("relu", "identity")]
EVERY_CURVED = pytest.mark.parametrize("activation", CURVED)


@BACKENDS
@EVERY_CURVED
@RESIDUAL
@TRAINING
def test_activations(backend, training, residual, activation):
    options = {"training": training, "activation": activation, "negative_slope": 0.2}
    for dtype, layout in product(
        (torch.float32, torch.bfloat16, torch.float64), ("contiguous", "channels_last")
    ):
        tensors = arguments((3, 37, 5, 9), dtype, layout, residual)
        # Also where it bends: beyond 3 and 6.
        tensors["weight"] = tensors["weight"] * 3
        grad = torch.randn(3, 37, 5, 9).to(dtype)
        actual, wanted = (
            results(F.batch_norm_act, tensors, grad, **options),
            expected(tensors, grad, **options),
        )
        if training and residual and dtype == torch.bfloat16:
            # The residual's gradient is rounded before it goes on, as in PyTorch.
            ours, exact = actual.pop("input"), wanted.pop("input")
            theirs = results(composition, tensors, grad, **options)["input"]
            assert off(ours, exact) <= 1.1 * off(theirs, exact)
        assert_results(actual, wanted, scale=4.0)


def off(actual: Tensor, wanted: Tensor) -> float:
    """The error's root of the mean square."""
    return (actual.double() - wanted).square().mean().sqrt().item()


@BACKENDS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@LAYOUT
@RESIDUAL
def test_where_activations_bend(backend, residual, layout, activation):
    """At the bends and beyond all numbers, output and gradients are PyTorch's.

    Where PyTorch's loops over vectors and over single numbers differ, nothing is asked: gelu of infinity, and
    gradients at NaN.
    """
    infinity = [] if activation == "gelu" else [float("inf")]
    bends = [0.0, -0.0, 3.0, -3.0, 6.0, -float("inf"), float("nan"), 100.0, -100.0, 1e-30, -1e-30, *infinity]
    x = with_layout(torch.tensor(bends).repeat(2, 3, 1, 1), layout)
    mean, var = torch.zeros(3), torch.ones(3)
    tensors = {"input": x, "running_mean": mean, "running_var": var, "weight": torch.ones(3), "bias": -mean}
    if residual:
        tensors["residual"] = with_layout(torch.full_like(x, -0.0), layout)
    grad = torch.linspace(1, 2, x.numel()).reshape(x.shape)
    options = {"eps": 0.0, "activation": activation, "negative_slope": 0.25}
    actual = results(F.batch_norm_act, tensors, grad, **options)
    theirs = results(composition, tensors, grad, **options)
    for name in ("output", "input", *(["residual"] if residual else [])):
        asked = torch.full_like(x, True, dtype=torch.bool) if name == "output" else ~x.isnan()
        torch.testing.assert_close(
            actual[name][asked], theirs[name][asked], rtol=1e-5, atol=1e-6, equal_nan=True, msg=name
        )


def name_of(shape) -> str:
    return "x".join(map(str, shape))


def compare(shape, layout, training):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = arguments(shape, dtype, layout, residual=True)
        grad = torch.randn(shape).to(dtype)
        actual = results(F.batch_norm_act, tensors, grad, training=training)
        # Of two elements hardly more is left than their sign, at a slope of up to 1 / sqrt(eps).
        few = torch.Size(shape).numel() // shape[1] < 3
        scale = 100.0 if few else 16.0 if training else 4.0
        assert_results(actual, expected(tensors, grad, training=training), scale)


@BACKENDS
@pytest.mark.parametrize(
    "shape",
    [
        (7, 5),
        (300, 3),
        (5, 257),
        (4, 3, 11),
        (2, 5, 3, 4, 6),
        (1, 3, 9, 9),
        (1, 1, 1, 2),
        (2, 1, 1, 1),
        (3, 257, 1, 1),
        (300, 2, 2, 3),  # many small planes
        (3, 3, 70, 81),  # planes of several runs
    ],
    ids=name_of,
)
@LAYOUT
@TRAINING
def test_shapes(backend, training, layout, shape):
    compare(shape, layout, training)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 2000, 2, 2),
        (6, 19, 40, 40),  # several units of work in channels_last
        (1, 1, 128, 128),
        (1, 300, 17, 3),
    ],
    ids=name_of,
)
@LAYOUT
@TRAINING
def test_large_shapes(training, layout, shape):
    compare(shape, layout, training)


@BACKENDS
@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
@LAYOUT
@RESIDUAL
@TRAINING
def test_without_weight_or_bias(backend, training, residual, layout, missing):
    tensors = arguments((3, 5, 4, 6), torch.float32, layout, residual)
    tensors |= dict.fromkeys(missing)
    actual = results(F.batch_norm_act, tensors, training=training)
    assert_results(actual, expected(tensors, training=training))


@BACKENDS
def test_without_running_statistics(backend):
    tensors = arguments((3, 5, 4, 6)) | {"running_mean": None, "running_var": None}
    assert_results(results(F.batch_norm_act, tensors, training=True), expected(tensors, training=True))


@BACKENDS
@pytest.mark.parametrize("layout", ["channels_last", "expanded", "sliced", "permuted"])
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last"])
def test_gradients_and_residuals_in_other_layouts(backend, input_layout, layout):
    tensors = arguments((3, 5, 4, 6), torch.float32, input_layout, residual=True)
    tensors["residual"] = with_layout(tensors["residual"], layout)
    grad = with_layout(torch.randn(3, 5, 4, 6), layout)
    actual = results(F.batch_norm_act, tensors, grad, training=True)
    assert_results(actual, expected(tensors, grad, training=True))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@TRAINING
def test_parameters_in_16_bits(backend, training, dtype):
    """As a model has them after .bfloat16(): they are widened, and their gradients rounded."""
    tensors = arguments((3, 5, 4, 6), dtype, residual=True, parameters=dtype)
    actual = results(F.batch_norm_act, tensors, training=training)
    assert_results(actual, expected(tensors, training=training), scale=2.0)
    assert all(actual[name].dtype == dtype for name in actual)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16], ids=dtype_id)
@TRAINING
def test_a_residual_of_another_dtype_is_promoted(training, other):
    tensors = arguments((3, 5, 4, 6), torch.float32, residual=True)
    tensors["residual"] = tensors["residual"].to(other)
    ours = results(F.batch_norm_act, tensors, training=training)
    theirs = results(composition, tensors, training=training)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-4)


@BACKENDS
def test_relu_of_the_residual_before_the_rounding(backend):
    """z is tiny and negative before it is rounded: nothing passes, in the output or the gradient."""
    x = torch.full((2, 1, 2, 2), 3.0, dtype=torch.bfloat16, requires_grad=True)
    mean, var = torch.full((1,), 3.0), torch.ones(1)
    residual = torch.tensor([-(2.0**-130), 2.0**-100, 0.0, -1.0]).repeat(2).reshape(2, 1, 2, 2).bfloat16()
    output = F.batch_norm_act(x, mean, var, residual=residual, eps=0.0)
    assert output.flatten().tolist() == [0.0, 2.0**-100, 0.0, 0.0] * 2
    output.sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [0.0, 1.0, 0.0, 0.0] * 2


@BACKENDS
@pytest.mark.parametrize("wanted", [("input",), ("weight",), ("bias",), ("residual",), ("weight", "bias")])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@RESIDUAL
@TRAINING
def test_gradients_of_some_inputs_only(backend, training, residual, activation, wanted):
    if "residual" in wanted and not residual:
        return
    tensors = arguments((3, 5, 4, 6), residual=residual)
    options = {"training": training, "activation": activation}
    grad = torch.randn(3, 5, 4, 6)
    everything = expected(tensors, grad, **options)
    leaves = copies(tensors)
    for name, value in leaves.items():
        value.requires_grad_(name in wanted)
    output = F.batch_norm_act(**leaves, **options)
    output.backward(grad)
    for name, value in leaves.items():
        if name in wanted:
            assert_close(value.grad, everything[name], scale=16, what=name)
        else:
            assert value.grad is None


@RESIDUAL
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.native
def test_what_is_saved(activation, residual):
    """The input; with a residual also ReLU's output, or the residual, which lies elsewhere in any case."""
    tensors = copies(arguments((4, 8, 16, 16), residual=residual))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        F.batch_norm_act(**tensors, training=True, activation=activation)
    large = [size for size in sizes if size > 1000]
    assert large == [tensors["input"].nbytes] * (2 if residual else 1)
