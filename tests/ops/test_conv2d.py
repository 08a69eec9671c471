"""The drop-in conv2d, by Winograd's and the depthwise kernels: values, gradients, arguments."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as TF
from conv2d_cases import ERROR, gradients, off, taken
from helpers import dtype_id, integers, strides, with_layout
from torch import Tensor

from pooling_ext.functional import conv2d
from pooling_ext.ops import conv_choice
from pooling_ext.ops.conv_choice import DEPTHWISE, PHASES, WINOGRAD

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("convolutions_of_any_size")]

BOTH_FORMATS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
KERNELS = pytest.mark.parametrize("kernels", [WINOGRAD, DEPTHWISE])


def sample(kernels: str, layout: str = "contiguous", dtype=torch.float32, size=(11, 10)):
    """Input, weight, bias and the options of a convolution that they are for."""
    if kernels == WINOGRAD:
        x, weight = torch.randn(2, 32, *size), torch.randn(24, 16, 3, 3) / 12
        options = {"padding": (1, 0), "groups": 2}
        weight = torch.cat((weight, weight.flip(0)))[:48]
    else:
        x, weight = torch.randn(2, 24, *size), torch.randn(24, 1, 5, 5) / 5
        options = {"stride": 2, "padding": (2, 1), "groups": 24}
    bias = torch.randn(weight.shape[0])
    return with_layout(x, layout).to(dtype), weight.to(dtype), bias.to(dtype), options


@KERNELS
@BOTH_FORMATS
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=dtype_id)
def test_values_and_gradients(kernels, layout, biased, dtype):
    x, weight, bias, options = sample(kernels, layout, dtype)
    given = (x, weight, bias if biased else None)
    assert dtype == torch.float16 or taken(conv2d, *given, **options) == [("conv2d", kernels)]
    ours = gradients(conv2d, *given, **options)
    with torch.no_grad():
        alone = conv2d(*given, **options)
    assert strides(alone) == strides(ours[0]) and off(alone, ours[0]) <= torch.finfo(dtype).eps
    theirs = gradients(TF.conv2d, *given, **options)
    expected = gradients(TF.conv2d, *(None if t is None else t.double() for t in given), **options)
    for one, other, exact in zip(ours, theirs, expected, strict=True):
        assert one.dtype == dtype and strides(one) == strides(other)
        allowed = ERROR if dtype == torch.float32 else torch.finfo(dtype).eps * 16
        assert off(one, exact) <= allowed


@KERNELS
@BOTH_FORMATS
def test_gradcheck(kernels, layout):
    x, weight, bias, options = sample(kernels, layout, torch.float64, (6, 5))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(*given: Tensor) -> Tensor:
        return conv2d(*given, **options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@KERNELS
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_wanted(kernels, wanted):
    *given, options = sample(kernels)
    found = []
    for function in (conv2d, TF.conv2d):
        leaves = [x.clone().requires_grad_(want) for x, want in zip(given, wanted, strict=True)]
        function(*leaves, **options).sum().backward()
        found.append([x.grad for x in leaves])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or off(one, other) <= ERROR


@KERNELS
@pytest.mark.parametrize("ours", list(product((False, True), repeat=3)))
def test_phases_are_chosen_one_by_one(kernels, ours, monkeypatch):
    """Whichever of them are PyTorch's, values are the same."""

    def why_not(conv, phase):
        return None if ours[PHASES.index(phase)] else "a test"

    monkeypatch.setitem(conv_choice.WHY_NOT, kernels, why_not)
    x, weight, bias, options = sample(kernels, "channels_last")
    given = gradients(conv2d, x, weight, bias, **options)
    for one, other in zip(given, gradients(TF.conv2d, x, weight, bias, **options), strict=True):
        assert off(one, other) <= ERROR and strides(one) == strides(other)


