"""Winograd's convolution beyond 3x3 kernels of stride 1: strides, dilation, planes, and other kernels.

test_winograd_models.py has such layers of models.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from conv2d_cases import always_winograd, gradients, off
from helpers import FLOATS, dtype_id, strides
from torch import Tensor, nn
from torch.library import opcheck

import pooling_ext
from pooling_ext.functional import conv1d, conv2d, conv3d
from pooling_ext.ops import conv_speeds, winograd, winograd_weights
from pooling_ext.ops.conv_choice import FORWARD, INPUT_GRAD, WEIGHT_GRAD, WINOGRAD, Conv, winograd_why_not
from pooling_ext.testing.conv_shapes import OTHER_KERNELS

pytestmark = pytest.mark.native

#: Of the largest element.
ERRORS = {torch.float32: 2e-5, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-11}
#: Input, weight and how one goes over the other.
CASES = {
    "stride": ((2, 20, 13, 10), (24, 20, 3, 3), {"stride": 2, "padding": 1}),
    "stride of no tail": ((1, 16, 16, 16), (32, 16, 3, 3), {"stride": 2, "padding": 1}),
    "stride, padding 3": ((1, 17, 9, 12), (16, 17, 3, 3), {"stride": 2, "padding": 3}),
    "stride in groups": ((2, 48, 11, 8), (32, 24, 3, 3), {"stride": 2, "padding": 1, "groups": 2}),
    "dilation": ((2, 20, 13, 10), (24, 20, 3, 3), {"dilation": 2, "padding": 2}),
    "dilation of each": ((1, 16, 17, 14), (16, 16, 3, 3), {"dilation": (3, 1), "padding": (1, 2)}),
    "dilation beyond the plane": ((1, 16, 5, 6), (16, 16, 3, 3), {"dilation": 4, "padding": 4}),
    "planes": ((2, 20, 5, 7, 9), (24, 20, 3, 3, 3), {"padding": 1}),
    "two planes": ((1, 18, 4, 6, 5), (16, 18, 2, 3, 3), {"padding": (1, 0, 1)}),
    "one plane": ((1, 16, 4, 6, 5), (16, 16, 1, 3, 3), {"padding": (0, 1, 1)}),
    "dilated planes": ((1, 16, 7, 6, 5), (16, 16, 3, 3, 3), {"padding": 2, "dilation": 2}),
    "planes in groups": ((1, 32, 4, 6, 5), (34, 16, 3, 3, 3), {"padding": 1, "groups": 2}),
    "planes of stride 2": ((1, 16, 7, 9, 8), (20, 16, 3, 3, 3), {"padding": 1, "stride": 2}),
    "stride of planes alone": ((1, 16, 7, 6, 8), (20, 16, 3, 3, 3), {"padding": 1, "stride": (2, 1, 1)}),
    "5x5": ((2, 20, 13, 10), (24, 20, 5, 5), {"padding": 2}),
    "5x5 dilated in groups": (
        (1, 32, 11, 9),
        (34, 16, 5, 5),
        {"padding": (3, 4), "dilation": 2, "groups": 2},
    ),
    "1x3": ((2, 20, 13, 10), (24, 20, 1, 3), {"padding": (0, 1)}),
    "3x1": ((2, 20, 13, 10), (24, 20, 3, 1), {"padding": (1, 0)}),
    "3x1 dilated": ((1, 16, 13, 10), (16, 16, 3, 1), {"padding": (2, 1), "dilation": (3, 1)}),
    "1x7": ((2, 20, 9, 13), (24, 20, 1, 7), {"padding": (0, 3)}),
    "7x1": ((2, 20, 13, 6), (24, 20, 7, 1), {"padding": (3, 0)}),
    "7x1 in groups": ((1, 32, 9, 5), (48, 16, 7, 1), {"padding": (4, 1), "groups": 2}),
    "sequence of 3": ((2, 20, 37), (24, 20, 3), {"padding": 1}),
    "dilated sequence": ((2, 16, 40), (16, 16, 3), {"padding": 4, "dilation": 4}),
    "sequence of 7": ((1, 34, 30), (32, 17, 7), {"padding": 3, "groups": 2}),
}
FORMATS = torch.contiguous_format, torch.channels_last
BY_CASE = pytest.mark.parametrize("case", CASES)
IN_FORMATS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    always_winograd(monkeypatch)


def sample(case: str, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor, Tensor, dict]:
    size, weight_size, options = CASES[case]
    format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(size))
    x, weight, bias = torch.randn(size), torch.randn(weight_size) / 13, torch.randn(weight_size[0])
    if channels_last:
        if format is None:
            pytest.skip("sequences have no channels_last")
        x = x.contiguous(memory_format=format)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), options


def ours_and_theirs(case: str):
    rank = len(CASES[case][0]) - 2
    return ((conv1d, TF.conv1d), (conv2d, TF.conv2d), (conv3d, TF.conv3d))[rank - 1]


def geometry(rank: int, options: dict) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The sides' padding, the strides and the dilations, as the operators take them."""

    def each(name: str, otherwise: int) -> tuple[int, ...]:
        value = options.get(name, otherwise)
        return value if isinstance(value, tuple) else (value,) * rank

    return each("padding", 0) * 2, each("stride", 1), each("dilation", 1)


