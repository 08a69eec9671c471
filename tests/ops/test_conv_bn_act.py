"""conv_bn_act: modules in training and in eval, beside PyTorch's own in turn."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as TF
from batch_norm_cases import LAYOUT, RESIDUAL, TRAINING
from helpers import assert_same, dtype_id, with_layout
from torch import nn

import pooling_ext
import pooling_ext.functional as F
from pooling_ext.ops.conv_bn_act import cpu
from pooling_ext.ops.conv_bn_act.implementations import from_size

CONVOLUTIONS = {
    "3x3": {"kernel_size": 3, "padding": 1, "bias": False},
    "bias": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 8},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False},
    "same": {"kernel_size": 3, "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "oblong": {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2)},
}
NORMS = {
    "usual": {},
    "cumulative": {"momentum": None},
    "not-affine": {"affine": False},
    "untracked": {"track_running_stats": False},
}


def modules(conv="3x3", bn="usual", dtype=torch.float32):
    convolution = nn.Conv2d(8, 8, **CONVOLUTIONS[conv])
    norm = nn.BatchNorm2d(8, **NORMS[bn])
    for x in (norm.weight, norm.bias, norm.running_mean):
        if x is not None:
            nn.init.normal_(x)
    if norm.running_var is not None:
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return convolution.to(dtype), norm.to(dtype)


def in_turn(conv, bn, x, residual=None, activation="relu"):
    output = bn(conv(x))
    output = output if residual is None else output + residual
    return TF.relu(output) if activation == "relu" else output


def step(function, conv, bn, x, residual, training, activation="relu", wanted=True):
    """Outputs, gradients and buffers, on copies of the modules."""
    conv, bn = copy.deepcopy(conv).train(training), copy.deepcopy(bn).train(training)
    leaves = [y.detach().requires_grad_(wanted) for y in (x, residual) if y is not None]
    output = function(conv, bn, *leaves, activation=activation)
    results = {"output": output.detach()}
    if wanted:
        torch.manual_seed(1)
        output.backward(torch.randn(output.shape).to(output.dtype))
        results |= {f"grad {i}": leaf.grad for i, leaf in enumerate(leaves)}
        for prefix, module in (("grad conv", conv), ("grad bn", bn)):
            results |= {name: p.grad for name, p in module.named_parameters(prefix)}
    results |= dict(bn.named_buffers())
    return results


def compare(conv, bn, x, residual, training, activation="relu", rtol=1e-4, atol=2e-5, **options):
    actual = step(F.conv_bn_act, conv, bn, x, residual, training, activation, **options)
    expected = step(in_turn, conv, bn, x, residual, training, activation, **options)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        size = max(1.0, value.abs().max().item()) if value.is_floating_point() else 1.0
        if (training or bn.running_mean is None) and name == "grad conv.bias":
            size *= 100  # it is 0 but for rounding
        torch.testing.assert_close(
            actual[name],
            value,
            rtol=rtol,
            atol=atol * size,
            check_stride=False,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def compare_errors(conv, bn, x, residual, training, **options):
    """In 16 bits: no further from float64 than PyTorch's operators, but for the chance of a sign near 0."""
    actual = step(F.conv_bn_act, conv, bn, x, residual, training, **options)
    theirs = step(in_turn, conv, bn, x, residual, training, **options)
    wide = [y if y is None else y.double() for y in (x, residual)]
    with torch.autocast("cpu", enabled=False):
        exact = step(
            in_turn, copy.deepcopy(conv).double(), copy.deepcopy(bn).double(), *wide, training, **options
        )
    for name, value in theirs.items():
        assert actual[name].dtype == value.dtype, name
        if training and name == "grad conv.bias":
            continue  # it is 0 but for rounding
        error, allowed = ((y[name].double() - exact[name]).norm().item() for y in (actual, theirs))
        slack = 2.0**-6 * exact[name].double().norm().item()
        assert error <= 1.5 * allowed + slack, f"{name}: {error}, PyTorch's {allowed}"