@KERNELS
@BOTH_FORMATS
def test_compiled(kernels, layout):
    x, weight, bias, options = sample(kernels, layout)
    compiled = torch.compile(conv2d, fullgraph=True, backend="aot_eager")
    ours = gradients(conv2d, x, weight, bias, **options)
    for one, other in zip(gradients(compiled, x, weight, bias, **options), ours, strict=True):
        assert off(one, other) <= ERROR and strides(one) == strides(other)
    with torch.no_grad():
        assert off(compiled(x, weight, bias, **options), ours[0]) <= ERROR


@KERNELS
def test_transforms(kernels):
    """torch.func and forward mode go to PyTorch's operator."""
    x, weight, bias, options = sample(kernels)
    batches = torch.stack((x, -x))
    ours = torch.func.vmap(lambda one: conv2d(one, weight, bias, **options))(batches)
    torch.testing.assert_close(
        ours, torch.stack([TF.conv2d(one, weight, bias, **options) for one in batches])
    )
    tangent = torch.randn_like(x)
    _, ours = torch.func.jvp(lambda one: conv2d(one, weight, **options), (x,), (tangent,))
    torch.testing.assert_close(ours, TF.conv2d(tangent, weight, **options))


@KERNELS
@BOTH_FORMATS
def test_autocast(kernels, layout):
    x, weight, bias, options = sample(kernels, layout)
    expected = gradients(TF.conv2d, x.double(), weight.double(), bias.double(), **options)

    def autocast(function):
        def call(*given, **options):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*given, **options)

        return call

    ours = gradients(autocast(conv2d), x, weight, bias, **options)
    theirs = gradients(autocast(TF.conv2d), x, weight, bias, **options)
    for one, other, exact in zip(ours, theirs, expected, strict=True):
        assert one.dtype == other.dtype and strides(one) == strides(other)
        assert off(one, exact) <= 1.05 * off(other, exact) + 2**-9


@KERNELS
def test_weights_in_channels_last_decide_too(kernels):
    """As in PyTorch, where the input does not say so."""
    x, weight, bias, options = sample(kernels)
    weight = weight.contiguous(memory_format=torch.channels_last)
    weight = (
        weight
        if kernels == WINOGRAD
        else integers((24, 1, 5, 5), torch.float32).to(memory_format=torch.channels_last)
    )
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            ours, theirs = conv2d(x, weight, bias, **options), TF.conv2d(x, weight, bias, **options)
        assert strides(ours) == strides(theirs) and off(ours, theirs) <= ERROR


@pytest.mark.parametrize(
    "options, error",
    [
        ({"padding": "same"}, None),
        ({"padding": "valid"}, None),
        ({"padding": (2,)}, None),
        ({"stride": [1, 1]}, None),
        ({"dilation": 2}, None),
        ({"stride": 2, "padding": "same"}, RuntimeError),
        ({"groups": 3}, RuntimeError),
        ({"groups": 0}, RuntimeError),
        ({"padding": "wide"}, RuntimeError),
        ({"padding": -1}, RuntimeError),
        ({"bias": torch.ones(3)}, RuntimeError),
        ({"weight": torch.ones(32, 32, 3, 3, dtype=torch.float64)}, RuntimeError),
        ({"weight": torch.ones(32, 16, 3, 3)}, RuntimeError),
        ({"input": torch.ones(1, 32, 1, 1)}, RuntimeError),
        ({"weight": 3}, TypeError),
        ({"weight": torch.ones(32, 32, 3)}, RuntimeError),
        ({"bias": 3, "groups": 32, "weight": torch.ones(32, 1, 3, 3)}, TypeError),
        ({"input": torch.ones(32, 8, 8)}, None),
        ({"input": torch.ones(0, 32, 8, 8)}, None),
    ],
    ids=lambda x: str(list(x)) if isinstance(x, dict) else None,
)
def test_arguments_are_pytorchs(options, error):
    call = {"input": torch.randn(2, 32, 9, 8), "weight": torch.randn(32, 32, 3, 3)} | options
    x, weight = call.pop("input"), call.pop("weight")
    if error is not None:
        for function in (TF.conv2d, conv2d):
            with pytest.raises(error):
                function(x, weight, **call)
        return
    ours, theirs = conv2d(x, weight, **call), TF.conv2d(x, weight, **call)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert strides(ours) == strides(theirs)