@BY_CASE
@IN_FORMATS
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_values_and_gradients(case, channels_last, dtype):
    *given, options = sample(case, dtype, channels_last)
    function, pytorchs = ours_and_theirs(case)
    found = pooling_ext.explain(function, *given, **options).decisions
    assert [decision.backend for decision in found] == [WINOGRAD]
    ours = gradients(function, *given, **options)
    with torch.no_grad():
        alone = function(*given, **options)
    theirs = gradients(pytorchs, *given, **options)
    exact = gradients(pytorchs, *(x.double() for x in given), **options)
    assert strides(alone) == strides(ours[0]) and off(alone, exact[0]) <= ERRORS[dtype]
    # PyTorch's results for volumes are contiguous where oneDNN does not make them, whatever the input is.
    same_format = given[0].dim() == 4 or (len(given[0]) > 1 and dtype == torch.float32)
    assert (alone.stride(1) == 1) == channels_last
    for i, (one, other, expected) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert one.dtype == dtype and (strides(one) == strides(other) or not same_format)
        if i == 1 and options.get("stride") in (2, (2, 1, 1)) and one.dim() == 5:
            continue  # it is PyTorch's
        assert off(one, expected) <= ERRORS[dtype] * (1 if one.dim() > 1 else 4)


@BY_CASE
def test_gradcheck(case):
    *given, options = sample(case, torch.float64, False)
    leaves = [x.requires_grad_() for x in given]
    function, _ = ours_and_theirs(case)

    def call(*given: Tensor) -> Tensor:
        return function(*given, **options)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@BY_CASE
def test_phases_that_are_ours(case, monkeypatch):
    """Each is made by our kernels wherever the reasons allow it."""
    *given, options = sample(case, torch.float32, True)
    function, _ = ours_and_theirs(case)
    called = []
    for name in ("winograd_conv", "winograd_input_grad", "winograd_weight_grad"):
        operator = getattr(winograd, name)
        monkeypatch.setattr(
            winograd, name, lambda *args, name=name, operator=operator: called.append(name) or operator(*args)
        )
    gradients(function, *given, **options)
    expected = ["winograd_conv", "winograd_input_grad", "winograd_weight_grad"]
    if case.startswith(("planes of stride", "stride of planes")):
        expected.remove("winograd_input_grad")
    assert called == expected


def facts(size=(14, 14), kernel=(3, 3), stride=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1)) -> Conv:
    channels = 64
    return Conv(
        16, channels, size, channels, kernel, stride, padding, dilation, 1, torch.float32, True
    )  # fmt: skip


