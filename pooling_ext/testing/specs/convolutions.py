"""Convolutions: by Winograd, depthwise, of images, of single pixels; with batch norm and an activation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from torch.func import functional_call

import pooling_ext.functional as F

from ...ops import depthwise_conv, image_conv, winograd, winograd_weights  # noqa: F401 they define operators
from ..opspec import ONE_ROUNDING, LowLevelCall, OpSpec, Tensors, levels
from .batch_norms import batch_norm_act, norm_arguments

#: Winograd's transforms lose some bits, but those of 16-bit tensors are in float32.
OFF = ONE_ROUNDING | {torch.float32: 2e-5, torch.float64: 1e-13}


class Arguments:
    """An input, a bias, and weights that keep the input's size."""

    def __init__(self, features: int, kernel: tuple[int, ...], groups: int = 1):
        self.features, self.kernel, self.groups = features, kernel, groups

    def __call__(self, shape: Sequence[int], dtype: torch.dtype) -> Tensors:
        weights = self.features, shape[1] // self.groups, *self.kernel
        size = 2.0 ** -round(math.log2(math.prod(weights[1:])) / 2)
        return {
            "input": levels(shape, dtype),
            "weight": levels(weights, dtype) * size,
            "bias": levels((self.features,), dtype),
        }


def _conv(
    label: str, rank: int, wide: Any, small: Any, arguments: Arguments, low_level: Any = tuple, **options: Any
) -> OpSpec:
    name, groups = f"conv{rank}d", {"groups": arguments.groups} if arguments.groups > 1 else {}
    return OpSpec(
        name,
        getattr(F, name),
        getattr(TF, name),
        arguments,
        wide,
        small,
        {label: options | groups},
        off=OFF,
        fast=True,
        autocast=True,
        changes_in_programs=True,
        low_level=low_level,
    )


class Block(nn.Module):
    """A convolution and a batch norm, whose parameters and buffers a call names."""

    def __init__(self, tracks: bool, training: bool, activation: str):
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False, device="meta")
        self.bn = nn.BatchNorm2d(CHANNELS, device="meta", track_running_stats=tracks)
        self.bn.num_batches_tracked = None  # a call has none
        self.activation = activation
        self.train(training)

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return F.conv_bn_act(self.conv, self.bn, input, residual, self.activation)


CHANNELS = 32
# Made here, since torch.func and torch.compile do not take modules that are made in a call.
_BLOCKS: dict[tuple[bool, bool, str], Block] = {
    key: Block(*key) for key in product((True, False), (True, False), ("relu", "silu"))
}


def conv_bn_act(
    input: Tensor,
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    activation: str = "relu",
) -> Tensor:
    """:func:`pooling_ext.functional.conv_bn_act` of tensors."""
    tensors = {"conv.weight": kernel, "bn.weight": weight, "bn.bias": bias}
    if running_mean is not None and running_var is not None:
        tensors |= {"bn.running_mean": running_mean, "bn.running_var": running_var}
    block = _BLOCKS[running_mean is not None, training, activation]
    return functional_call(block, tensors, (input, residual))


def unfused(input: Tensor, kernel: Tensor, **arguments: Any) -> Tensor:
    """The reference: PyTorch's convolution, then the reference of the batch norm."""
    return batch_norm_act(TF.conv2d(input, kernel, padding=1), **arguments)


def block_arguments(shape: Sequence[int], dtype: torch.dtype) -> Tensors:
    kernel = levels((CHANNELS, CHANNELS, 3, 3), dtype) / 16
    return norm_arguments(True)(shape, dtype) | {"kernel": kernel}


def _low_level() -> Iterator[LowLevelCall]:
    ops = torch.ops.pooling_ext
    x, weight, bias = torch.rand(2, 16, 7, 8), torch.rand(16, 16, 3, 3), torch.rand(16)
    yield "winograd_weight", ops.winograd_weight, (weight, 1, False)
    yield "fingerprint", ops.fingerprint, (weight, bias, bias, None, bias, None)
    transformed, output = ops.winograd_weight(weight, 1, False), torch.rand(2, 16, 7, 8)
    padding, grouping = [1, 1, 1, 1], (16, 1)
    yield "winograd_conv", ops.winograd_conv, (x, transformed, bias, output, padding, *grouping, 1, 0.0)
    yield "winograd_conv_stats", ops.winograd_conv_stats, (x, transformed, bias, padding, *grouping)
    yield "winograd_input_grad", ops.winograd_input_grad, (output, weight, padding, 1)
    yield "winograd_weight_grad", ops.winograd_weight_grad, (x, output, padding, 1)


