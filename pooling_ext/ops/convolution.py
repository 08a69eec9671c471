"""conv1d, conv2d and conv3d of torch.nn.functional by our kernels of the CPU where they are faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from .. import backends
from .._conv_docstrings import convolutions
from ..autograd import needs_grad, transformed
from ..exporting import is_exporting
from . import conv_choice, winograd_weights
from ._library import suggests_channels_last
from ._torch_function import public
from .conv_choice import FORWARD, MOST_IMAGE_CHANNELS, PHASES, WHY_NOT, WINOGRAD, Conv, call_why_not
from .conv_kernels import convolve, in_format, plan
from .conv_shape import has_winograd_kernel
from .winograd import winograd_conv


@public
@convolutions(1)
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution of sequences; a drop-in for :func:`torch.nn.functional.conv1d`.

    On the CPU, kernels of 3 and 7 run by Winograd's F(4, 3) and F(4, 7), and those of 1 in float32 as matrix
    products, where these are known to be faster. Other convolutions fall back to PyTorch. All are
    differentiable any number of times.
    """
    return _convolved("conv1d", F.conv1d, 1, input, weight, bias, stride, padding, dilation, groups)


@public
@convolutions(2)
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution of images; a drop-in for :func:`torch.nn.functional.conv2d`.

    On the CPU, 3x3 kernels of stride 1 or 2 run by Winograd's F(4x4, 3x3), those of 5x5, 1x3, 3x1, 1x7 and
    7x1 by its like, depthwise kernels of 3x3, 5x5 and 7x7 and any kernels on images of up to 4 channels on
    kernels of their own, and 1x1 kernels in float32 as matrix products, where these are known
    to be faster. Other convolutions fall back to PyTorch. All are differentiable any number of times.

    In float32 Winograd's results are off by a few 1e-6 of the largest element.
    """
    return _convolved("conv2d", F.conv2d, 2, input, weight, bias, stride, padding, dilation, groups)


@public
@convolutions(3)
def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution of volumes or videos; a drop-in for :func:`torch.nn.functional.conv3d`.

    On the CPU, kernels of Dx3x3 run by Winograd's F(4x4, 3x3), as a sum over their D planes, where that is
    known to be faster. Other convolutions fall back to PyTorch. All are differentiable any number of times.
    """
    return _convolved("conv3d", F.conv3d, 3, input, weight, bias, stride, padding, dilation, groups)


