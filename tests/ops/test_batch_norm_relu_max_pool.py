"""batch_norm_relu_max_pool: max_pool2d(batch_norm_act(...)) to the bit, with less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from batch_norm_cases import LAYOUT, TRAINING, arguments, assert_results, copies, expected, results
from helpers import BACKENDS, FLOATS, assert_same, dtype_id, in_format_of, strides, with_layout
from torch import Tensor

import pooling_ext
import pooling_ext.functional as F
from pooling_ext import backends

#: The arguments of max_pool2d, by what is special about them.
WINDOWS = {
    "resnet": {"kernel_size": 3, "stride": 2, "padding": 1},
    "halves": {"kernel_size": 2, "stride": 2, "padding": 0},
    "overlapping": {"kernel_size": 3, "stride": 1, "padding": 1},
    "larger-output": {"kernel_size": 2, "stride": 1, "padding": 1},
    "gaps": {"kernel_size": 2, "stride": 3, "padding": 0},
    "ceil": {"kernel_size": 3, "stride": 2, "padding": 0, "ceil_mode": True},
    "ceil-padded": {"kernel_size": (2, 3), "stride": (3, 2), "padding": 1, "ceil_mode": True},
    "per-side": {"kernel_size": 3, "stride": 2, "padding": (0, 1, 1, 0)},
    "same": {"kernel_size": (3, 2), "stride": 2, "padding": "same"},
    "36-elements": {"kernel_size": 6, "stride": 3, "padding": 3},
    "one": {"kernel_size": 1, "stride": 1, "padding": 0},
    "wide": {"kernel_size": (1, 7), "stride": 1, "padding": (0, 3)},
    "255-elements": {"kernel_size": (5, 51), "stride": 2, "padding": (2, 25)},
    "dilated": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
    "256-elements": {"kernel_size": 16, "stride": 2, "padding": 8},
}
NOT_FUSED = ("dilated", "256-elements")


def two_operators(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    **windows: Any,
) -> Tensor:
    output = F.batch_norm_act(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return F.max_pool2d(output, **windows)


def compare(shape, dtype, layout, training, kind):
    windows = WINDOWS[kind]
    tensors = arguments(shape, dtype, layout)
    ours = backends.choose("batch_norm_relu_max_pool", tensors["input"]) is not backends.ATEN
    fused = ours and kind not in NOT_FUSED
    with torch.no_grad():
        output = F.batch_norm_relu_max_pool(**copies(tensors), training=training, **windows)
        pair = two_operators(**copies(tensors), training=training, **windows)
    assert_same(output, pair)
    grad = torch.randn(output.shape).to(dtype)
    actual = results(F.batch_norm_relu_max_pool, tensors, grad, training=training, **windows)
    assert_same(actual["output"], pair, "with gradients")
    assert strides(actual["output"]) == strides(in_format_of(tensors["input"], actual["output"]))
    if not fused:
        separate = results(two_operators, tensors, grad, training=training, **windows)
        for name, value in actual.items():
            assert_same(value, separate[name], name)
        return

    # What is picked depends on rounding, so the reference is told.
    with torch.no_grad():
        normal = F.batch_norm_act(**copies(tensors), training=training)
        _, indices = F.max_pool2d(normal, **windows, return_indices=True)

    def picked(normal):
        return normal.flatten(2).gather(2, indices.flatten(2)).unflatten(2, output.shape[2:])

    wanted = expected(tensors, grad, training=training, after=picked)
    spread, exact = actual.pop("input"), wanted.pop("input")
    assert_results(actual, wanted)
    # Where windows overlap, their gradients are added up in the dtype.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        spread.double(), exact, rtol=4 * eps, atol=8 * eps * exact.abs().max().item(), check_stride=False
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("kind", WINDOWS)
@TRAINING
def test_as_two_operators(training, kind, layout, dtype):
    compare((2, 5, 17, 26), dtype, layout, training, kind)


@BACKENDS
@pytest.mark.parametrize(
    "kind, dtype",
    [(kind, torch.float32) for kind in WINDOWS if kind not in ("255-elements", *NOT_FUSED)]
    + [("resnet", dtype) for dtype in FLOATS[1:]],
    ids=dtype_id,
)
@LAYOUT
def test_windows(backend, layout, kind, dtype):
    compare((2, 3, 9, 14), dtype, layout, True, kind)


@BACKENDS
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 3, 3), (3, 70, 5, 4), (1, 2, 120, 9), (1, 2, 4, 300), (40, 3, 3, 5)],
    ids=lambda shape: "x".join(map(str, shape)),
)
@LAYOUT
def test_small_shapes(backend, layout, shape):
    """Tiles of several images, and several tiles of one, in every direction."""
    compare(shape, torch.bfloat16, layout, True, "resnet")


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 3, 3),
        (2, 1, 9, 9),
        (3, 257, 5, 4),
        (2, 64, 56, 56),
        (1, 3, 113, 200),  # larger than a tile
        (1, 2, 300, 301),
        (1, 300, 40, 3),
        (2, 2000, 3, 3),
        (5, 3, 1, 40),
        (5, 3, 700, 3),
        (2, 3, 3, 9000),
        (1, 1, 1500, 1500),
    ],
    ids=lambda shape: "x".join(map(str, shape)),
)
@LAYOUT
@pytest.mark.parametrize("kind", ["resnet", "larger-output", "overlapping"])
def test_shapes(kind, layout, shape):
    compare(shape, torch.float32, layout, True, kind)


@BACKENDS
@pytest.mark.parametrize("kind", ["resnet", "halves", "per-side"])
@LAYOUT
@TRAINING
def test_against_float64(backend, training, layout, kind):
    windows = WINDOWS[kind]
    tensors = arguments((3, 7, 18, 21), torch.float32, layout)

    def pool(output):
        return F.max_pool2d(output, **windows)

    actual = results(F.batch_norm_relu_max_pool, tensors, training=training, **windows)
    assert_results(actual, expected(tensors, training=training, after=pool))


def test_defaults_are_resnets():
    tensors = arguments((2, 3, 9, 9))
    assert_same(
        F.batch_norm_relu_max_pool(**tensors), F.batch_norm_relu_max_pool(**tensors, **WINDOWS["resnet"])
    )


@BACKENDS
@LAYOUT
@pytest.mark.parametrize("missing", [("weight",), ("bias",), ("weight", "bias")], ids="-".join)
@TRAINING
def test_without_weight_or_bias(backend, training, missing, layout):
    tensors = arguments((2, 5, 9, 8), torch.float32, layout) | dict.fromkeys(missing)
    actual = results(F.batch_norm_relu_max_pool, tensors, training=training)
    after = lambda output: F.max_pool2d(output, 3, 2, 1)  # noqa: E731
    assert_results(actual, expected(tensors, training=training, after=after))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_parameters_in_16_bits(backend, dtype):
    tensors = arguments((2, 5, 9, 8), dtype, parameters=dtype)
    actual = results(F.batch_norm_relu_max_pool, tensors, training=True)
    theirs = results(two_operators, tensors, training=True, **WINDOWS["resnet"])
    for name, value in actual.items():
        assert value.dtype == dtype, name
        torch.testing.assert_close(value, theirs[name], rtol=2e-2, atol=1e-2)


@BACKENDS
@pytest.mark.parametrize("wanted", [("input",), ("weight",), ("bias",), ("weight", "bias")], ids="-".join)
@TRAINING
def test_gradients_of_some_inputs_only(backend, training, wanted):
    tensors = arguments((2, 5, 9, 8))
    everything = results(F.batch_norm_relu_max_pool, tensors, training=training)
    leaves = copies(tensors)
    for name, value in leaves.items():
        value.requires_grad_(name in wanted)
    F.batch_norm_relu_max_pool(**leaves, training=training).sum().backward()
    for name, value in leaves.items():
        if name in wanted:
            assert_same(value.grad, everything[name], name)
        else:
            assert value.grad is None


@BACKENDS
def test_running_statistics(backend):
    tensors = arguments((2, 5, 9, 8))
    ours, theirs = copies(tensors), copies(tensors)
    F.batch_norm_relu_max_pool(**ours, training=True, momentum=0.3)
    F.batch_norm_act(**theirs, training=True, momentum=0.3)
    for name in ("running_mean", "running_var"):
        assert_same(ours[name], theirs[name], name)


@BACKENDS
@TRAINING
def test_an_empty_batch(backend, training):
    leaves = copies(arguments((0, 3, 9, 9)))
    output = F.batch_norm_relu_max_pool(**leaves, training=training)
    assert output.shape == (0, 3, 5, 5)
    output.sum().backward()
    assert leaves["input"].grad.shape == (0, 3, 9, 9)
    assert_same(leaves["weight"].grad, torch.zeros(3))


@BACKENDS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@LAYOUT
@TRAINING
def test_nan_and_infinity(backend, training, layout, value):
    tensors = arguments((2, 5, 9, 8), torch.float32, layout)
    tensors["input"][1, 2, 4, 3] = value
    actual = results(F.batch_norm_relu_max_pool, tensors, training=training)
    theirs = results(two_operators, tensors, training=training, **WINDOWS["resnet"])
    for name, result in actual.items():
        wanted = theirs[name]
        if name == "weight" and not training:
            # Two operators multiply an infinite input that no window picked by a gradient of zero.
            wanted = wanted.where(~wanted.isnan() | result.isnan(), result)
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


@BACKENDS
@LAYOUT
@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "expanded", "sliced"])
def test_gradients_in_other_layouts(backend, grad_layout, layout):
    tensors = arguments((2, 5, 9, 8), torch.float32, layout)
    grad = with_layout(torch.randn(2, 5, 5, 4), grad_layout)
    actual = results(F.batch_norm_relu_max_pool, tensors, grad, training=True)
    plain = results(F.batch_norm_relu_max_pool, tensors, grad.contiguous(), training=True)
    for name, value in actual.items():
        assert_same(value, plain[name], name)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@LAYOUT
def test_what_is_saved(backend, layout, dtype):
    """The input, one byte for each output and, on a GPU, the input's element that won."""
    leaves = copies(arguments((2, 16, 24, 24), dtype, layout))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        output = F.batch_norm_relu_max_pool(**leaves, training=True)
    large = sorted(size for size in sizes if size > 1000)
    winners = [] if backend == "cpu" else [output.nbytes]
    assert large == sorted([leaves["input"].nbytes, output.numel(), *winners])


