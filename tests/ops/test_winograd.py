"""Winograd's convolution with 3x3 kernels of stride 1, and its gradients.

test_winograd_geometry.py has strides, dilation and planes.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as TF
from conv2d_cases import off
from conv_cases import ACTIVATIONS, LEAKY_SLOPE
from helpers import FLOATS, LAYOUTS, dtype_id, with_layout
from instruction_sets import EVERY_ISA, run_on
from torch import Tensor
from torch.library import opcheck

from pooling_ext.backends import cpu_library
from pooling_ext.ops import conv_choice, conv_speeds, winograd
from pooling_ext.ops.batch_norm_statistics import batch_stats
from pooling_ext.testing.conv_shapes import RESNET, TORCHVISION, VGG, ConvShape

pytestmark = pytest.mark.native

ONES = (1, 1, 1, 1)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding=ONES, groups=1) -> Tensor:
    transformed = winograd.winograd_weight(weight, groups, False)
    return winograd.winograd_conv(x, transformed, bias, None, padding, weight.shape[0], groups, 0, 0.0)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding=ONES, groups=1) -> Tensor:
    top, left, bottom, right = padding
    return TF.conv2d(TF.pad(x, (left, right, top, bottom)), weight, bias, groups=groups)


def layer(shape: ConvShape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's input, weight and gradient, as training has them."""
    x = torch.randn(1, *shape.input_shape).relu_().to(dtype)
    weight = (torch.randn(shape.weight_shape) * (2 / (9 * shape.weight_shape[1])) ** 0.5).to(dtype)
    grad = torch.randn(1, *shape.output_shape).to(dtype)
    return tuple(t.to(memory_format=torch.channels_last) for t in (x, weight, grad))  # type: ignore[return-value]


def exact(shape: ConvShape, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both gradients in float64."""
    return pytorchs(shape, x.double(), weight.double(), grad.double())


def pytorchs(shape: ConvShape, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    padding = [shape.padding] * 2
    output = TF.conv2d(x, weight, None, 1, padding, 1, shape.groups)
    backward = torch.ops.aten.convolution_backward
    of_x, of_weight, _ = backward(
        grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], shape.groups, [True, True, False]
    )
    return output, of_x, of_weight


def ours(shape: ConvShape, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    padding = [shape.padding] * 4
    return (
        convolved(x, weight, None, padding, shape.groups),
        winograd.winograd_input_grad(grad, weight, padding, shape.groups),
        winograd.winograd_weight_grad(x, grad, padding, shape.groups),
    )


@pytest.mark.no_poison  # PyTorch's gradients of a double need no kernel that is deterministic by name
@pytest.mark.parametrize("shape", TORCHVISION, ids=lambda shape: shape.name)
def test_accuracy(shape):
    """At every layer of torchvision's models, for output and gradients: what docs/semantics.md promises."""
    tensors = layer(shape)
    for what, actual, expected in zip(
        ["output", "input", "weight"], ours(shape, *tensors), exact(shape, *tensors), strict=True
    ):
        assert off(actual, expected) <= 5e-5, what


@pytest.mark.no_poison
@pytest.mark.parametrize("shape", RESNET + VGG[-2:], ids=lambda shape: shape.name)
def test_bfloat16_is_as_accurate_as_pytorchs(shape):
    tensors = layer(shape, torch.bfloat16)
    found = zip(ours(shape, *tensors), pytorchs(shape, *tensors), exact(shape, *tensors), strict=True)
    for actual, theirs, expected in found:
        assert off(actual, expected) <= 1.05 * off(theirs, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_layouts(dtype, layout):
    """Any strides; results are in the input's format."""
    x = with_layout(torch.randn(2, 20, 9, 11).to(dtype), layout)
    weight = with_layout((torch.randn(24, 20, 3, 3) / 13).to(dtype), layout)
    bias = torch.randn(24).to(dtype)
    expected = reference(x.double(), weight.double(), bias.double())
    actual = convolved(x, weight, bias)
    assert actual.dtype == dtype
    assert off(actual, expected) <= {torch.float32: 5e-6, torch.float64: 1e-14}.get(dtype, 2**-8)
    channels_last = layout in ("channels_last", "permuted") and x.stride(1) == 1
    assert actual.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), ONES, (2, 2, 2, 2), (0, 1, 2, 3), (3, 0, 0, 1)])
