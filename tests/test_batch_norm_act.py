"""batch_norm_act: values and gradients, statistics, accuracy, special values, arguments."""

from __future__ import annotations

import pytest
import torch
from batch_norm_cases import arguments, assert_results, composition, copies, expected, results
from helpers import (
    BACKENDS,
    FLOATS,
    assert_same,
    dtype_id,
    in_format_of,
    require_native,
    run_python,
    strides,
    with_layout,
)
from torch import nn

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.ops.batch_norm_act import batch_norm_arguments
from pooling_ext.testing.tolerances import assert_close

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
RESIDUAL = pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
LAYOUT = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


# --- values and gradients -------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced", "offset"])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@RESIDUAL
@TRAINING
def test_layouts_and_dtypes(backend, training, residual, activation, layout, dtype):
    tensors = arguments((3, 37, 5, 9), dtype, layout, residual)
    x = tensors["input"]
    grad = torch.randn(x.shape).to(dtype)
    options = {"training": training, "activation": activation}
    actual = results(F.batch_norm_act, tensors, grad, **options)
    assert_results(actual, expected(tensors, grad, **options))
    assert strides(actual["output"]) == strides(in_format_of(x, actual["output"]))
    for name in ("output", "input"):
        assert actual[name].dtype == dtype and actual[name].shape == x.shape


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


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.native
def test_what_is_saved(residual):
    """The input, and the output only where a residual hides ReLU's mask."""
    tensors = copies(arguments((4, 8, 16, 16), residual=residual))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        F.batch_norm_act(**tensors, training=True)
    large = [size for size in sizes if size > 1000]
    assert large == [tensors["input"].nbytes] * (2 if residual else 1)


# --- statistics -----------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
@LAYOUT
def test_running_statistics(backend, layout, momentum, dtype):
    tensors = arguments((3, 5, 4, 6), dtype, layout)
    ours, theirs = copies(tensors), copies(tensors)
    for _ in range(3):
        F.batch_norm_act(**ours, training=True, momentum=momentum)
        nn.functional.batch_norm(**theirs, training=True, momentum=momentum)
    rtol = 1e-14 if dtype == torch.float64 else 5e-7
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=rtol)


@BACKENDS
def test_running_statistics_are_left_alone_in_eval(backend):
    tensors = arguments((3, 5, 4, 6))
    fresh = copies(tensors)
    F.batch_norm_act(**fresh, training=False)
    assert_same(fresh["running_mean"], tensors["running_mean"])
    assert_same(fresh["running_var"], tensors["running_var"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_running_statistics_in_16_bits(dtype):
    """Rounded once."""
    tensors = arguments((3, 5, 4, 6), dtype, parameters=dtype)
    ours = copies(tensors)
    F.batch_norm_act(**ours, training=True)
    x = tensors["input"].double()
    for name, batch in (("running_mean", x.mean((0, 2, 3))), ("running_var", x.var((0, 2, 3)))):
        exact = 0.9 * tensors[name].double() + 0.1 * batch
        assert_close(ours[name], exact, exact=True, what=name)


MODULES = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 0.5},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "momentum": None},
]


@BACKENDS
@pytest.mark.parametrize("options", MODULES, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "-")
def test_as_a_module_does(backend, options):
    """Outputs, buffers and counter over steps of training and then in eval."""
    theirs = nn.BatchNorm2d(5, **options)
    if theirs.affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours = nn.BatchNorm2d(5, **options)
    ours.load_state_dict(theirs.state_dict())
    for step in range(5):
        if step == 3:
            ours.eval()
            theirs.eval()
        x = torch.randn(4, 5, 3, 3) + 1
        output = F.batch_norm_act(x, **batch_norm_arguments(ours), activation="identity")
        torch.testing.assert_close(output, theirs(x), rtol=1e-5, atol=2e-6)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=5e-7, atol=5e-7, msg=name)
    if options.get("track_running_stats", True):
        assert ours.num_batches_tracked is not None and ours.num_batches_tracked.item() == 3