@BACKENDS
def test_backward_comes_again_where_the_graph_is_kept(backend):
    leaves = copies(arguments((2, 5, 9, 8)))
    output = F.batch_norm_relu_max_pool(**leaves, training=True).sum()
    first, second = (torch.autograd.grad(output, leaves["input"], retain_graph=True) for _ in range(2))
    assert_same(first[0], second[0])
    torch.autograd.grad(output, leaves["input"])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, leaves["input"])


def peak_bytes(function) -> int:
    """The most memory that torch's CPU allocator holds at once for what ``function`` makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as run:
        function()
    held = peak = 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("backend", ["cpu", "cuda"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@LAYOUT
def test_peak_memory_of_a_training_step(backend, layout, dtype):
    """Under half of what PyTorch's operators take beside the input and its gradient."""
    leaves = copies(arguments((4, 16, 112, 112), dtype, layout))

    def step(function):
        output = function(**leaves)
        torch.autograd.grad(output, [leaves["input"], leaves["weight"], leaves["bias"]], grad)

    def ours(**tensors):
        return F.batch_norm_relu_max_pool(**tensors, training=True)

    def theirs(**tensors):
        return TF.max_pool2d(TF.relu(TF.batch_norm(**tensors, training=True), inplace=True), 3, 2, 1)

    grad = with_layout(torch.randn(4, 16, 56, 56).to(dtype), layout)
    step(ours)
    step(theirs)
    input_bytes = leaves["input"].nbytes
    assert peak_bytes(lambda: step(theirs)) > 3 * input_bytes
    assert peak_bytes(lambda: step(ours)) < 0.5 * peak_bytes(lambda: step(theirs))
    # The input's gradient and the output with its offsets. What else a GPU keeps is gone by then.
    assert peak_bytes(lambda: step(ours)) < 1.4 * input_bytes


