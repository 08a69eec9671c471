"""Convolution with 3x3 kernels of stride 1 by Winograd's F(4x4, 3x3), on the CPU.

After Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015): 36 multiplications where
the direct way has 144. Sums are float32 (float64 for float64), and the result is the same for any number of
threads. It is not that of the direct way to the last bit: errors are some 1e-5 of the largest element in
float32. An infinity or a NaN in the input reaches every output of the tiles that read it, which are 4x4
pixels, as NaN; so do values within a factor of 100 of the largest float.

Low-level operators, with which a convolution with bias, addition and activation, its gradients, and the
statistics of the batch norm that follows it can be made; and :func:`conv2d_3x3`, which is differentiable.
They take any strides, and give results in the input's memory format. Padding is ``(top, left, bottom,
right)``; a negative one crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..errors import ArgumentError
from . import _library
from .conv_activations import ACTIVATIONS as ACTIVATIONS

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
#: Fewer channels than these fill no vector.
LEAST_CHANNELS = 16
#: With fewer tiles than this, a transformed weight of more bytes than a second-level cache has makes it
#: slower than the direct convolution: it is four times as large, and reading it takes longer than the
#: arithmetic that is saved. 512 channels at 7x7 in a batch of 1 (4 tiles, 38 MB) run at 0.67 times oneDNN's
#: speed. At 12 GB/s and 110 GFLOP/s, about what a core does, both take the same time for 4.6 full tiles, of
#: any channels.
FEWEST_TILES, SMALL_WEIGHT = 6, 2 << 20
_TILE, _POINTS, _PADDED = 4, 36, 16


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that is computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weight_fake(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    outs, channels = weight.shape[0] // groups, weight.shape[1]
    into, out = (outs, channels) if transposed else (channels, outs)
    padded = (out + _PADDED - 1) // _PADDED * _PADDED
    return weight.new_empty((groups, _POINTS, into, padded), dtype=_wide(weight.dtype))


def _conv_fake(
    input: Tensor,
    weight: Tensor,
    bias: Any,
    residual: Any,
    padding: Sequence[int],
    out_channels: int,
    *_: Any,
) -> Tensor:
    top, left, bottom, right = padding
    height, width = input.shape[2:]
    channels_last = _library.suggests_channels_last(input)
    return torch.empty(
        (input.shape[0], out_channels, height + top + bottom - 2, width + left + right - 2),
        dtype=input.dtype,
        device=input.device,
        memory_format=_library.memory_format(2, channels_last),
    )


def _stats_fake(
    input: Tensor, weight: Tensor, bias: Any, padding: Sequence[int], out_channels: int, groups: int
) -> tuple[Tensor, Tensor]:
    output = _conv_fake(input, weight, bias, None, padding, out_channels)
    return output, input.new_empty((2, out_channels), dtype=torch.float64)


#: The weight ``(out, in / groups, 3, 3)`` for the operators below, in float32 or float64. Its order is the
#: instruction set's, so it is not to be kept beyond the process. With ``transposed`` it is that of the
#: convolution which makes the gradient of an input.
winograd_weight = _library.define(
    "winograd_weight(Tensor weight, SymInt groups, bool transposed)",
    "Tensor",
    _weight_fake,
    vmap=False,
)

#: ``activation(conv(input, weight) + bias + residual)``, rounded once; without what is not given. ``weight``
#: is a :data:`winograd_weight`, or ``(out, in / groups, 3, 3)`` of the input's dtype, which is transformed in
#: memory that is used again: that is faster where a weight is used once, and slower where it can be kept.
#: ``activation`` is an index of :data:`ACTIVATIONS`, ``slope`` that of a leaky ReLU.
winograd_conv = _library.define(
    "winograd_conv(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, SymInt[] padding, "
    "SymInt out_channels, SymInt groups, int activation, float slope)",
    "Tensor",
    _conv_fake,
    vmap=False,
)

#: ``conv(input, weight) + bias`` and its statistics, as ``batch_norm_stats`` has them; ``weight`` as above.
winograd_conv_stats = _library.define(
    "winograd_conv_stats(Tensor input, Tensor weight, Tensor? bias, SymInt[] padding, SymInt out_channels, "
    "SymInt groups)",
    "(Tensor, Tensor)",
    _stats_fake,
    vmap=False,
)

#: The gradient of the input from the weight ``(out, in / groups, 3, 3)``; ``padding`` is the convolution's.
winograd_input_grad = _library.define(
    "winograd_input_grad(Tensor grad, Tensor weight, SymInt[] padding, SymInt groups)",
    "Tensor",
    lambda grad, weight, padding, groups: _conv_fake(
        grad, weight, None, None, [2 - side for side in padding], weight.shape[1] * groups
    ),
    vmap=False,
)

#: The gradient of the weight, contiguous and of the input's dtype.
winograd_weight_grad = _library.define(
    "winograd_weight_grad(Tensor input, Tensor grad, SymInt[] padding, SymInt groups)",
    "Tensor",
    lambda input, grad, padding, groups: input.new_empty((grad.shape[1], input.shape[1] // groups, 3, 3)),
    vmap=False,
)


def why_not(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> str | None:
    """Why these operators should not make a 2-d convolution, or None if they should.

    That is, why they cannot, or are known to be slower than PyTorch's convolution.

    Args:
        x: the input, ``(N, C, H, W)`` or ``(C, H, W)``.
        weight: ``(O, C / groups, KH, KW)``.
        stride: for height and width, as ``dilation``.
        padding: for height and width, or (top, left, bottom, right).
    """
    reason = _why_impossible(x, weight, stride, padding, dilation)
    return reason if reason is not None else _why_slower(x, weight, padding, groups)


def _why_impossible(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
) -> str | None:
    if _native.module is None:
        return f"there are no compiled kernels: {_native.why_not}"
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return f"Winograd's kernels are for the CPU, and the input is on {x.device.type}"
    if x.dtype not in DTYPES:
        return f"Winograd's kernels are for floating-point dtypes, and the input is {x.dtype}"
    if weight.dtype != x.dtype:
        return f"the weight is {weight.dtype} and the input {x.dtype}"
    if x.dim() != 4 or weight.dim() != 4:
        return f"the input has {x.dim()} dimensions instead of 4"
    if tuple(weight.shape[2:]) != (3, 3):
        return f"the kernel is {'x'.join(map(str, weight.shape[2:]))} instead of 3x3"
    if tuple(stride) != (1, 1):
        return f"the stride is {tuple(stride)} instead of 1"
    if tuple(dilation) != (1, 1):
        return f"the dilation is {tuple(dilation)} instead of 1"
    if isinstance(padding, str):
        return f"the padding is {padding!r} instead of numbers"
    return None


def _why_slower(x: Tensor, weight: Tensor, padding: Any, groups: int) -> str | None:
    channels, features = weight.shape[1], weight.shape[0] // groups
    if min(channels, features) < LEAST_CHANNELS:
        return f"a group has {min(channels, features)} channels, which fill no vector"
    top, left, bottom, right = sides(padding)
    rows = -(-(x.shape[2] + top + bottom - 2) // _TILE)
    columns = -(-(x.shape[3] + left + right - 2) // _TILE)
    tiles = x.shape[0] * rows * columns
    transformed = groups * _POINTS * channels * features * _wide(x.dtype).itemsize
    if tiles < FEWEST_TILES and transformed > SMALL_WEIGHT:
        return f"the transformed weight of {transformed >> 20} MiB would be read for {tiles} tiles alone"
    return None


def sides(padding: Sequence[int]) -> list[int]:
    """(height, width) as (top, left, bottom, right); four sides as they are."""
    if len(padding) == 4:
        return list(padding)
    if len(padding) != 2:
        raise ArgumentError(f"padding must be two or four integers, but got {list(padding)}")
    return [padding[0], padding[1], padding[0], padding[1]]


def input_grad(
    grad: Tensor, weight: Tensor, padding: Sequence[int], groups: int = 1, transformed: Tensor | None = None
) -> Tensor:
    """The gradient of a convolution's input.

    Args:
        grad: of the output, ``(N, O, H, W)``.
        weight: ``(O, C / groups, 3, 3)``.
        padding: the convolution's, (top, left, bottom, right).
        transformed: ``winograd_weight(weight, groups, True)`` where it is at hand.
    """
    if transformed is None:
        return winograd_input_grad(grad, weight, padding, groups)
    turned = [2 - side for side in padding]
    return winograd_conv(grad, transformed, None, None, turned, weight.shape[1] * groups, groups, 0, 0.0)


class Conv3x3(torch.autograd.Function):
    """The convolution and its gradients by Winograd; gradients of gradients by convolutions again."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], groups: int
    ) -> Tensor:
        return winograd_conv(x, weight, bias, None, padding, weight.shape[0], groups, 0, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.padding, ctx.groups = inputs
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        of_x = Conv3x3InputGrad.apply(grad, weight, ctx.padding, ctx.groups) if wants_x else None
        of_weight = Conv3x3WeightGrad.apply(x, grad, ctx.padding, ctx.groups) if wants_weight else None
        of_bias = None
        if wants_bias and ctx.bias is not None:
            of_bias = grad.sum((0, 2, 3)).to(ctx.bias)
        return of_x, of_weight, of_bias, None, None


class Conv3x3InputGrad(torch.autograd.Function):
    """The gradient of the input, which is linear in ``grad`` and in ``weight``."""

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, padding: Sequence[int], groups: int) -> Tensor:
        return input_grad(grad, weight, padding, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, weight, ctx.padding, ctx.groups = inputs
        ctx.save_for_backward(grad, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (above,) = grads
        grad, weight = ctx.saved_tensors
        wants_grad, wants_weight, *_ = ctx.needs_input_grad
        of_grad = Conv3x3.apply(above, weight, None, ctx.padding, ctx.groups) if wants_grad else None
        of_weight = Conv3x3WeightGrad.apply(above, grad, ctx.padding, ctx.groups) if wants_weight else None
        return of_grad, of_weight, None, None


class Conv3x3WeightGrad(torch.autograd.Function):
    """The gradient of the weight, which is linear in ``x`` and in ``grad``."""

    @staticmethod
    def forward(x: Tensor, grad: Tensor, padding: Sequence[int], groups: int) -> Tensor:
        return winograd_weight_grad(x, grad, padding, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, grad, ctx.padding, ctx.groups = inputs
        ctx.save_for_backward(x, grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (above,) = grads
        x, grad = ctx.saved_tensors
        wants_x, wants_grad, *_ = ctx.needs_input_grad
        of_x = Conv3x3InputGrad.apply(grad, above, ctx.padding, ctx.groups) if wants_x else None
        of_grad = Conv3x3.apply(x, above, None, ctx.padding, ctx.groups) if wants_grad else None
        return of_x, of_grad, None, None


def conv2d_3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """A 2-d convolution of stride 1 with a 3x3 kernel, differentiable any number of times.

    Args:
        x: ``(N, C, H, W)``, float32, float64, bfloat16 or float16, on the CPU.
        weight: ``(O, C / groups, 3, 3)`` of the same dtype.
        bias: ``(O,)``.
        padding: (height, width), or (top, left, bottom, right).

    Returns:
        ``(N, O, H', W')`` of ``x``'s dtype, in its memory format.

    Raises:
        ArgumentError: the arguments do not go together, or there are no kernels for them.
    """
    reason = _why_impossible(x, weight, (1, 1), padding, (1, 1))
    if reason is not None:
        raise ArgumentError(f"conv2d_3x3: {reason}")
    if weight.shape[1] * groups != x.shape[1] or weight.shape[0] % groups:
        raise ArgumentError(
            f"weight must be (out, {x.shape[1]} / groups, 3, 3) with out a multiple of groups, but got "
            f"{tuple(weight.shape)} for {groups} groups"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ArgumentError(f"bias must have shape ({weight.shape[0]},), but got {tuple(bias.shape)}")
    return Conv3x3.apply(x, weight, bias, sides(padding), groups)  # type: ignore[return-value]