@pytest.mark.parametrize(
    ("conv", "phase", "reason"),
    [
        (facts(stride=(2, 1)), FORWARD, "the stride is 2x1, not 1 or 2"),
        (facts(stride=(3, 3)), FORWARD, "the stride is 3x3, not 1 or 2"),
        (facts(stride=(2, 2), dilation=(2, 2)), FORWARD, "the stride is 2x2 and the dilation 2x2"),
        (facts(stride=(2, 2), padding=(0, 0, 0, 0)), INPUT_GRAD, "the padding .* is not odd"),
        (
            facts((4, 9, 9), (3, 3, 3), (2, 1, 1), (1,) * 6, (1, 1, 1)),
            INPUT_GRAD,
            "the stride of planes is 2",
        ),
        (facts((4, 9, 9), (3, 1, 3), (1, 1, 1), (1,) * 6, (1, 1, 1)), FORWARD, "the kernel is 3x1x3"),
        (facts(kernel=(5, 3)), FORWARD, "the kernel is 5x3"),
        (facts(kernel=(5, 5), stride=(2, 2)), WEIGHT_GRAD, "the stride is 2x2 and the kernel 5x5, not 3x3"),
    ],
)
def test_reasons(conv, phase, reason):
    assert winograd_why_not(facts(), phase) is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(winograd_why_not(conv, phase))


@pytest.mark.parametrize("phase", [FORWARD, INPUT_GRAD, WEIGHT_GRAD])
@pytest.mark.parametrize("change", [{"stride": (2, 2)}, {"kernel": (5, 5)}, {"kernel": (7, 1)}])
def test_all_but_3x3_of_stride_1_are_ours_where_they_were_measured(change, phase, monkeypatch):
    conv = facts(**change)
    assert winograd_why_not(conv, phase) is None
    monkeypatch.setattr(conv_speeds, "speedup", lambda *_: None)
    assert "pooling-ext tune" in str(winograd_why_not(conv, phase))
    assert winograd_why_not(facts(), phase) is None


def test_what_was_measured_of_other_kernels():
    """A file knows rows, which columns are as fast as, and squares by their side."""
    kernels = ((3, 3), (5, 5), (1, 7), (7, 1))
    names = [conv_speeds.kind(WINOGRAD, facts(kernel=kernel))[3] for kernel in kernels]
    assert names == ["3", "5", "1x7", "1x7"]


def test_tiles_of_a_dilation_are_those_of_its_phases():
    """13 rows in 4 phases of at most 4 rows each; in 2 phases of 7 rows, two tiles each."""
    conv = facts(size=(13, 13), dilation=(4, 2), padding=(4, 2, 4, 2))
    assert conv.output_size == (13, 13) and conv.tiles == 16 * 4 * (2 * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": (2, 1)}, "the stride of rows and columns must be 1, or 2"),
        ({"stride": (2, 2), "dilation": (2, 2)}, "a dilation must be at least 1, and 1 with a stride of 2"),
        ({"dilation": (0, 1)}, "a dilation must be at least 1"),
        ({"stride": (1,)}, "a number per spatial axis"),
        ({"dilation": (9, 9)}, "the kernel must fit into input"),
    ],
)
def test_operators_refuse(change, message):
    x, weight = torch.randn(1, 16, 7, 7), torch.randn(16, 16, 3, 3)
    steps = {"stride": (1, 1), "dilation": (1, 1)} | change
    with pytest.raises(RuntimeError, match=message):
        winograd.winograd_conv(x, weight, None, None, [1] * 4, 16, 1, 0, 0.0, *steps.values())


def test_gradients_refuse_what_does_not_fit():
    grad, weight = torch.randn(1, 16, 4, 4), torch.randn(16, 16, 3, 3)
    call, steps = winograd.winograd_input_grad, ((2, 2), (1, 1))
    assert call(grad, weight, [1] * 4, 1, *steps, (1, 16, 8, 7)).shape == (1, 16, 8, 7)
    with pytest.raises(RuntimeError, match="grad must have the size of the output"):
        call(grad, weight, [1] * 4, 1, *steps, (1, 16, 9, 8))
    with pytest.raises(RuntimeError, match="the padding must be odd"):
        call(grad, weight, [0] * 4, 1, *steps, (1, 16, 9, 9))
    with pytest.raises(RuntimeError, match="input_size is needed"):
        call(grad, weight, [1] * 4, 1, *steps)
    with pytest.raises(RuntimeError, match="weight_size must fit"):
        winograd.winograd_weight_grad(grad, grad, [1] * 4, 1, (1, 1), (1, 1), (16, 8, 3, 3))