def residual_for(conv, x, layout, present):
    return with_layout(torch.randn_like(conv(x)), layout) if present else None


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("bn", ["usual", "not-affine"])
@pytest.mark.parametrize("conv", [name for name in CONVOLUTIONS if name not in ("same", "reflect")])
@LAYOUT
def test_folding(layout, conv, bn, activation, dtype):
    """Whether it pays or not, if oneDNN has the dtype on this processor; the depthwise kernels have any."""
    folds = dtype == torch.float32 or conv == "depthwise" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    convolution, norm = (module.eval() for module in modules(conv, bn, dtype))
    x = with_layout(torch.randn(4, 8, 12, 14).to(dtype), layout)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # with one, PyTorch's own products are faster in NCHW
    try:
        with from_size(0, fold_ratio=0), torch.no_grad(), torch.profiler.profile() as profile:
            compare_folded(convolution, norm, x, activation)
    finally:
        torch.set_num_threads(before)
    assert folds == ("pooling_ext::fold_batch_norm" in {event.key for event in profile.key_averages()})


@pytest.mark.native
def test_a_processor_without_bfloat16_folds_none(monkeypatch):
    monkeypatch.setattr(cpu, "_has_bfloat16", lambda: False)
    conv, norm = (module.eval() for module in modules("3x3", "usual", torch.bfloat16))
    x = torch.randn(4, 8, 12, 14).bfloat16()
    with from_size(0, fold_ratio=0), torch.no_grad():
        found = pooling_ext.explain(F.conv_bn_act, conv, norm, x).decisions[0]
    assert found.backend != "oneDNN, folded"
    assert found.declined["oneDNN, folded"] == "oneDNN has no bfloat16 on this processor"


def compare_folded(conv, bn, x, activation):
    actual, theirs = (f(conv, bn, x, activation=activation) for f in (F.conv_bn_act, in_turn))
    exact = in_turn(copy.deepcopy(conv).double(), copy.deepcopy(bn).double(), x.double(), None, activation)
    error, allowed = ((y.double() - exact).norm() for y in (actual, theirs))
    assert actual.dtype == x.dtype
    assert error <= 1.5 * allowed + 4 * torch.finfo(x.dtype).eps * exact.norm()


@pytest.mark.parametrize("conv", CONVOLUTIONS)
@LAYOUT
@RESIDUAL
@TRAINING
@pytest.mark.parametrize("wanted", [True, False], ids=["gradients", "inference"])
def test_convolutions(wanted, training, residual, layout, conv):
    convolution, norm = modules(conv)
    x = with_layout(torch.randn(4, 8, 12, 14), layout)
    added = residual_for(convolution, x, layout, residual)
    with torch.set_grad_enabled(wanted):
        compare(convolution, norm, x, added, training, wanted=wanted)


@pytest.mark.parametrize("bn", NORMS)
@TRAINING
@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_norms(activation, training, bn):
    convolution, norm = modules("bias", bn)
    x = torch.randn(4, 8, 12, 14)
    compare(convolution, norm, x, None, training, activation)
    with torch.no_grad():
        compare(convolution, norm, x, None, training, activation, wanted=False)


@LAYOUT
@pytest.mark.parametrize("size", [1, 2, 40])
def test_sizes_in_inference(size, layout):
    """Where folding the statistics into the weights pays, and where it does not."""
    convolution, norm = modules("bias")
    x = with_layout(torch.randn(2, 8, size, size), layout)
    with torch.no_grad():
        compare(convolution, norm, x, residual_for(convolution, x, layout, True), False, wanted=False)


@TRAINING
def test_float64(training):
    convolution, norm = modules("bias", dtype=torch.float64)
    x = torch.randn(4, 8, 12, 14, dtype=torch.float64)
    compare(convolution, norm, x, torch.randn_like(x), training, rtol=1e-10, atol=1e-11)
    with torch.no_grad():
        compare(convolution, norm, x, None, training, rtol=1e-10, atol=1e-11, wanted=False)


@LAYOUT
@TRAINING
@RESIDUAL
@pytest.mark.parametrize("wanted", [True, False], ids=["gradients", "inference"])
def test_bfloat16_under_autocast(wanted, residual, training, layout):
    convolution, norm = modules("bias")
    x = with_layout(torch.randn(4, 8, 12, 14), layout)
    added = with_layout(torch.randn(4, 8, 12, 14).bfloat16(), layout) if residual else None
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(wanted):
        compare_errors(convolution, norm, x, added, training, wanted=wanted)
        output = step(F.conv_bn_act, convolution, norm, x, added, training, wanted=wanted)["output"]
    assert output.dtype == torch.bfloat16


@TRAINING
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_modules_in_16_bits(dtype, training):
    convolution, norm = modules("bias", dtype=dtype)
    x = torch.randn(4, 8, 12, 14).to(dtype)
    compare_errors(convolution, norm, x, torch.randn_like(x), training)
    with torch.no_grad():
        compare_errors(convolution, norm, x, None, training, wanted=False)


