"""The convolutions with fused prologues and epilogues: layouts, NaN, nothing, tiles, traffic and errors."""

from __future__ import annotations

import pytest
import torch
from conv_cases import (
    ALL_DTYPES,
    CONVS,
    CUDA,
    EPS,
    KERNELS,
    TRITON,
    Conv,
    assert_rounded,
    assert_stats,
    exact_norm,
    input_grad,
    kernels,
    normalize,
    weight_grad,
)
from helpers import LAYOUTS, dtype_id, integers, with_layout

from pooling_ext import ArgumentError
from pooling_ext.backends import cuda_library
from pooling_ext.ops.conv import conv_input_grad, conv_weight_grad
from pooling_ext.testing.cuda_counts import counted, thread_order

pytestmark = pytest.mark.usefixtures("allow_tf32")


@KERNELS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["1x1", "3x3 stride"])
def test_layouts(backend, name, layout):
    conv = CONVS[name]
    x, residual, grad = (
        with_layout(t, layout) for t in (conv.input(torch.float32), *(conv.output(torch.float32),) * 2)
    )
    weight = with_layout(conv.weight(torch.float32), "permuted" if layout == "permuted" else "contiguous")
    bias = integers((conv.features, 2), torch.float32)[:, 1]
    norm = {
        name: torch.stack((value, value), -1)[..., 0] for name, value in exact_norm(conv.shape[1]).items()
    }
    ops = kernels(backend)
    actual = ops.conv_bias_act(x, weight, bias, residual, *conv.window, False)
    assert_rounded(actual, conv.expected(x, weight, bias) + residual.double())
    actual, _ = ops.conv_stats(x, weight, bias, *norm.values(), EPS, True, *conv.window)
    assert_rounded(actual, conv.expected(normalize(x, norm, True), weight, bias))
    if backend == "cuda":
        return  # the gradient is Triton's
    actual, _ = conv_input_grad(grad, weight, x.shape, x, *norm.values(), EPS, True, *conv.window)
    assert_rounded(actual, input_grad(conv, grad, weight, x, relu=True, **norm)[0])
    actual = conv_weight_grad(grad, x, weight.shape, *norm.values(), EPS, True, *conv.window)
    assert_rounded(actual, weight_grad(conv, grad, x, norm, relu=True))


@KERNELS
def test_nan(backend):
    """It passes ReLU, in the epilogue and the prologue, and ReLU's gradient; no other channel has it."""
    conv = Conv((1, 16, 3, 3), 16)
    x, weight = torch.ones(conv.shape), torch.eye(16).view(16, 16, 1, 1)
    x[0, 3, 1, 1] = torch.nan
    norm = {"stats": torch.stack((torch.zeros(16), torch.ones(16))).double()}
    expected = torch.zeros(conv.shape, dtype=torch.bool)
    expected[0, :, 1, 1] = True
    ops = kernels(backend)
    actual = ops.conv_bias_act(x, weight, None, None, *conv.window, True)
    assert torch.equal(actual.isnan(), expected)
    actual, _ = ops.conv_stats(x, weight, None, norm["stats"], None, None, EPS, True, *conv.window)
    assert torch.equal(actual.isnan(), expected)
    if backend == "cuda":
        return  # the gradient is Triton's
    grad = torch.ones(conv.shape)
    actual, _ = conv_input_grad(grad, weight, x.shape, x, norm["stats"], None, None, EPS, True, *conv.window)
    assert torch.equal(actual, grad)
    actual = conv_weight_grad(grad, x, weight.shape, norm["stats"], None, None, EPS, True, *conv.window)
    assert torch.equal(actual.isnan(), (torch.arange(16) == 3).view(1, 16, 1, 1).expand(16, 16, 1, 1))


@KERNELS
@pytest.mark.parametrize("name", ["1x1", "3x3 stride"])
def test_empty_batch(backend, name):
    conv = CONVS[name]._replace(shape=(0, *CONVS[name].shape[1:]))
    x, weight, norm = conv.input(torch.float32), conv.weight(torch.float32), exact_norm(conv.shape[1])
    expected = conv.expected(x, weight)
    ops = kernels(backend)
    y, stats = ops.conv_stats(x, weight, None, *norm.values(), EPS, True, *conv.window)
    assert y.shape == expected.shape
    assert torch.equal(stats, torch.zeros(2, conv.features, dtype=torch.float64))
    assert ops.conv_bias_act(x, weight, None, y, *conv.window, True).shape == expected.shape
    if backend == "cuda":
        return  # the gradient is Triton's
    grad, sums = conv_input_grad(y, weight, conv.shape, x, *norm.values(), EPS, True, *conv.window)
    assert grad.shape == conv.shape
    assert torch.equal(sums, torch.zeros(2, conv.shape[1], dtype=torch.float64))
    actual = conv_weight_grad(y, x, weight.shape, *norm.values(), EPS, True, *conv.window)
    assert torch.equal(actual, torch.zeros_like(weight))