@pytest.mark.parametrize(("height", "width"), [(3, 3), (4, 9), (13, 6), (1, 17), (22, 5)])
def test_padding_and_tails(height, width, padding, groups):
    """Per side, planes smaller than a tile, and channels that fill no vector."""
    if min(height + padding[0] + padding[2], width + padding[1] + padding[3]) < 3:
        pytest.skip("no window fits")
    x, weight = torch.randn(2, 19 * groups, height, width), torch.randn(23 * groups, 19, 3, 3) / 13
    wide = [value.double().requires_grad_() for value in (x, weight)]
    expected = reference(*wide, None, padding, groups)
    grad = torch.randn(expected.shape)
    of_x, of_weight = torch.autograd.grad(expected, wide, grad.double())
    assert off(convolved(x, weight, None, padding, groups), expected) <= 1e-5
    assert off(winograd.winograd_input_grad(grad, weight, padding, groups), of_x) <= 1e-5
    assert off(winograd.winograd_weight_grad(x, grad, padding, groups), of_weight) <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("features", "channels", "groups", "side"),
    # The last takes its weight in several parts: with one block of tiles, and with several.
    [(24, 20, 1, 9), (19, 23, 3, 5), (48, 16, 2, 4), (16, 48, 1, 7), (272, 288, 1, 6), (544, 560, 1, 40)],
)
@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
def test_plain_weights(dtype, features, channels, groups, side, layout):
    """A weight of any strides that is transformed inside gives the bits of one that was before."""
    if side == 40 and dtype != torch.float32:
        pytest.skip("one dtype is enough for what takes long")
    x = torch.randn(1, channels * groups, side, side).to(dtype)
    weight = with_layout((torch.randn(features * groups, channels, 3, 3) / 13).to(dtype), layout)
    bias = torch.randn(features * groups).to(dtype)
    common = ONES, features * groups, groups
    transformed = winograd.winograd_weight(weight.contiguous(), groups, False)
    expected = winograd.winograd_conv(x, transformed, bias, None, *common, 1, 0.0)
    assert torch.equal(winograd.winograd_conv(x, weight, bias, None, *common, 1, 0.0), expected)
    for actual, wanted in zip(
        winograd.winograd_conv_stats(x, weight, bias, *common),
        winograd.winograd_conv_stats(x, transformed, bias, *common),
        strict=True,
    ):
        assert torch.equal(actual, wanted)
    grad = torch.randn_like(expected)
    turned = winograd.winograd_weight(weight.contiguous(), groups, True)
    assert torch.equal(
        winograd.winograd_input_grad(grad, weight, ONES, groups),
        winograd.winograd_conv(grad, turned, None, None, ONES, x.shape[1], groups, 0, 0.0),
    )


@pytest.mark.no_poison
@pytest.mark.parametrize("features", [64, 80])
def test_large_outputs(features):
    """They go past the cache; the last vector of 80 is alone."""
    x, weight = torch.randn(1, 16, 362, 363), torch.randn(features, 16, 3, 3) / 12
    x = x.to(memory_format=torch.channels_last)
    transformed = winograd.winograd_weight(weight, 1, False)
    output, stats = winograd.winograd_conv_stats(x, transformed, None, ONES, features, 1)
    expected = reference(x.double(), weight.double())
    assert off(output, expected) <= 1e-5
    assert off(stats, batch_stats(output.double())) <= 1e-5
    assert torch.equal(convolved(x, weight), output)