def test_frozen_statistics_of_a_module_in_training():
    """Fine-tuning with batch norm in eval mode, and gradients."""
    bn = nn.BatchNorm2d(5).eval()
    tensors = arguments((3, 5, 4, 6))
    tensors |= {"running_mean": bn.running_mean, "running_var": bn.running_var}
    tensors |= {"weight": bn.weight.detach(), "bias": bn.bias.detach()}
    x = tensors["input"].requires_grad_()
    output = F.batch_norm_act(x, **batch_norm_arguments(bn))
    gradients = torch.autograd.grad(output.sum(), (x, bn.weight, bn.bias))
    actual = {"output": output.detach(), **dict(zip(("input", "weight", "bias"), gradients, strict=True))}
    assert_results(actual, expected(tensors))
    assert bn.num_batches_tracked is not None and bn.num_batches_tracked.item() == 0


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4), (0, 3)], ids=str)
@RESIDUAL
@TRAINING
def test_nothing_to_normalise(backend, training, residual, shape):
    """As PyTorch: an empty result, statistics as they were, gradients of zero."""
    tensors = arguments(shape, residual=residual)
    fresh = copies(tensors)
    output = F.batch_norm_act(**fresh, training=training)
    assert output.shape == shape
    output.sum().backward()
    for name in ("weight", "bias"):
        assert_same(fresh[name].grad, torch.zeros(shape[1]), name)
    assert fresh["input"].grad.shape == shape
    for name in ("running_mean", "running_var"):
        assert_same(fresh[name], tensors[name], name)


@BACKENDS
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3), (1, 3, 1)], ids=str)
def test_one_value_per_channel(backend, shape):
    tensors = arguments(shape)
    fresh = copies(tensors)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        F.batch_norm_act(**fresh, training=True)
    assert_same(fresh["running_mean"], tensors["running_mean"])
    assert_results(results(F.batch_norm_act, tensors), expected(tensors), scale=2.0)


@pytest.mark.native
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_running_statistics_are_updated_in_float64(dtype, momentum):
    """And rounded once, whatever their dtype and strides; autograd sees that they have changed."""
    x = torch.randn(4, 5, 3, 3) * 3 + 1
    mean, var = torch.randn(5, 2).to(dtype)[:, 0], (torch.rand(5) + 0.5).to(dtype)
    before, version = (mean.clone(), var.clone()), var._version
    F.batch_norm_act(x, mean, var, training=True, momentum=momentum)
    moments = torch.ops.pooling_ext.batch_norm_stats(x)
    batch = moments[0], moments[1] * (36 / 35)
    for running, old, now in zip((mean, var), before, batch, strict=True):
        wanted = old.double().lerp(now, momentum)
        torch.testing.assert_close(running, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-15)
    assert var._version > version


@pytest.mark.native
@pytest.mark.parametrize("parameters", FLOATS, ids=dtype_id)
@LAYOUT
def test_training_in_one_operator_is_that_of_its_parts(layout, parameters):
    """The same output and gradients as from statistics, sums and the rest one after the other."""
    ops = torch.ops.pooling_ext
    tensors = arguments((6, 19, 9, 7), torch.float32, layout, residual=True, parameters=parameters)
    x, weight, bias = (tensors[name] for name in ("input", "weight", "bias"))
    grad = torch.randn(6, 19, 9, 7)
    for residual in (None, tensors["residual"]):
        output, stats = ops.batch_norm_act_training(x, weight, bias, residual, 1e-5, True)
        assert_same(stats, ops.batch_norm_stats(x))
        assert_same(output, ops.batch_norm_act(x, stats, weight, bias, residual, 1e-5, True))
        kept = None if residual is None else output
        found = ops.batch_norm_act_training_backward(grad, x, stats, weight, bias, kept, 1e-5, True)
        masked, sums = ops.batch_norm_act_sums(grad, x, stats, weight, bias, kept, 1e-5, True)
        passed = (grad, True) if kept is None else (masked, False)
        through = ops.batch_norm_act_backward(passed[0], x, stats, weight, bias, sums, 378.0, 1e-5, passed[1])
        assert_same(found[0], through)
        assert_same(found[1], masked)
        slopes = (sums[1] * (stats[1] + 1e-5).rsqrt()).to(parameters)
        torch.testing.assert_close(found[2], slopes, rtol=2 * torch.finfo(parameters).eps, atol=0)
        assert_same(found[3], sums[0].to(parameters))