@TRITON
def test_operators_are_what_their_fakes_say(backend):
    check = {"test_utils": ("test_schema", "test_faketensor")}
    ops = kernels(backend)
    for name in ("1x1 stride", "3x3"):
        conv = CONVS[name]
        x, weight, norm = conv.input(torch.float32), conv.weight(torch.float32), exact_norm(conv.shape[1])
        y, bias = conv.output(torch.float32), torch.zeros(conv.features)
        torch.library.opcheck(ops.conv_bias_act, (x, weight, bias, y, *conv.window, True), **check)
        torch.library.opcheck(
            ops.conv_stats, (x, weight, bias, *norm.values(), EPS, True, *conv.window), **check
        )
        torch.library.opcheck(
            conv_input_grad,
            (y, weight, list(conv.shape), x, *norm.values(), EPS, True, *conv.window),
            **check,
        )
        torch.library.opcheck(
            conv_weight_grad,
            (y, x, list(weight.shape), *norm.values(), EPS, True, *conv.window),
            **check,
        )


@CUDA
def test_cuda_operators_are_what_their_fakes_say(backend):
    check = {"test_utils": ("test_schema", "test_faketensor")}
    conv = CONVS["3x3 stride"]
    x, weight, norm = conv.input(torch.float32), conv.weight(torch.float32), exact_norm(conv.shape[1])
    y, bias = conv.output(torch.float32), torch.zeros(conv.features)
    ops = torch.ops.pooling_ext
    torch.library.opcheck(
        ops.conv_bias_act_cuda.default, (x, weight, bias, y, *conv.window, True, 0), **check
    )
    torch.library.opcheck(
        ops.conv_stats_cuda.default,
        (x, weight, bias, *norm.values(), EPS, True, *conv.window, 0),
        **check,
    )


TILED = {
    "1x1": Conv((3, 8, 17, 16), 136),
    "3x3": Conv((2, 24, 13, 12), 137, (3, 3), (1, 1), (1, 1)),
    "3x3 stride dilation": Conv((2, 20, 33, 24), 72, (3, 3), (2, 1), (2, 3), (2, 2)),
    "odd channels": Conv((2, 7, 13, 12), 72, (3, 2), padding=(1, 1)),
}


@CUDA
@ALL_DTYPES
@pytest.mark.parametrize("conv", TILED.values(), ids=TILED)
def test_tiles(backend, conv, dtype):
    """Several each way, of every size; in every order of threads the same."""
    x, weight, norm = conv.input(dtype), conv.weight(dtype), exact_norm(conv.shape[1])
    residual, bias = conv.output(dtype), integers((conv.features,), torch.float32)
    expected = (conv.expected(x, weight, bias) + residual.double()).relu()
    expected_norm = conv.expected(normalize(x, norm, True), weight, bias)
    for tile in range(len(cuda_library.conv_tiles())):
        ops, found = kernels(backend, tile), []
        for seed in (1, 2):
            with thread_order(seed):
                y = ops.conv_bias_act(x, weight, bias, residual, *conv.window, True)
                z, stats = ops.conv_stats(x, weight, bias, *norm.values(), EPS, True, *conv.window)
            assert_rounded(y, expected)
            assert_rounded(z, expected_norm)
            assert_stats(stats, z)
            found.append(stats)
        assert torch.equal(*found)


@CUDA
def test_there_is_no_such_tile(backend):
    for tile in (-1, len(cuda_library.conv_tiles())):
        with pytest.raises(RuntimeError, match=f"there is no tile {tile}"):
            kernels(backend, tile).conv_bias_act(X, WEIGHT, None, None, *WINDOW.values(), True)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=dtype_id)
@pytest.mark.parametrize("name", ("1x1", "3x3"))
def test_traffic(backend, name, dtype):
    """Whole sectors; with 1x1 windows each tile reads its pixels and the weights once."""
    kernel = int(name[0])
    conv = Conv((1, 64, 32, 32), 64, (kernel,) * 2, padding=(kernel // 2,) * 2)
    x, weight, y = conv.input(dtype), conv.weight(dtype), conv.output(dtype)
    x, weight, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight, y))
    for number, tile in enumerate(cuda_library.conv_tiles()):
        with counted() as counts:
            kernels(backend, number).conv_bias_act(x, weight, None, y, *conv.window, True)
        (found,) = counts
        assert found.touched[0] <= found.asked[0]
        assert found.moved[1] == found.touched[1] == y.numel() * y.element_size()
        if kernel == 1:
            tiles = 32 * 32 // tile.pixels
            least = (x.numel() + tiles * weight.numel() + y.numel()) * x.element_size()
            assert found.moved[0] <= 1.01 * least