@BY_CASE
def test_operators_are_registered_well(case):
    x, weight, bias, options = sample(case, torch.float32, True)
    if x.dim() == 3:
        pytest.skip("the operators take images")
    rank, groups = x.dim() - 2, options.get("groups", 1)
    sides, *steps = geometry(rank, options)
    transformed = winograd.winograd_weight(weight, groups, False, steps[0][-1])
    common = sides, weight.shape[0], groups
    opcheck(winograd.winograd_weight, (weight, groups, False, steps[0][-1]))
    opcheck(winograd.winograd_conv, (x, transformed, bias, None, *common, 1, 0.0, *steps, weight.shape[-2:]))
    opcheck(winograd.winograd_conv_stats, (x, weight, bias, *common, *steps))
    grad = torch.randn_like(winograd.winograd_conv(x, weight, bias, None, *common, 0, 0.0, *steps))
    if rank == 2 or steps[0][0] == 1:
        opcheck(winograd.winograd_input_grad, (grad, weight, sides, groups, *steps, x.shape))
    opcheck(winograd.winograd_weight_grad, (x, grad, sides, groups, *steps, weight.shape))


@BY_CASE
def test_statistics(case):
    x, weight, bias, options = sample(case, torch.float32, True)
    if x.dim() == 3:
        pytest.skip("the operators take images")
    groups, (sides, *steps) = options.get("groups", 1), geometry(x.dim() - 2, options)
    output, stats = winograd.winograd_conv_stats(x, weight, bias, sides, weight.shape[0], groups, *steps)
    over = (0, *range(2, x.dim()))
    var, mean = torch.var_mean(output.double(), over, correction=0)
    torch.testing.assert_close(stats[0], mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(stats[1], var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape", OTHER_KERNELS, ids=lambda shape: "-".join(map(str, (*shape[:2], *shape[2])))
)
def test_accuracy_at_the_layers_of_models(shape):
    """Of the output and of both gradients in float32, as the contract for 3x3 layers says."""
    channels, features, kernel, size = shape
    x, weight = torch.randn(1, channels, *size), torch.randn(features, channels, *kernel) / channels**0.5
    options = {"padding": (kernel[0] // 2, kernel[1] // 2)}
    found = gradients(conv2d, x, weight, **options)
    expected = gradients(TF.conv2d, x.double(), weight.double(), **options)
    assert [off(one, exact) <= 5e-5 for one, exact in zip(found, expected, strict=True)] == [True] * 3


@pytest.mark.parametrize("case", [case for case, (size, *_) in CASES.items() if len(size) == 4])
def test_planes_give_the_same_bits_as_channels_last(case):
    """Contiguous activations are turned block by block; nothing else changes."""
    x, weight, bias, options = sample(case, torch.float32, False)
    x = torch.cat((x, x.flip(0) * 2, x[:1]))  # several images in a block
    both = [gradients(conv2d, x.contiguous(memory_format=f), weight, bias, **options) for f in FORMATS]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_weight_of_a_sequence_is_transformed_once(monkeypatch):
    calls = []
    transform = winograd_weights.winograd_weight
    monkeypatch.setattr(
        winograd_weights, "winograd_weight", lambda *args: calls.append(args) or transform(*args)
    )
    x, weight, bias, options = sample("sequence of 3", torch.float32, False)
    first = conv1d(x, weight, bias, **options)
    assert torch.equal(conv1d(x, weight, bias, **options), first) and len(calls) == 1
    weight.data.mul_(2)
    assert off(conv1d(x, weight, None, **options), TF.conv1d(x, weight, None, **options)) <= 2e-5
    assert len(calls) == 2


@pytest.mark.parametrize("grad", [False, True])
def test_export(grad):
    """For every batch, and with gradients."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return conv2d(x, self.conv.weight, self.conv.bias, padding=1)

    model, x = Model().requires_grad_(grad), torch.randn(4, 16, 14, 14)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    for size in (1, 4, 7):
        other = torch.randn(size, 16, 14, 14)
        output = program(other)
        assert output.requires_grad == grad and off(output, model(other)) <= 5e-5
