"""Convolutions with what is fused into them, and their results in float64.

Data are small integers wherever that is possible: sums are exact then, and results are compared bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as TF
from helpers import dtype_id, integers
from torch import Tensor

from pooling_ext.backends import cuda_library
from pooling_ext.ops import cuda_conv
from pooling_ext.ops.activations import IDENTITY, RELU
from pooling_ext.ops.conv import conv_bias_act, conv_stats
from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON = pytest.mark.parametrize(
    "backend", ["triton", pytest.param("triton-cuda", marks=pytest.mark.gpu)], indirect=True
)
CUDA = pytest.mark.parametrize(
    "backend", ["cuda", pytest.param("cuda-cuda", marks=pytest.mark.gpu)], indirect=True
)
#: The same for what CUDA has kernels of too: `kernels` gives them.
KERNELS = pytest.mark.parametrize(
    "backend",
    ["cuda", "triton", *(pytest.param(f"{name}-cuda", marks=pytest.mark.gpu) for name in ("cuda", "triton"))],
    indirect=True,
)
ALL_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
EPS = 2.0**-10
LEAKY_SLOPE = 0.125
#: The activations of the CPU's convolutions, as PyTorch has them; leaky_relu of LEAKY_SLOPE.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": TF.relu,
    "relu6": TF.relu6,
    "silu": TF.silu,
    "hardswish": TF.hardswish,
    "leaky_relu": lambda x: TF.leaky_relu(x, LEAKY_SLOPE),
    "gelu": TF.gelu,
    "gelu_tanh": lambda x: TF.gelu(x, approximate="tanh"),
    "hardsigmoid": TF.hardsigmoid,
}


class Kernels(NamedTuple):
    """A backend's forward operators."""

    conv_bias_act: Callable[..., Tensor]
    conv_stats: Callable[..., tuple[Tensor, Tensor]]


def kernels(backend: str, tile: int | None = None) -> Kernels:
    """Those of ``backend``: CUDA's in one of its tiles, the last if none is named."""
    if backend == "triton":
        return Kernels(conv_bias_act, conv_stats)
    number = len(cuda_library.conv_tiles()) - 1 if tile is None else tile
    functions = cuda_conv.conv_bias_act, cuda_conv.conv_stats
    return Kernels(*(partial(function, tile=number) for function in functions))


class Conv(NamedTuple):
    """A convolution; ``window`` is its stride, padding and dilation."""

    shape: tuple[int, int, int, int]
    features: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def window(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), list(self.padding), list(self.dilation)

    def weight(self, dtype: torch.dtype) -> Tensor:
        return integers((self.features, self.shape[1], *self.kernel_size), dtype, -2, 2)

    def input(self, dtype: torch.dtype) -> Tensor:
        return integers(self.shape, dtype, -3, 3)

    def output(self, dtype: torch.dtype) -> Tensor:
        """Integers of the output's shape."""
        shape = self.expected(torch.zeros(self.shape), torch.zeros_like(self.weight(torch.float32))).shape
        return integers(shape, dtype, -3, 3)

    def expected(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None else bias.double()
        return TF.conv2d(input.double(), weight.double(), bias, self.stride, self.padding, self.dilation)


CONVS = {
    "1x1": Conv((2, 64, 7, 5), 32),
    "1x1 stride": Conv((2, 17, 9, 6), 24, stride=(2, 2)),
    "1x1 padding": Conv((2, 3, 4, 5), 5, padding=(1, 0)),
    "3x3": Conv((2, 64, 6, 7), 48, (3, 3), padding=(1, 1)),
    "3x3 stride": Conv((2, 17, 9, 8), 20, (3, 3), (2, 2), (1, 1)),
    "3x3 dilation": Conv((1, 32, 7, 7), 16, (3, 3), padding=(2, 2), dilation=(2, 2)),
    "3x3 stride dilation": Conv((1, 16, 9, 10), 17, (3, 3), (2, 2), (2, 2), (2, 2)),
    "3x3 stride odd dilation": Conv((1, 3, 11, 9), 4, (3, 3), (2, 2), (3, 2), (3, 1)),
    "5x5 stride": Conv((2, 32, 8, 7), 16, (5, 5), (2, 2), (2, 2)),
    "7x7 stem": Conv((2, 3, 13, 11), 16, (7, 7), (2, 2), (3, 3)),
    "1x3 asymmetric": Conv((1, 16, 5, 9), 16, (1, 3), (1, 2), (0, 1)),
    "2x2 with gaps": Conv((2, 5, 8, 7), 3, (2, 2), (3, 3)),
    "one pixel": Conv((3, 16, 1, 1), 1),
}


def cases(names: Iterable[str], half: Iterable[str]) -> Any:
    """Parametrizes a test with the convolutions ``names`` in float32, and ``half`` in 16 bits."""
    pairs = [(name, torch.float32) for name in names]
    pairs += [(name, dtype) for dtype in (torch.bfloat16, torch.float16) for name in half]
    ids = [f"{name}-{dtype_id(dtype)}" for name, dtype in pairs]
    return pytest.mark.parametrize("conv, dtype", [(CONVS[name], dtype) for name, dtype in pairs], ids=ids)


def channel_stats(x: Tensor) -> Tensor:
    x = x.double()
    return torch.stack((x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)))


