"""Depthwise convolution: its kernels, and the differentiable function made of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as TF
from conv_cases import ACTIVATIONS, LEAKY_SLOPE
from direct_conv_cases import (
    BOTH_FORMATS,
    EVERY_DTYPE,
    LAYOUTS,
    assert_exact,
    assert_passes_on,
    assert_same_for_any_threads,
    every,
)
from helpers import FLOATS, dtype_id, integers, strides, with_layout
from instruction_sets import EVERY_ISA
from torch import Tensor

from pooling_ext.ops import depthwise_conv as ops
from pooling_ext.testing.tolerances import assert_close

pytestmark = pytest.mark.native


class Case(NamedTuple):
    """A convolution, by the name of what is special about it."""

    name: str
    batch: int
    channels: int
    size: tuple[int, int]
    kernel: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | None = None

    @property
    def window(self) -> tuple[list[int], list[int]]:
        padding = (self.kernel // 2,) * 2 if self.padding is None else self.padding
        return list(self.stride), list(padding)

    def input(self, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
        return with_layout(integers((self.batch, self.channels, *self.size), dtype), layout)

    def weight(self, dtype: torch.dtype) -> Tensor:
        return integers((self.channels, 1, self.kernel, self.kernel), dtype)

    def expected(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """In float64, tap by tap: PyTorch's own operator takes seconds for these."""
        (step_y, step_x), (pad_y, pad_x) = self.window
        padded = TF.pad(x.double(), (pad_x, pad_x, pad_y, pad_y))
        ends = [size - self.kernel + 1 for size in padded.shape[2:]]
        output = sum(
            weight[:, 0, i, j].double().view(-1, 1, 1)
            * padded[:, :, i : i + ends[0] : step_y, j : j + ends[1] : step_x]
            for i in range(self.kernel)
            for j in range(self.kernel)
        )
        assert isinstance(output, Tensor)
        return output if bias is None else output + bias.double().view(-1, 1, 1)

    def expected_grads(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        leaves = x.double().requires_grad_(), weight.double().requires_grad_()
        wide = grad.double()
        return *torch.autograd.grad(self.expected(*leaves), leaves, wide), wide.sum((0, 2, 3))


CASES = (
    Case("three", 2, 32, (14, 14), 3),
    Case("five", 2, 48, (14, 14), 5),
    Case("seven", 2, 16, (14, 14), 7),
    Case("three_strided", 2, 32, (28, 28), 3, (2, 2)),
    Case("five_strided", 2, 16, (28, 28), 5, (2, 2)),
    Case("seven_strided", 1, 16, (28, 28), 7, (2, 2)),
    Case("channels_tail", 2, 37, (9, 11), 3),
    Case("channels_eights", 1, 24, (16, 15), 5, (2, 2)),
    Case("few_channels", 3, 3, (13, 10), 3),
    Case("one_channel", 2, 1, (12, 30), 5),
    Case("odd_planes", 2, 19, (17, 13), 3, (2, 2)),
    Case("odd_planes_seven", 1, 20, (15, 9), 7, (2, 2), (2, 3)),
    Case("strides_differ", 2, 18, (11, 12), 5, (2, 1)),
    Case("strides_differ_too", 1, 40, (11, 12), 3, (1, 2)),
    Case("no_padding", 2, 33, (9, 10), 3, (1, 1), (0, 0)),
    Case("large_padding", 1, 17, (6, 5), 3, (1, 1), (5, 9)),
    Case("large_padding_strided", 2, 21, (6, 7), 5, (2, 2), (8, 7)),
    Case("one_pixel", 2, 34, (1, 1), 7),
    Case("one_row", 1, 16, (1, 40), 3),
    Case("one_column", 1, 35, (40, 1), 5, (2, 2)),
    Case("long_rows", 1, 16, (5, 301), 3),
    Case("many_images", 70, 16, (4, 4), 3),
    Case("many_channels", 1, 280, (7, 7), 5),
)
EVERY_CASE = every(CASES)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, window, activation: str = "identity") -> Tensor:
    index = ops.ACTIVATIONS.index(activation)
    return ops.depthwise_conv(x, weight, bias, *window, index, LEAKY_SLOPE)


# --- the operators ----------------------------------------------------------------------------------


@EVERY_CASE
@EVERY_DTYPE
@BOTH_FORMATS
def test_forward(case, dtype, layout):
    x, weight, bias = case.input(dtype, layout), case.weight(dtype), integers((case.channels,), dtype)
    assert_exact(forward(x, weight, bias, case.window), case.expected(x, weight, bias))
    assert_exact(forward(x, weight, None, case.window), case.expected(x, weight))