@pytest.mark.no_poison
@pytest.mark.parametrize("width", [35, 75, 149, 227, 531])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_of_wide_planes(dtype, width):
    """Blocks of contiguous activations end with a row of tiles, and so within a unit of statistics."""
    x, weight = torch.randn(2, 64, 13, width, dtype=dtype), torch.randn(40, 64, 3, 3, dtype=dtype) / 24
    transformed = winograd.winograd_weight(weight, 1, False)
    before = torch.get_num_threads()
    alone: tuple[Tensor, ...] = ()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output, stats = winograd.winograd_conv_stats(x, transformed, None, (0, 0, 0, 0), 40, 1)
            exact = batch_stats(output.double())
            assert off(stats, exact) <= (1e-12 if dtype == torch.float64 else 1e-6)
            alone = alone or (output, stats)
            assert torch.equal(output, alone[0]) and torch.equal(stats, alone[1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "shape",
    [(16, 16, 3, 3), (24, 12, 3, 3), (24, 16, 4, 4), (24, 16, 5, 3), (1, 36, 16, 24), (1, 9, 1, 16, 32)],
)
def test_weights_that_do_not_fit(shape):
    with pytest.raises(RuntimeError, match=r"weight must|kernel must"):
        winograd.winograd_conv(torch.randn(1, 16, 5, 5), torch.randn(shape), None, None, ONES, 24, 1, 0, 0.0)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("activation", winograd.ACTIVATIONS)
def test_epilogue(activation, dtype):
    """Bias, an addition and an activation, rounded once."""
    x, weight = torch.randn(2, 20, 9, 7).to(dtype), (torch.randn(24, 20, 3, 3) / 5).to(dtype)
    bias, residual = torch.randn(24).to(dtype), torch.randn(2, 24, 9, 7).to(dtype)
    index = winograd.ACTIVATIONS.index(activation)
    transformed = winograd.winograd_weight(weight, 1, False)
    actual = winograd.winograd_conv(x, transformed, bias, residual, ONES, 24, 1, index, LEAKY_SLOPE)
    before = reference(x.double(), weight.double(), bias.double()) + residual.double()
    rounding = {torch.float32: 1e-5, torch.float64: 1e-13}.get(dtype, 2**-8)
    assert off(actual, ACTIVATIONS[activation](before)) <= rounding


@pytest.mark.parametrize("activation", [-1, len(winograd.ACTIVATIONS)])
def test_unknown_activation(activation):
    x, weight = torch.randn(1, 16, 5, 5), winograd.winograd_weight(torch.randn(16, 16, 3, 3), 1, False)
    with pytest.raises(RuntimeError, match="activation must be from 0 to 8"):
        winograd.winograd_conv(x, weight, None, None, ONES, 16, 1, activation, 0.0)


def test_activations_of_special_values():
    """Large values, infinities and NaN in a residual, which meet no other element."""
    special = torch.tensor([0.0, -0.0, 100.0, -100.0, 1e30, -1e30, math.inf, -math.inf, math.nan])
    residual = special.view(1, 1, 1, -1).expand(1, 16, 1, -1).contiguous()
    x, weight = torch.zeros(1, 16, 1, len(special)), torch.zeros(16, 16, 3, 3)
    transformed = winograd.winograd_weight(weight, 1, False)
    for index, name in enumerate(winograd.ACTIVATIONS):
        actual = winograd.winograd_conv(x, transformed, None, residual, ONES, 16, 1, index, LEAKY_SLOPE)
        expected = ACTIVATIONS[name](residual.double()).float()
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-6, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", FLOATS, ids=dtype_id)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_statistics(mean, dtype):
    """They are those of what is stored, also where the mean is large beside the deviation."""
    x, weight = torch.randn(3, 20, 21, 18).to(dtype), (torch.randn(40, 20, 3, 3) / 13).to(dtype)
    bias = torch.randn(40).to(dtype) + mean
    transformed = winograd.winograd_weight(weight, 1, False)
    output, stats = winograd.winograd_conv_stats(x, transformed, bias, ONES, 40, 1)
    assert torch.equal(output, convolved(x, weight, bias))
    expected = batch_stats(output.double())
    assert stats.shape == expected.shape and stats.dtype == torch.float64
    torch.testing.assert_close(stats[1], expected[1], rtol=2e-5, atol=0)
    assert ((stats[0] - expected[0]).abs() <= 1e-6 * expected[1].sqrt()).all()


@EVERY_ISA
def test_instruction_set_and_threads(isa):
    """Right on every instruction set, and the same bits for 1, 2, 3 and 64 threads."""
    assert run_on(isa, "import winograd_worker; winograd_worker.main()") == [isa]


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("shape", RESNET + VGG, ids=lambda shape: shape.name)
def test_shares_of_64_workers(shape, batch):
    """Every tile and vector once, and nobody has 15% more than a 64th."""
    tasks = cpu_library.module.winograd_tasks(batch, shape.channels, shape.features, shape.side, False, 64)
    tiles = batch * math.ceil(shape.side / 4) ** 2
    done = torch.zeros(tiles, shape.features // 16, dtype=torch.int32)
    for first, last, begin, end in tasks:
        done[first:last, begin:end] += 1
    assert (done == 1).all()
    shares = [(last - first) * (end - begin) for first, last, begin, end in tasks]
    assert max(shares) <= 1.15 * done.numel() / 64


@pytest.mark.parametrize("shape", RESNET + VGG, ids=lambda shape: shape.name)
def test_shares_of_64_workers_in_training(shape):
    """With statistics, whose units of eight tiles stay whole, and for the weight's gradient."""
    sizes = 16, shape.channels, shape.features, shape.side
    for workers in (1, 2, 3, 64):
        forward = cpu_library.module.winograd_tasks(*sizes, True, workers)
        assert all(first % 8 == 0 for first, *_ in forward)
        shares = [(last - first) * (end - begin) for first, last, begin, end in forward]
        assert max(shares) <= 1.15 * sum(shares) / workers
        grad = cpu_library.module.winograd_grad_tasks(*sizes, workers)
        shares = [(t1 - t0) * (c1 - c0) * (v1 - v0) for _, t0, t1, c0, c1, v0, v1 in grad]
        turns = math.ceil(len(grad) / workers)
        assert max(shares) * turns <= 1.15 * sum(shares) / workers
        # Splits decide the order of additions, so the number of workers must not decide them.
        assert len({task[0] for task in grad}) == len(
            {t[0] for t in cpu_library.module.winograd_grad_tasks(*sizes, 1)}
        )


def test_empty_batch():
    x, weight = torch.randn(0, 16, 5, 5), torch.randn(24, 16, 3, 3)
    output, stats = winograd.winograd_conv_stats(
        x, winograd.winograd_weight(weight, 1, False), None, ONES, 24, 1
    )
    assert output.shape == (0, 24, 5, 5) and (stats == 0).all()
    assert (winograd.winograd_weight_grad(x, output, ONES, 1) == 0).all()


def test_nan_stays_in_the_tiles_that_read_it():
    x, weight = torch.randn(1, 16, 16, 16), torch.randn(16, 16, 3, 3)
    clean = convolved(x, weight)
    x[0, 3, 5, 5] = math.nan
    found = convolved(x, weight)
    tile = torch.zeros(16, 16, dtype=torch.bool)
    tile[4:8, 4:8] = True  # the other tiles read rows and columns up to 4, and from 7
    assert found[:, :, tile].isnan().all()
    assert torch.equal(found[:, :, ~tile], clean[:, :, ~tile])


def test_operators_are_registered_well():
    x, weight = torch.randn(2, 20, 6, 7), torch.randn(24, 20, 3, 3)
    transformed, bias = winograd.winograd_weight(weight, 1, False), torch.randn(24)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        opcheck(winograd.winograd_conv, (x, transformed, bias, None, ONES, 24, 1, 1, 0.0))
        opcheck(winograd.winograd_conv_stats, (x, transformed, bias, ONES, 24, 1))
        opcheck(winograd.winograd_conv, (x, weight, bias, None, ONES, 24, 1, 1, 0.0))
        opcheck(winograd.winograd_input_grad, (torch.randn(2, 24, 6, 7), weight, ONES, 1))
        opcheck(winograd.winograd_weight_grad, (x, torch.randn(2, 24, 6, 7), ONES, 1))
    opcheck(winograd.winograd_weight, (weight, 1, True))


def facts(batch: int, channels: int, side: int, **changes) -> conv_choice.Conv:
    pair, sides = (1, 1), (1, 1, 1, 1)
    found = conv_choice.Conv(
        batch, channels, (side, side), channels, (3, 3), pair, sides, pair, 1, torch.float32, True
    )
    return found._replace(**changes)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (facts(2, 32, 8), None),
        (facts(2, 32, 8, dtype=torch.int32), "torch.int32"),
        (facts(2, 32, 8, kernel=(4, 4)), "4x4"),
        (facts(2, 32, 8, kernel=(5, 5)), "its kernel is 5x5"),
        (facts(2, 32, 8, stride=(2, 2)), "stride"),
        (facts(2, 32, 8, dilation=(1, 2)), None),
        (facts(2, 32, 8, dilation=(6, 6), padding=(6, 6, 6, 6)), "8x8 leave so much"),
        (facts(2, 32, 8, padding=(0, 0, 0, -1)), "negative"),
        (facts(2, 32, 1, padding=(0, 0, 0, 0)), "does not fit"),
        (facts(2, 32, 2), "2x2 leave so much"),
        (facts(2, 32, 8, groups=4), "8 channels"),
        (facts(1, 512, 4), "36 MiB would be read for 1 tiles"),
        (facts(1, 512, 7), None),
        (facts(1, 512, 14), None),
        (facts(1, 512, 8, padding=(2, 2, 2, 2)), None),
        (facts(1, 32, 7), None),
    ],
)
def test_why_not(conv, reason, monkeypatch):
    monkeypatch.setattr(conv_speeds, "speedup", lambda *_: None)
    found = conv_choice.winograd_why_not(conv)
    assert found is None if reason is None else found is not None and reason in found
