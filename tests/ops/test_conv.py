"""The convolutions with fused prologues and epilogues: Triton's, and what CUDA has of them.

Data are small integers wherever that is possible: sums are exact then, and results are compared bit by bit.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as TF
from conv_cases import (
    ALL_DTYPES,
    CONVS,
    EPS,
    KERNELS,
    TRITON,
    Conv,
    assert_rounded,
    assert_stats,
    cases,
    channel_stats,
    exact_norm,
    input_grad,
    kernels,
    normalize,
    weight_grad,
)
from helpers import dtype_id, integers

from pooling_ext.ops.conv import conv_input_grad, conv_weight_grad
from pooling_ext.testing.tolerances import assert_close

pytestmark = pytest.mark.usefixtures("allow_tf32")


@KERNELS
@cases(CONVS, CONVS)
def test_forward(backend, conv, dtype):
    ops = kernels(backend)
    x, weight = conv.input(dtype), conv.weight(dtype)
    actual = ops.conv_bias_act(x, weight, None, None, *conv.window, False)
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=torch.channels_last)
    assert_rounded(actual, conv.expected(x, weight))


@KERNELS
@ALL_DTYPES
@pytest.mark.parametrize("name", ["1x1", "3x3 stride"])
def test_epilogue(backend, name, dtype):
    ops = kernels(backend)
    conv = CONVS[name]
    x, weight, residual = conv.input(dtype), conv.weight(dtype), 20 * conv.output(dtype)
    for bias in (None, integers((conv.features,), torch.float32, -9, 9), integers((conv.features,), dtype)):
        for added in (None, residual):
            for relu in (False, True):
                actual = ops.conv_bias_act(x, weight, bias, added, *conv.window, relu)
                expected = conv.expected(x, weight, bias)
                expected = expected if added is None else expected + added.double()
                assert_rounded(actual, expected.relu() if relu else expected)


@KERNELS
@cases(CONVS, ("1x1", "3x3 stride"))
def test_statistics(backend, conv, dtype):
    ops = kernels(backend)
    x, weight, bias = conv.input(dtype), conv.weight(dtype), integers((conv.features,), torch.float32)
    actual, stats = ops.conv_stats(x, weight, bias, None, None, None, EPS, True, *conv.window)
    assert_rounded(actual, conv.expected(x, weight, bias))
    assert_stats(stats, actual)


@KERNELS
@cases(("1x1", "1x1 padding", "1x1 stride", "3x3", "3x3 stride", "7x7 stem"), ("1x1 stride", "3x3"))
def test_prologue(backend, conv, dtype):
    """What is padded is the result of the prologue, with zeros."""
    ops = kernels(backend)
    x, weight, norm = conv.input(dtype), conv.weight(dtype), exact_norm(conv.shape[1])
    for relu in (False, True):
        actual, stats = ops.conv_stats(x, weight, None, *norm.values(), EPS, relu, *conv.window)
        assert_rounded(actual, conv.expected(normalize(x, norm, relu), weight))
        assert_stats(stats, actual)


@KERNELS
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=dtype_id)
def test_statistics_of_a_large_mean(backend, dtype):
    """Means of 1000 with deviations of 1, in the input of the prologue too."""
    ops = kernels(backend)
    conv = Conv((4, 16, 20, 21), 16)
    x, bias = torch.randn(conv.shape).to(dtype), torch.full((16,), 1000.0)
    weight = (torch.randn(16, 16, 1, 1) / 4).to(dtype)
    y, stats = ops.conv_stats(x, weight, bias, None, None, None, EPS, True, *conv.window)
    assert_close(y, conv.expected(x, weight, bias))
    expected = channel_stats(y)
    torch.testing.assert_close(stats[0], expected[0], rtol=1e-9 if dtype == torch.float32 else 1e-7, atol=0)
    torch.testing.assert_close(stats[1], expected[1], rtol=2e-6, atol=0)

    norm = {"stats": stats, "bn_weight": torch.rand(16) + 0.5, "bn_bias": torch.randn(16)}
    z, _ = ops.conv_stats(y, weight, None, *norm.values(), EPS, True, *conv.window)
    assert_close(z, conv.expected(normalize(y, norm, True).to(dtype), weight), scale=4.0)


@TRITON
def test_statistics_of_many_tiles(backend):
    """So many that they are not merged at once; the last tile is not full."""
    from pooling_ext.triton.norm.batch_norm import MERGE_SPLITS, Parts

    for tiles, unit in ((MERGE_SPLITS + 37, 4), (MERGE_SPLITS, 4), (1, 4)):
        count = tiles * unit - 3
        x = 5.0 + torch.randn(tiles * unit, 3, dtype=torch.float64)
        x[count:] = 0
        means, squares = [], []
        for tile in x[:count].split(unit):
            means.append(tile.mean(0))
            squares.append((tile - tile.mean(0)).square().sum(0))
        partials = torch.stack((torch.stack(means), torch.stack(squares)), 1)
        parts = Parts(x, tiles, (unit, count))
        parts.sums.copy_(partials.flatten())
        stats = parts.merge()
        expected = torch.stack((x[:count].mean(0), x[:count].var(0, unbiased=False)))
        torch.testing.assert_close(stats, expected, rtol=1e-12, atol=0)

        sums = parts.total(torch.zeros(2, 3, dtype=torch.float64), EPS)
        torch.testing.assert_close(sums, partials.sum(0), rtol=1e-12, atol=1e-12)


@TRITON
@cases(CONVS, ("1x1", "1x1 stride", "3x3", "3x3 stride", "2x2 with gaps"))
def test_input_grad(backend, conv, dtype):
    grad, weight = conv.output(dtype), conv.weight(dtype)
    nothing = (None, None, None, None, EPS, True)
    actual, sums = conv_input_grad(grad, weight, conv.shape, *nothing, *conv.window)
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=torch.channels_last)
    assert sums.numel() == 0
    assert_rounded(actual, input_grad(conv, grad, weight)[0])


@TRITON
@cases(("1x1", "1x1 stride", "3x3", "3x3 stride", "5x5 stride", "2x2 with gaps"), ("1x1", "3x3 stride"))
def test_input_grad_epilogue(backend, conv, dtype):
    grad, weight, x = conv.output(dtype), conv.weight(dtype), conv.input(dtype)
    norm = exact_norm(conv.shape[1])
    for relu in (False, True):
        options = (*norm.values(), EPS, relu)
        actual, sums = conv_input_grad(grad, weight, conv.shape, x, *options, *conv.window)
        expected, _ = input_grad(conv, grad, weight, x, relu=relu, **norm)
        assert_rounded(actual, expected)
        # The sums are of what is stored.
        deviation = x.double() - norm["stats"][0].view(1, -1, 1, 1)
        stored = actual.double()
        expected_sums = torch.stack((stored.sum((0, 2, 3)), (stored * deviation).sum((0, 2, 3))))
        torch.testing.assert_close(sums, expected_sums, rtol=1e-6, atol=0)


@TRITON
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@cases(CONVS, ("1x1", "1x1 stride", "3x3", "3x3 stride"))
def test_weight_grad(backend, conv, dtype, split, monkeypatch):
    """Behind a batch norm and without; pixels in one program, and in as many as there can be."""
    from pooling_ext.triton.conv import conv_weight_grad as module
    from pooling_ext.triton.conv.conv_configs import ANY_CARD

    monkeypatch.setattr(module, "card", lambda device: ANY_CARD._replace(processors=99 if split else 1))
    monkeypatch.setattr(module, "LEAST_PIXELS", 1)
    grad, x, norm = conv.output(dtype), conv.input(dtype), exact_norm(conv.shape[1])
    size = [conv.features, conv.shape[1], *conv.kernel_size]
    for relu in (False, True):
        actual = conv_weight_grad(grad, x, size, *norm.values(), EPS, relu, *conv.window)
        assert actual.dtype == dtype and actual.is_contiguous(memory_format=torch.channels_last)
        assert_rounded(actual, weight_grad(conv, grad, x, norm, relu))
    actual = conv_weight_grad(grad, x, size, None, None, None, EPS, True, *conv.window)
    assert_rounded(actual, weight_grad(conv, grad, x))


@TRITON
def test_weight_grad_of_many_pixels(backend, monkeypatch):
    """As many splits as a large card has, in no more error than float32's, and the same bits each time."""
    from pooling_ext.triton.conv import conv_weight_grad as module
    from pooling_ext.triton.conv.conv_configs import ANY_CARD

    monkeypatch.setattr(module, "card", lambda device: ANY_CARD._replace(processors=132))
    monkeypatch.setattr(module, "LEAST_PIXELS", 16)
    conv = Conv((4, 16, 33, 32), 16)
    grad, x = (torch.randn(4, 16, 33, 32) for _ in range(2))
    norm = {"stats": channel_stats(x), "bn_weight": torch.rand(16) + 0.5, "bn_bias": torch.randn(16)}
    args = grad, x, [16, 16, 1, 1], *norm.values(), EPS, True, *conv.window
    actual = conv_weight_grad(*args)
    assert_close(actual, weight_grad(conv, grad, x, norm, relu=True), scale=64.0)
    assert torch.equal(actual, conv_weight_grad(*args))