@EVERY_CASE
@EVERY_DTYPE
@BOTH_FORMATS
def test_gradients(case, dtype, layout):
    x, weight = case.input(dtype, layout), case.weight(dtype)
    grad = with_layout(integers(case.expected(x, weight).shape, dtype, -4, 4), layout)
    window, channels_last = case.window, layout == "channels_last"
    for_input, for_weight, for_bias = case.expected_grads(grad, x, weight)
    given = ops.depthwise_conv_input_grad(grad, weight, x.shape, *window, channels_last)
    assert_exact(given, for_input, "input's gradient")
    both = ops.depthwise_conv_weight_grad(grad, x, weight.shape, *window, channels_last, True)
    assert_exact(both[0], for_weight, "weight's gradient")
    assert_exact(both[1], for_bias, "bias's gradient")
    alone = ops.depthwise_conv_weight_grad(grad, x, weight.shape, *window, channels_last, False)
    assert torch.equal(alone[0], both[0]) and alone[1].numel() == 0


@EVERY_DTYPE
@BOTH_FORMATS
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("channels", [5, 37])
def test_activations(dtype, layout, activation, channels):
    case = Case("", 2, channels, (9, 17), 3)
    x, weight = case.input(dtype, layout) / 8, case.weight(dtype) / 4
    actual = forward(x, weight, None, case.window, activation)
    assert_close(actual, ACTIVATIONS[activation](case.expected(x, weight)), scale=2)


@pytest.mark.parametrize("activation", [-1, len(ops.ACTIVATIONS)])
def test_unknown_activation(activation):
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    with pytest.raises(RuntimeError, match="activation must be from 0 to 8"):
        ops.depthwise_conv(x, weight, None, [1, 1], [1, 1], activation, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations_far_out(dtype, activation):
    """Where exponentials overflow, of infinities and of NaN, as PyTorch's functions have them."""
    values = [-float("inf"), -1e30, -150.0, -104.0, -88.5, -20.0, -5.5, -4.0, -3.0, -1e-30, -0.0]
    values += [0.0, 1e-30, 1.0, 2.9, 3.0, 5.9, 6.0, 60.0, 89.0, 1e30, float("inf"), float("nan")]
    x = torch.zeros(1, 1, 3, 3 * len(values), dtype=dtype)
    x[0, 0, 1, 1::3] = torch.tensor(values, dtype=dtype)
    weight = torch.zeros(1, 1, 3, 3, dtype=dtype)
    weight[0, 0, 1, 1] = 1
    x = torch.where(x.isfinite(), x, 0)
    actual = forward(x, weight, None, ([1, 1], [1, 1]), activation)
    assert_close(actual, ACTIVATIONS[activation](x.double()), scale=2)
    # PyTorch's GELU of infinity is infinity or NaN, depending on where in a vector it lies.
    bias = torch.tensor(values[:21] if activation == "gelu" else values, dtype=dtype)
    zeros = torch.zeros(len(bias), 1, 3, 3, dtype=dtype)
    plane = torch.zeros(1, len(bias), 2, 2, dtype=dtype)
    actual = forward(plane, zeros, bias, ([1, 1], [1, 1]), activation)[0, :, 0, 0]
    assert_close(actual, ACTIVATIONS[activation](bias), scale=2)


@EVERY_CASE
@EVERY_DTYPE
@BOTH_FORMATS
def test_statistics(case, dtype, layout):
    """Those of the output as it is stored, though its mean is large beside its deviation."""
    x, weight = case.input(dtype, layout), case.weight(dtype)
    bias = torch.full((case.channels,), 1000, dtype=dtype)
    output, (mean, var) = ops.depthwise_conv_stats(x, weight, bias, *case.window)
    assert torch.equal(output, forward(x, weight, bias, case.window))
    stored = output.double()
    expected = stored.mean((0, 2, 3)), stored.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(mean, expected[0], rtol=1e-7, atol=1e-5)
    torch.testing.assert_close(var, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES[0], CASES[7], CASES[10]], ids=lambda case: case.name)
def test_strides(case, layout):
    """Inputs and gradients that are not dense are read right, and results have PyTorch's layout."""
    x, weight = case.input(torch.float32, layout), case.weight(torch.float32)
    theirs = TF.conv2d(x, weight, None, *case.window, 1, case.channels)
    ours = forward(x, weight, None, case.window)
    assert_exact(ours, theirs)
    assert strides(ours) == strides(theirs)
    grad = with_layout(integers(ours.shape, torch.float32), layout)
    for_input, for_weight, for_bias = case.expected_grads(grad, x, weight)
    for channels_last in (False, True):
        given = ops.depthwise_conv_input_grad(grad, weight, x.shape, *case.window, channels_last)
        both = ops.depthwise_conv_weight_grad(grad, x, weight.shape, *case.window, channels_last, True)
        assert_exact(given, for_input)
        assert_exact(both[0], for_weight)
        assert_exact(both[1], for_bias)


