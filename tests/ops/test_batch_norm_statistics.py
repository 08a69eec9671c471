"""The statistics of batch_norm_act: the batch's and the running ones, and accuracy where means are large."""

from __future__ import annotations

import pytest
import torch
from batch_norm_cases import (
    LAYOUT,
    RESIDUAL,
    TRAINING,
    arguments,
    assert_results,
    copies,
    expected,
    results,
)
from helpers import (
    BACKENDS,
    FLOATS,
    assert_same,
    dtype_id,
    require_native,
    with_layout,
)
from torch import nn

import pooling_ext.functional as F
from pooling_ext.ops.activations import IDENTITY, RELU, Activation
from pooling_ext.ops.batch_norm_arguments import batch_norm_arguments
from pooling_ext.testing.tolerances import assert_close


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
def test_nothing_to_normalize(backend, training, residual, shape):
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
    """And rounded once, whatever their dtype and strides; as with PyTorch's, their versions stay."""
    x = torch.randn(4, 5, 3, 3) * 3 + 1
    mean, var = torch.randn(5, 2).to(dtype)[:, 0], (torch.rand(5) + 0.5).to(dtype)
    before, version = (mean.clone(), var.clone()), var._version
    F.batch_norm_act(x, mean, var, training=True, momentum=momentum)
    moments = torch.ops.pooling_ext.batch_norm_stats(x)
    batch = moments[0], moments[1] * (36 / 35)
    for running, old, now in zip((mean, var), before, batch, strict=True):
        wanted = old.double().lerp(now, momentum)
        torch.testing.assert_close(running, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-15)
    assert var._version == version


@pytest.mark.native
@pytest.mark.parametrize("parameters", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("activation", [RELU, Activation("silu")], ids=["relu", "silu"])
@LAYOUT
def test_training_in_one_operator_is_that_of_its_parts(layout, activation, parameters):
    """The same output and gradients as from statistics, sums and the rest one after the other."""
    ops = torch.ops.pooling_ext
    tensors = arguments((6, 19, 9, 7), torch.float32, layout, residual=True, parameters=parameters)
    x, weight, bias = (tensors[name] for name in ("input", "weight", "bias"))
    grad = torch.randn(6, 19, 9, 7)
    for residual in (None, tensors["residual"]):
        act = 1e-5, *activation.arguments
        output, stats = ops.batch_norm_act_training(x, weight, bias, residual, *act)
        assert_same(stats, ops.batch_norm_stats(x))
        assert_same(output, ops.batch_norm_act_elemt(x, stats, weight, bias, residual, *act))
        kept = None if residual is None else output if activation == RELU else residual
        found = ops.batch_norm_act_training_backward(grad, x, stats, weight, bias, kept, *act)
        masked, sums = ops.batch_norm_act_backward_reduce(grad, x, stats, weight, bias, kept, *act)
        inner, rest = (grad, activation) if kept is None else (masked, IDENTITY)
        after = sums, 378.0, 1e-5, *rest.arguments
        grad_input = ops.batch_norm_act_backward_elemt(inner, x, stats, weight, bias, *after)
        assert_same(found[0], grad_input)
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