@TRITON
def test_a_step_of_training(backend):
    """conv, batch norm, ReLU, conv: with none but the convolutions' results stored, as autograd has it."""
    first, second = (
        Conv((2, 8, 9, 10), 24, (3, 3), (1, 1), (1, 1)),
        Conv((2, 24, 9, 10), 16, (3, 3), (2, 2), (1, 1)),
    )
    x, one, two = torch.randn(first.shape), torch.randn(24, 8, 3, 3) / 8, torch.randn(16, 24, 3, 3) / 14
    bn_weight, bn_bias, bias = torch.rand(24) + 0.5, torch.randn(24), torch.randn(24) * 300
    grad = torch.randn(second.output(torch.float32).shape)

    ops = kernels(backend)
    y, stats = ops.conv_stats(x, one, bias, None, None, None, EPS, True, *first.window)
    z, _ = ops.conv_stats(y, two, None, stats, bn_weight, bn_bias, EPS, True, *second.window)
    gated, sums = conv_input_grad(grad, two, y.shape, y, stats, bn_weight, bn_bias, EPS, True, *second.window)
    grad_weight, grad_bias = sums[1] * (stats[1] + EPS).rsqrt(), sums[0]

    leaves = [t.double().requires_grad_() for t in (bn_weight, bn_bias)]
    expected = TF.batch_norm(y.double(), None, None, *leaves, True, 0.0, EPS).relu()
    expected = second.expected(expected, two)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    assert_close(z, expected.detach(), scale=16.0)
    assert_close(grad_weight.float(), wanted[0], scale=64.0)
    assert_close(grad_bias.float(), wanted[1], scale=64.0)
    assert (gated == 0).any() and gated.isfinite().all()