@BOTH_FORMATS
def test_bfloat16_is_as_accurate_as_pytorch(layout):
    torch.manual_seed(0)
    for case in CASES[:8]:
        x = torch.randn(case.batch, case.channels, *case.size).bfloat16()
        x = with_layout(x, layout)
        weight = torch.randn(case.channels, 1, case.kernel, case.kernel).bfloat16()
        exact = case.expected(x, weight)
        grad = with_layout(torch.randn(exact.shape).bfloat16(), layout)
        exact_grads = case.expected_grads(grad, x, weight)[:2]
        stride, padding = case.window
        theirs = (
            TF.conv2d(x, weight, None, stride, padding, 1, case.channels),
            *torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, [1, 1], False, [0, 0], case.channels,
                [True, True, False],
            )[:2],
        )  # fmt: skip
        last = layout == "channels_last"
        ours = (
            forward(x, weight, None, case.window),
            ops.depthwise_conv_input_grad(grad, weight, x.shape, stride, padding, last),
            ops.depthwise_conv_weight_grad(grad, x, weight.shape, stride, padding, last, False)[0],
        )
        for one, other, expected in zip(ours, theirs, (exact, *exact_grads), strict=True):
            error, allowed = (one - expected).norm(), (other - expected).norm()
            assert error <= 1.01 * allowed, case.name


@EVERY_DTYPE
def test_empty_batch(dtype):
    x, weight, window = (
        torch.empty(0, 5, 8, 8, dtype=dtype),
        torch.ones(5, 1, 3, 3, dtype=dtype),
        ([1, 1], [1, 1]),
    )
    assert forward(x, weight, None, window).shape == (0, 5, 8, 8)
    output, stats = ops.depthwise_conv_stats(x, weight, None, *window)
    assert output.shape == x.shape and torch.equal(stats, torch.zeros(2, 5, dtype=torch.float64))
    assert ops.depthwise_conv_input_grad(x, weight, x.shape, *window, False).shape == x.shape
    grads = ops.depthwise_conv_weight_grad(x, x, weight.shape, *window, False, True)
    assert torch.equal(grads[0], torch.zeros_like(weight)) and torch.equal(
        grads[1], torch.zeros(5, dtype=dtype)
    )


def test_infinite_weights_do_not_meet_padding():
    """What lies outside the plane adds nothing, not even zero times infinity."""
    x, weight = torch.ones(1, 16, 5, 5), torch.full((16, 1, 3, 3), float("inf"))
    for given in (x, x.to(memory_format=torch.channels_last)):
        assert (forward(given, weight, None, ([1, 1], [1, 1])) == float("inf")).all()


# --- threads and instruction sets --------------------------------------------------------------------


def every_result(case: Case, dtype: torch.dtype, layout: str) -> Iterator[Tensor]:
    """All that the operators make of random numbers."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.batch, case.channels, *case.size, generator=generator).to(dtype)
    weight = torch.randn(case.channels, 1, case.kernel, case.kernel, generator=generator).to(dtype)
    x, last = with_layout(x, layout), layout == "channels_last"
    output, stats = ops.depthwise_conv_stats(x, weight, None, *case.window)
    grad = torch.randn(output.shape, generator=generator).to(dtype)
    yield from (output, stats, forward(x, weight, None, case.window, "silu"))
    yield ops.depthwise_conv_input_grad(grad, weight, x.shape, *case.window, last)
    yield from ops.depthwise_conv_weight_grad(grad, x, weight.shape, *case.window, last, True)


@BOTH_FORMATS
def test_bits_do_not_depend_on_threads(layout):
    large = Case("", 3, 72, (56, 56), 5, (2, 2)), Case("", 1, 80, (40, 40), 3), Case("", 20, 320, (7, 7), 3)
    assert_same_for_any_threads(every_result, (*large, *CASES[:3]), layout)


def check_every_instruction_set_case() -> None:
    """Values of every case in this process's instruction set."""
    for case in CASES:
        for dtype in FLOATS:
            for layout in ("contiguous", "channels_last"):
                test_forward(case, dtype, layout)
                test_gradients(case, dtype, layout)
                test_statistics(case, dtype, layout)
    for layout in ("contiguous", "channels_last"):
        for activation in ops.ACTIVATIONS:
            for dtype in FLOATS:
                test_activations(dtype, layout, activation, 37)


@EVERY_ISA
def test_instruction_set(isa):
    assert_passes_on(isa, __file__)