def test_explain_and_the_aten_backend():
    tensors = arguments((2, 5, 9, 8))
    with pooling_ext.use_backend("aten"):
        explanation = pooling_ext.explain(F.batch_norm_relu_max_pool, **tensors)
        aten = results(F.batch_norm_relu_max_pool, tensors, training=True)
    assert explanation.backend == "aten"
    actual = results(F.batch_norm_relu_max_pool, tensors, training=True)
    for name, value in actual.items():
        torch.testing.assert_close(value, aten[name], rtol=1e-4, atol=1e-5)


@BACKENDS
def test_explain_names_the_kernels(backend):
    tensors = arguments((2, 5, 9, 8))
    name = backend.partition("-")[0]
    assert pooling_ext.explain(F.batch_norm_relu_max_pool, **tensors).backend == name


@pytest.mark.parametrize(
    "changed, kind, named",
    [
        ({"weight": torch.ones(4)}, ValueError, "weight"),
        ({"running_mean": None}, ValueError, "running_mean"),
        ({"kernel_size": 0}, ValueError, "kernel_size"),
        ({"kernel_size": "3"}, TypeError, "kernel_size"),
        ({"stride": 0}, ValueError, "stride"),
        ({"padding": 2}, ValueError, "padding"),
        ({"dilation": 0}, ValueError, "dilation"),
        ({"kernel_size": 30, "padding": 0}, ValueError, "kernel_size"),
        ({"ceil_mode": "yes"}, TypeError, "ceil_mode"),
        ({"eps": "1"}, TypeError, "eps"),
        ({"input": torch.ones(2, 3)}, ValueError, "input"),
        ({"input": torch.ones(1, 2, 3, 4, 5)}, ValueError, "input"),
        ({"input": 1.0}, TypeError, "input"),
    ],
    ids=str,
)
def test_bad_arguments(changed, kind, named):
    call = {**arguments((2, 3, 9, 9)), **changed}
    with pytest.raises(kind, match=named):
        F.batch_norm_relu_max_pool(call.pop("input"), **call)


def test_one_value_per_channel():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm_relu_max_pool(**arguments((1, 3, 1, 1)), training=True)