X, WEIGHT = torch.zeros(2, 6, 5, 5), torch.zeros(4, 6, 3, 3)
WINDOW = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
STATS = torch.zeros(2, 6, dtype=torch.float64)
NO_NORM = {"stats": None, "bn_weight": None, "bn_bias": None, "eps": EPS, "relu": True}
CALLS = {
    "conv_bias_act": {"input": X, "weight": WEIGHT, "bias": None, "residual": None, "relu": True, **WINDOW},
    "conv_stats": {"input": X, "weight": WEIGHT, "bias": None, **NO_NORM, **WINDOW},
    "conv_input_grad": {
        "grad": torch.zeros(2, 4, 3, 3),
        "weight": WEIGHT,
        "input_size": [2, 6, 5, 5],
        "input": None,
        **NO_NORM,
        **WINDOW,
    },
    "conv_weight_grad": {
        "grad": torch.zeros(2, 4, 3, 3),
        "input": X,
        "weight_size": list(WEIGHT.shape),
        **NO_NORM,
        **WINDOW,
    },
}


WRONG = (
    ("conv_bias_act", {"input": X[0]}, r"input must be \(N, C, H, W\), but got \(6, 5, 5\)"),
    ("conv_bias_act", {"weight": WEIGHT[:, :3]}, r"weight must .* groups other than 1 are not supported"),
    ("conv_bias_act", {"weight": WEIGHT[0]}, r"weight must be \(out, in, height, width\)"),
    ("conv_bias_act", {"weight": WEIGHT.half()}, "weight must have input's dtype and device"),
    (
        "conv_bias_act",
        {"input": X.double(), "weight": WEIGHT.double()},
        "input must be float32, bfloat16",
    ),
    ("conv_bias_act", {"bias": torch.zeros(6)}, r"bias must have shape \(4,\), but got \(6,\)"),
    ("conv_bias_act", {"residual": torch.zeros(2, 4, 5, 5)}, r"residual must have shape \(2, 4, 3, 3\)"),
    ("conv_bias_act", {"residual": torch.zeros(2, 4, 3, 3).half()}, "residual must have input's dtype"),
    ("conv_bias_act", {"stride": [0, 1]}, r"stride must be two integers of at least 1, but got \[0, 1\]"),
    ("conv_bias_act", {"padding": [1]}, "padding must be two integers of at least 0"),
    ("conv_bias_act", {"dilation": [3, 1]}, "weight's windows must fit into input"),
    ("conv_stats", {"stats": STATS.float()}, r"stats must be float64 of shape \(2, 6\)"),
    ("conv_stats", {"stats": STATS, "bn_weight": torch.zeros(4)}, r"bn_weight must have shape \(6,\)"),
    ("conv_stats", {"stats": STATS, "bn_bias": torch.zeros(4)}, r"bn_bias must have shape \(6,\)"),
    ("conv_input_grad", {"grad": X}, r"grad must have shape \(2, 4, 3, 3\)"),
    ("conv_input_grad", {"input": X}, "input and stats must be given together"),
    ("conv_input_grad", {"input": X[:1], "stats": STATS}, r"input must have shape \(2, 6, 5, 5\)"),
    ("conv_input_grad", {"input_size": [2, 5, 5, 5]}, "weight must have shape .* for input_size of 5"),
    ("conv_weight_grad", {"grad": X}, r"grad must have shape \(2, 4, 3, 3\)"),
    ("conv_weight_grad", {"grad": torch.zeros(2, 4, 3, 3).half()}, "grad must have input's dtype"),
    ("conv_weight_grad", {"input": X.double()}, "input must be float32, bfloat16 or float16"),
    ("conv_weight_grad", {"weight_size": [4, 5, 3, 3]}, "weight must have shape .* for input of 6 channels"),
    ("conv_weight_grad", {"stats": STATS, "bn_bias": torch.zeros(4)}, r"bn_bias must have shape \(6,\)"),
)
GRADIENTS = {"conv_input_grad": conv_input_grad, "conv_weight_grad": conv_weight_grad}


@pytest.mark.parametrize(
    "backend, operator, wrong, message",
    [
        (backend, *case)
        for backend in ("cuda", "triton")
        for case in WRONG
        if backend == "triton" or case[0] not in GRADIENTS
    ],
    indirect=["backend"],
)
def test_errors(backend, operator, wrong, message):
    function = GRADIENTS.get(operator) or getattr(kernels(backend), operator)
    with pytest.raises(ArgumentError, match=message):
        function(**(CALLS[operator] | wrong))