def _depthwise_calls() -> Iterator[LowLevelCall]:
    ops, windows = torch.ops.pooling_ext, ([2, 1], [1, 1])
    x, weight, bias = torch.rand(2, 16, 7, 8), torch.rand(16, 1, 3, 3), torch.rand(16)
    grad = torch.rand(2, 16, 4, 8)
    yield "depthwise_conv", ops.depthwise_conv, (x, weight, bias, *windows, 1, 0.0)
    yield "depthwise_conv_stats", ops.depthwise_conv_stats, (x, weight, bias, *windows)
    back = (grad, weight, x.shape, *windows, False)
    yield "depthwise_conv_input_grad", ops.depthwise_conv_input_grad, back
    back = (grad, x, weight.shape, *windows, False, True)
    yield "depthwise_conv_weight_grad", ops.depthwise_conv_weight_grad, back


def _image_calls() -> Iterator[LowLevelCall]:
    ops, windows = torch.ops.pooling_ext, ([2, 1], [1, 1])
    x, weight, bias = torch.rand(2, 3, 7, 8), torch.rand(5, 3, 3, 3), torch.rand(5)
    yield "image_conv", ops.image_conv, (x, weight, bias, *windows, 1, 0.0)
    yield "image_conv_stats", ops.image_conv_stats, (x, weight, bias, *windows)
    back = (torch.rand(2, 5, 4, 8), x, weight.shape, *windows)
    yield "image_conv_weight_grad", ops.image_conv_weight_grad, back


_SQUARE = (3, 3)

SPECS: tuple[OpSpec, ...] = (
    _conv("winograd", 2, (2, 48, 18, 17), (2, 16, 5, 6), Arguments(32, _SQUARE), _low_level, padding=1),
    _conv("winograd-strided", 2, (2, 32, 18, 17), (2, 16, 5, 6), Arguments(32, _SQUARE), padding=1, stride=2),
    _conv(
        "depthwise",
        2,
        (2, 40, 18, 17),
        (1, 40, 4, 5),
        Arguments(40, _SQUARE, 40),
        _depthwise_calls,
        padding=1,
    ),
    _conv(
        "image", 2, (2, 3, 18, 17), (2, 3, 6, 5), Arguments(20, _SQUARE), _image_calls, padding=1, stride=2
    ),
    _conv("pointwise", 2, (2, 48, 9, 8), (2, 8, 3, 4), Arguments(32, (1, 1))),
    _conv("winograd", 1, (2, 20, 37), (2, 16, 9), Arguments(24, (3,)), padding=1),
    _conv("winograd-7", 1, (2, 20, 37), (2, 16, 9), Arguments(24, (7,)), padding=3),
    _conv("winograd-5x5", 2, (2, 20, 9, 11), (2, 16, 5, 4), Arguments(24, (5, 5)), padding=2),
    _conv("winograd-7x1", 2, (2, 20, 9, 11), (2, 16, 5, 4), Arguments(24, (7, 1)), padding=(3, 0)),
    _conv("winograd", 3, (1, 16, 3, 9, 8), (1, 16, 2, 4, 4), Arguments(16, (3, 3, 3)), padding=1),
    OpSpec(
        "conv_bn_act",
        conv_bn_act,
        unfused,
        block_arguments,
        (2, CHANNELS, 10, 9),
        (2, CHANNELS, 4, 5),
        {
            f"{activation}-{mode}": {"training": mode == "training", "activation": activation}
            for activation, mode in product(("relu", "silu"), ("training", "eval"))
        },
        # In 16 bits what the convolution writes is rounded, which moves values across ReLU's corner.
        dtypes=(torch.float32, torch.float64),
        off=OFF,
        fast=True,
        autocast=True,
        changes_in_programs=True,
    ),
)