def exact_norm(channels: int) -> dict[str, Tensor]:
    """A batch norm of which all is exact in float32, with shifts that ReLU lets through."""
    variance = torch.full((channels,), 1.0 - EPS)
    return {
        "stats": torch.stack((integers((channels,), torch.float64, -2, 2), variance.double())),
        "bn_weight": torch.tensor([1.0, -1.0, 2.0, 0.5])[torch.arange(channels) % 4],
        "bn_bias": integers((channels,), torch.float32, -1, 3),
    }


def normalize(x: Tensor, norm: dict[str, Tensor], relu: bool, eps: float = EPS) -> Tensor:
    """The reference's batch norm, in float64."""
    mean, var = norm["stats"]
    weight, bias = norm["bn_weight"].double(), norm["bn_bias"].double()
    activation = RELU if relu else IDENTITY
    return reference.batch_norm_act(x.double(), mean, var, weight, bias, False, eps, None, activation)


def assert_rounded(actual: Tensor, expected: Tensor) -> None:
    """It is ``expected``, rounded once; Triton's interpreter rounds to bfloat16 toward zero."""
    assert_close(actual, expected, exact=actual.dtype != torch.bfloat16 or actual.is_cuda)


def input_grad(conv: Conv, grad: Tensor, weight: Tensor, x: Tensor | None = None, **norm: Any) -> Any:
    """(gradient, sums) in float64, by autograd."""
    leaf = torch.zeros(conv.shape, dtype=torch.float64) if x is None else x.double()
    leaf.requires_grad_()
    if x is None:
        (result,) = torch.autograd.grad(conv.expected(leaf, weight), leaf, grad.double())
        return result, None
    relu = norm.pop("relu")
    before = normalize(leaf, norm, False)
    before.retain_grad()
    conv.expected(before.relu() if relu else before, weight).backward(grad.double())
    assert before.grad is not None
    deviation = leaf.detach() - norm["stats"][0].view(1, -1, 1, 1)
    result = before.grad
    return result, torch.stack((result.sum((0, 2, 3)), (result * deviation).sum((0, 2, 3))))


def weight_grad(
    conv: Conv, grad: Tensor, x: Tensor, norm: dict[str, Tensor] | None = None, relu: bool = False
) -> Tensor:
    """In float64, by autograd."""
    weight = conv.weight(torch.float64).requires_grad_()
    x = x.double() if norm is None else normalize(x, norm, relu)
    return torch.autograd.grad(conv.expected(x, weight), weight, grad.double())[0]


def call(operator: str, conv: Conv, dtype: torch.dtype, device: str | None = None) -> list[Any]:
    """Arguments with everything fused that the operator can fuse."""
    if device == "meta":
        with torch.device("meta"):
            x, weight = torch.empty(conv.shape, dtype=dtype), conv.weight(dtype)
            y = torch.empty(conv.expected(x, weight).shape, dtype=dtype)
            norm = [torch.empty(2, conv.shape[1], dtype=torch.float64), *(torch.empty(conv.shape[1]),) * 2]
    else:
        x, weight, y = conv.input(dtype), conv.weight(dtype), conv.output(dtype)
        norm = list(exact_norm(conv.shape[1]).values())
    if operator == "conv_bias_act":
        return [x, weight, None, y, *conv.window, True]
    if operator == "conv_stats":
        return [x, weight, None, *norm, EPS, True, *conv.window]
    if operator == "conv_weight_grad":
        return [y, x, list(weight.shape), *norm, EPS, True, *conv.window]
    return [y, weight, list(conv.shape), x, *norm, EPS, True, *conv.window]


def expected_of(operator: str, conv: Conv, arguments: list[Any]) -> tuple[Tensor, Tensor | None]:
    """What :func:`call`'s arguments are to give, and the statistics or sums of that as it is stored."""
    if operator == "conv_bias_act":
        x, weight, _, y, *_ = arguments
        return (conv.expected(x, weight) + y.double()).relu(), None
    stats, bn_weight, bn_bias = arguments[4:7] if operator == "conv_input_grad" else arguments[3:6]
    norm = {"stats": stats, "bn_weight": bn_weight, "bn_bias": bn_bias}
    if operator == "conv_weight_grad":
        return weight_grad(conv, *arguments[:2], norm, relu=True), None
    if operator == "conv_stats":
        x, weight = arguments[:2]
        result = conv.expected(normalize(x, norm, True), weight)
        return result, channel_stats(result.to(x.dtype))
    grad, weight, _, x = arguments[:4]
    result, _ = input_grad(conv, grad, weight, x, relu=True, **norm)
    deviation, stored = x.double() - stats[0].view(1, -1, 1, 1), result.to(x.dtype).double()
    return result, torch.stack((stored.sum((0, 2, 3)), (stored * deviation).sum((0, 2, 3))))


def assert_stats(stats: Tensor, stored: Tensor) -> None:
    """They are those of what is stored: deviations and their squares are summed in float32, in tiles."""
    (mean, var), (expected_mean, expected_var) = stats, channel_stats(stored)
    assert mean.shape == expected_mean.shape and stats.dtype == torch.float64
    torch.testing.assert_close(var, expected_var, rtol=1e-5, atol=1e-9)
    away = (mean - expected_mean).abs()
    assert (away <= 1e-6 * expected_var.sqrt() + 1e-7 * expected_mean.abs()).all()