def _convolved(
    name: str,
    theirs: Callable[..., Tensor],
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    if _is_others(rank, input, weight, bias, groups):
        return theirs(input, weight, bias, stride, padding, dilation, groups)
    x, w, b = _as_autocast(input, weight, bias)
    why_not, conv = _describe(rank, x, w, b, stride, padding, dilation, groups)
    if conv is not None:
        grads = needs_grad(x, w, b)
        for kernels in WHY_NOT:
            reason = call_why_not(kernels, conv, PHASES if grads else (FORWARD,))
            if reason is not None:
                why_not[kernels] = reason
            elif kernels == WINOGRAD and is_compiling() and not grads:
                why_not[kernels] = "a compiled graph would transform the weight at every call"
            else:
                backends.record(name, kernels, why_not)
                if rank == 1:  # as an image of one row
                    x = x.unsqueeze(2)
                if kernels == WINOGRAD and not grads:
                    y = _winograd(x, w, b, conv)  # which keeps something for the weight itself
                else:
                    y = convolve(x, w.unsqueeze(2) if rank == 1 else w, b, plan(kernels, conv))
                return y.squeeze(2) if rank == 1 else y
    backends.record(name, backends.ATEN.name, why_not)
    return theirs(input, weight, bias, stride, padding, dilation, groups)


def _is_others(rank: int, input: Tensor, weight: Any, bias: Any, groups: Any) -> bool:
    """Whether a first look shows that PyTorch's operator is to do a call; explain has all reasons."""
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        return True
    if groups != 1 or is_compiling() or backends.recording():
        return False
    if weight.dim() != rank + 2:
        return True
    points = math.prod(weight.shape[2:])
    return input.numel() * weight.shape[0] * points < conv_choice.LEAST_WORK or (
        points != 1 and weight.shape[1] > MOST_IMAGE_CHANNELS and not has_winograd_kernel(weight.shape[2:])
    )


def _winograd(input: Tensor, weight: Tensor, bias: Tensor | None, conv: Conv) -> Tensor:
    step = conv.stride[-1]
    transformed_weight, bias = winograd_weights.transformed(weight, bias, None, conv.groups, step)
    x, rest = in_format(input, conv.channels_last), (conv.padding, conv.features, conv.groups)
    geometry = conv.stride, conv.dilation, conv.kernel[-2:]
    return winograd_conv(x, transformed_weight, bias, None, *rest, 0, 0.0, *geometry)


def _describe(
    rank: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> tuple[dict[str, str], Conv | None]:
    """The convolution, or the reasons why our kernels can do none of these arguments."""
    reason = _why_not_ours() or _why_not_plain(rank, input, weight, bias, groups)
    strides, dilations, kernel = _numbers(stride, rank), _numbers(dilation, rank), tuple(weight.shape[2:])
    paddings = _paddings(padding, rank, kernel, strides, dilations)
    if reason is None and None in (strides, dilations, paddings):
        reason = f"the stride, padding or dilation is not {rank} numbers"
    if reason is not None:
        return dict.fromkeys(WHY_NOT, reason), None
    channels_last = rank > 1 and (suggests_channels_last(input) or suggests_channels_last(weight))
    batch, channels, *size = input.shape
    if rank == 1:
        size, kernel, paddings = [1, *size], (1, *kernel), (0, *paddings)  # type: ignore[misc]
        strides, dilations = (1, *strides), (1, *dilations)  # type: ignore[misc]
    conv = Conv(
        batch,
        channels,
        tuple(size),
        weight.shape[0],
        kernel,  # type: ignore[arg-type]
        strides,  # type: ignore[arg-type]
        (*paddings, *paddings),  # type: ignore[misc]
        dilations,  # type: ignore[arg-type]
        groups,
        input.dtype,
        channels_last,
    )
    return {}, conv


def _why_not_ours() -> str | None:
    """Why PyTorch's operator has to do a call, whatever its arguments."""
    if backends.forced() not in (None, "cpu"):
        return f"backend {backends.forced()!r} was asked for"
    if is_tracing():
        return "torch.jit traces"
    if is_exporting():  # for every size of a batch, and with gradients
        return "an exported program has PyTorch's operators"
    return "torch.func or forward mode is at work" if transformed() else None


def _why_not_plain(rank: int, input: Tensor, weight: Tensor, bias: Tensor | None, groups: Any) -> str | None:
    """Why tensors are none of which our kernels make a convolution."""
    if not all(map(_is_plain, (input, weight, bias))):
        return "a tensor is not on the CPU, or of a class of its own"
    if {input.dim(), weight.dim()} != {rank + 2} or input.numel() == 0 or input.layout != torch.strided:
        return "the input is no batch of images"
    if any(x is not None and x.dtype != input.dtype for x in (weight, bias)):
        return "the dtypes differ"
    if not isinstance(groups, int) or groups < 1 or weight.shape[1] * groups != input.shape[1]:
        return "the channels do not go with the weight"
    if weight.shape[0] % groups or (bias is not None and bias.shape != weight.shape[:1]):
        return "the weight does not go with groups or bias"
    return None


def _paddings(
    padding: Any,
    rank: int,
    kernel: tuple[int, ...],
    strides: tuple[int, ...] | None,
    dilations: tuple[int, ...] | None,
) -> tuple[int, ...] | None:
    """The zeros on each side of each axis; None where these differ or PyTorch refuses the padding."""
    if not isinstance(padding, str):
        return _numbers(padding, rank)
    if padding == "valid":
        return (0,) * rank
    spans = [gap * (size - 1) for gap, size in zip(dilations or (), kernel, strict=False)]
    if padding != "same" or strides != (1,) * rank or any(span % 2 for span in spans):
        return None
    return tuple(span // 2 for span in spans)


def _is_plain(x: Tensor | None) -> bool:
    return x is None or (x.is_cpu and type(x) in backends.PLAIN_TENSORS)


def _numbers(value: Any, rank: int) -> tuple[int, ...] | None:
    """A number or one or ``rank`` of them as so many; None for what is neither."""
    if isinstance(value, int):
        return (value,) * rank
    if not isinstance(value, (tuple, list)) or not all(isinstance(x, int) for x in value):
        return None
    found = tuple(value) * rank if len(value) == 1 else tuple(value)
    return found if len(found) == rank else None


def _as_autocast(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors in the dtype that autocast gives a convolution, where it is on."""
    if input.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return input, weight, bias
    dtype = torch.get_autocast_dtype("cpu")

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    return cast(input), cast(weight), None if bias is None else cast(bias)