def test_large_means_in_inference():
    """A convolution's output of mean 1000 and deviation 1, where the statistics are folded or not."""
    conv, bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8).eval()
    nn.init.constant_(conv.bias, 1e3)
    nn.init.constant_(bn.running_mean, 1e3)
    x = torch.randn(4, 8, 12, 14)
    expected = in_turn(copy.deepcopy(conv).double(), copy.deepcopy(bn).double(), x.double())
    with torch.no_grad():
        actual = F.conv_bn_act(conv, bn, x)
    # The convolution's own rounding at 1000, if it is not folded.
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-4)


@TRAINING
def test_frozen_parameters(training):
    """Gradients reach the input alone, as in feature extraction."""
    convolution, norm = modules()
    for p in (*convolution.parameters(), *norm.parameters()):
        p.requires_grad_(False)
    x = torch.randn(4, 8, 12, 14)
    grads = []
    for function in (F.conv_bn_act, in_turn):
        leaf = x.clone().requires_grad_()
        conv, bn = copy.deepcopy(convolution).train(training), copy.deepcopy(norm).train(training)
        function(conv, bn, leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_batch_norm_in_eval_and_the_convolution_in_training():
    convolution, norm = modules()
    norm.eval()
    x = torch.randn(4, 8, 12, 14)
    before = copy.deepcopy(norm.state_dict())
    output = F.conv_bn_act(convolution.train(), norm, x)
    torch.testing.assert_close(output, in_turn(convolution, norm, x), rtol=1e-4, atol=1e-5)
    for name, value in before.items():
        assert_same(norm.state_dict()[name], value)


def test_new_weights_are_seen():
    """Nothing of an earlier call is remembered."""
    convolution, norm = modules()
    norm.eval()
    x = torch.randn(4, 8, 12, 14)
    with torch.no_grad():
        F.conv_bn_act(convolution, norm, x)
        convolution.weight.mul_(2)
        norm.running_mean.add_(1)
        norm.bias.sub_(1)
        torch.testing.assert_close(
            F.conv_bn_act(convolution, norm, x), in_turn(convolution, norm, x), rtol=1e-4, atol=1e-5
        )


@TRAINING
def test_hooks_of_the_convolution_run(training):
    convolution, norm = modules()
    norm.train(training)
    calls = []
    convolution.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad():
        F.conv_bn_act(convolution, norm, torch.randn(4, 8, 12, 14))
    assert calls == [1]


@TRAINING
def test_an_empty_batch(training):
    convolution, norm = modules()
    norm.train(training)
    with torch.no_grad():
        assert F.conv_bn_act(convolution, norm, torch.randn(0, 8, 12, 14)).shape == (0, 8, 12, 14)


@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "inference"])
def test_unbatched_input_as_torch(grad):
    """torch.nn.BatchNorm2d takes no unbatched input, and neither does this."""
    convolution, norm = modules()
    norm.eval()
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError)):
        F.conv_bn_act(convolution, norm, torch.randn(8, 12, 14))


def test_the_aten_backend():
    convolution, norm = modules()
    x = torch.randn(4, 8, 12, 14)
    with pooling_ext.use_backend("aten"):
        compare(convolution, norm, x, torch.randn_like(x), True)
        with torch.no_grad():
            compare(convolution, norm, x, None, False, wanted=False)


@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "inference"])
@TRAINING
def test_bad_arguments(training, grad):
    convolution, norm = modules()
    norm.train(training)
    x = torch.randn(4, 8, 12, 14)
    with torch.set_grad_enabled(grad):
        with pytest.raises(ValueError, match="activation"):
            F.conv_bn_act(convolution, norm, x, activation="mish")
        with pytest.raises(ValueError, match="residual"):
            F.conv_bn_act(convolution, norm, x, torch.randn(4, 8, 12, 13))
        with pytest.raises(TypeError, match="residual"):
            F.conv_bn_act(convolution, norm, x, 1.0)
        with pytest.raises(RuntimeError, match="channels"):
            F.conv_bn_act(convolution, norm, torch.randn(4, 7, 12, 14))
        with pytest.raises(ValueError, match=r"running_mean|weight"):
            F.conv_bn_act(convolution, nn.BatchNorm2d(7).train(training), x)