# --- accuracy -------------------------------------------------------------------------------------


def _far_away(kind: str, shape) -> torch.Tensor:
    """Elements whose mean is large beside their deviation, in ways that mislead a first guess."""
    x = torch.randn(shape)
    if kind == "mean":
        return x + 1e3
    if kind == "zeros-first":
        x = x + 1e3
        x[0, :, 0] = 0
        return x
    if kind == "outlier":
        x = x + 1e3
        x[0, :, 0, 0] = -1e5
        return x
    if kind == "trend":
        return x + torch.linspace(0, 1e3, x[:, 0].numel()).reshape(shape[0], 1, *shape[2:])
    if kind == "channels":
        return x + torch.linspace(-1e4, 1e4, shape[1]).reshape(1, -1, 1, 1)
    raise AssertionError(kind)


@BACKENDS
@pytest.mark.native
@pytest.mark.parametrize("kind", ["mean", "channels", "zeros-first", "outlier", "trend"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", [(4, 19, 40, 40), (64, 3, 7, 7)], ids=str)
@LAYOUT
def test_large_means(backend, layout, shape, dtype, kind):
    """The error is that of rounding float64's result, plus some of float32's in the terms of its sum.

    Those are few where every channel has one mean; the other kinds mislead the statistics, to 64 at most,
    which is still less than half a per cent of bfloat16's rounding.
    """
    x = with_layout(_far_away(kind, shape).to(dtype), layout)
    channels = shape[1]
    weight, bias = torch.rand(channels) + 0.5, torch.randn(channels)
    mean, var = torch.zeros(channels), torch.zeros(channels)
    output = F.batch_norm_act(x, mean, var, weight, bias, True, 1.0, activation="identity").double()

    def each(values):
        return values.double().reshape(1, -1, 1, 1)

    wide = x.double()
    var64, mean64 = torch.var_mean(wide, (0, 2, 3), correction=0)
    normal = (wide - each(mean64)) / each(var64 + 1e-5).sqrt() * each(weight)
    exact = normal + each(bias)
    terms = normal.abs() + each(bias).abs()
    steady = kind in ("mean", "channels")
    half = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]
    slack = (6 if steady else 64) * 2.0**-24 * terms
    error = (output - exact).abs()
    assert (error <= 1.01 * half * exact.abs() + slack).all(), f"{(error / slack).max()} times the slack"
    assert ((mean - mean64).abs() <= 2.0**-23 * mean64.abs() + 2e-6 * var64.sqrt()).all()
    rtol = 1e-6 if steady else 4e-6 if dtype == torch.float32 else 4e-5
    torch.testing.assert_close(var.double(), torch.var(wide, (0, 2, 3)), rtol=rtol, atol=0)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@LAYOUT
def test_gradients_with_large_means(backend, layout, dtype):
    require_native()
    tensors = arguments((4, 19, 20, 20), dtype, layout)
    tensors["input"] = with_layout((torch.randn(4, 19, 20, 20) + 1e3).to(dtype), layout)
    grad = torch.randn(4, 19, 20, 20).to(dtype)
    actual = results(F.batch_norm_act, tensors, grad, training=True)
    assert_results(actual, expected(tensors, grad, training=True))


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
sys.path.insert(0, {tests!r})
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
    from pathlib import Path

    result = run_python(THREADS.format(tests=str(Path(__file__).parent)))
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
    ({"activation": "gelu"}, ValueError, "activation.*'gelu'"),
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
