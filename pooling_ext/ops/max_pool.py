"""Max pooling, with windows of fixed size and adaptive ones.

In inference only the maxima are computed. In training each output also remembers the winner's *offset* in
the window, in one byte where the window has at most 255 elements and in an int32 where it has more (-1, in
a byte 255, where no element of the input lies in the window). ``return_indices`` makes PyTorch's int64
index in the plane instead. Everything past the forward pass is linear in the
values at those offsets: :data:`_gather` reads them, its transpose :data:`_scatter` adds to them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .. import backends
from .._docstrings import pools
from ..autograd import Differentiable, needs_autograd, refuse_empty
from ..windows import Windows, adaptive_kernel, adaptive_windows, fixed_windows
from . import _library
from ._torch_function import public
from .avg_pool import FLOATS

INTEGERS = frozenset((torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8))
backends.register(
    "max_pool",
    cpu=FLOATS | INTEGERS,
    cuda=FLOATS | INTEGERS,
    triton=FLOATS | INTEGERS,
    kernels=("max_pool", "max_pool_with_offsets", "max_pool_gather", "max_pool_backward"),
    triton_module="pooling_ext.triton.pool.max_pool",
)

#: Windows of so many elements remember indices instead of offsets, which would not fit.
_MANY_ELEMENTS = 2**30


def offsets_dtype(windows: Windows, input: Tensor, indices: bool) -> torch.dtype:
    """What the offsets of the maxima over ``windows`` are kept in."""
    if indices:
        return torch.int64
    sizes = windows.kernel_size
    if windows.adaptive:
        spatial = input.shape[input.dim() - len(windows.output_size) :]
        sizes = tuple(adaptive_kernel(n, out) for n, out in zip(spatial, windows.output_size, strict=True))
    size = math.prod(sizes)
    return torch.uint8 if size <= 255 else torch.int32 if size < _MANY_ELEMENTS else torch.int64


_max_pool_values = _library.define(
    "max_pool(Tensor input, {windows})",
    "Tensor",
    lambda input, output_size, *_: _library.empty(input, output_size),
)


def _offsets_fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    windows, indices = Windows(*args[:5]), args[5]
    offsets = _library.empty(input, windows.output_size, offsets_dtype(windows, input, indices))
    return _library.empty(input, windows.output_size), offsets


_max_pool_with_offsets = _library.define(
    "max_pool_with_offsets(Tensor input, {windows}, bool indices)", "(Tensor, Tensor)", _offsets_fake
)

_max_pool_gather = _library.define(
    "max_pool_gather(Tensor input, Tensor offsets, {windows})",
    "Tensor",
    lambda input, offsets, output_size, *_: _library.empty(offsets, output_size, input.dtype),
    tensors=2,
)

_max_pool_backward = _library.define(
    "max_pool_backward(Tensor grad, Tensor offsets, SymInt[] input_size, {windows})",
    "Tensor",
    lambda grad, offsets, input_size, output_size, *_: _library.empty(
        offsets, input_size[len(input_size) - len(output_size) :], grad.dtype
    ),
    tensors=2,
)


class _Gather(Function):
    """Reads the input at the remembered offsets."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, offsets: Tensor, windows: Windows) -> Tensor:
        return _max_pool_gather(input, offsets, *windows)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        input, offsets, ctx.windows = inputs
        ctx.input_size = input.shape
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        return _scatter(grads[0], offsets, ctx.input_size, ctx.windows), None, None


class _Scatter(Function):
    """Adds each output's gradient at its remembered offset: the transpose of :class:`_Gather`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, offsets: Tensor, input_size: tuple[int, ...], windows: Windows) -> Tensor:
        return _max_pool_backward(grad, offsets, tuple(input_size), *windows)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, offsets, ctx.input_size, ctx.windows = inputs
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        return _gather(grads[0], offsets, ctx.windows), None, None, None


class _MaxPool(Function):
    """Maxima and their offsets; only the offsets are kept for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, windows: Windows, indices: bool) -> tuple[Tensor, Tensor]:
        return _max_pool_with_offsets(input, *windows, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        input, ctx.windows, _ = inputs
        offsets = output[1]
        ctx.input_size = input.shape
        ctx.mark_non_differentiable(offsets)
        ctx.save_for_backward(offsets)
        ctx.save_for_forward(offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (offsets,) = ctx.saved_tensors
        if ctx.windows.adaptive and grads[0].numel() == 0:
            refuse_empty(grads[0])
        return _scatter(grads[0], offsets, ctx.input_size, ctx.windows), None, None


def _max_pool_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Any:
    (offsets,) = ctx.saved_tensors
    return _gather(tangent, offsets, ctx.windows), None


def _gather_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    (offsets,) = ctx.saved_tensors
    return _gather(tangent, offsets, ctx.windows)


def _scatter_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    (offsets,) = ctx.saved_tensors
    return _scatter(tangent, offsets, ctx.input_size, ctx.windows)


_gather = Differentiable(_Gather, _gather_jvp)
_scatter = Differentiable(_Scatter, _scatter_jvp)
_max_pool = Differentiable(_MaxPool, _max_pool_jvp)


def max_pool(input: Tensor, windows: Windows, return_indices: bool = False) -> Any:
    """Max pooling of ``input`` over ``windows``: the output, or ``(output, indices)``."""
    if backends.choose_pool("max_pool", input, windows) is backends.ATEN:
        return _aten_max_pool(input, windows, return_indices)
    differentiates = needs_autograd(input)
    # In two dimensions our operators look for themselves.
    if (
        len(windows.output_size) != 2
        and not input.is_contiguous()
        and _lies_otherwise(input, windows, differentiates or return_indices)
    ):
        return _relaid_max_pool(input, windows, return_indices)
    if differentiates:
        output, offsets = _max_pool(input, windows, bool(return_indices))
    elif return_indices:
        output, offsets = _max_pool_with_offsets(input, *windows, True)
    else:
        return _max_pool_values(input, *windows)
    return (output, offsets) if return_indices else output


def _lies_otherwise(input: Tensor, windows: Windows, with_offsets: bool) -> bool:
    """Whether the channels lie together where our operators do not look for it, and PyTorch's keep it."""
    rank = len(windows.output_size)
    if rank == 1:
        return (with_offsets or windows.adaptive) and _library.is_channels_last_1d(input)
    if windows.adaptive or input.dim() != 4:
        return False
    return input.movedim(0, -1).is_contiguous()


def _relaid_max_pool(input: Tensor, windows: Windows, return_indices: bool) -> Any:
    """:func:`max_pool` where :func:`_lies_otherwise` is true, by way of a tensor that lies as usual."""
    if len(windows.output_size) == 1:
        found, axis = max_pool(input.unsqueeze(-2), windows.flat, return_indices), -2
    else:
        # Not input[None], whose new stride is too small for a batch's.
        batch = input.movedim(0, -1).unsqueeze(0).movedim(-1, 1)
        found, axis = max_pool(batch, windows, return_indices), 0
    return tuple(x.squeeze(axis) for x in found) if return_indices else found.squeeze(axis)


def _aten_max_pool(input: Tensor, windows: Windows, return_indices: bool) -> Any:
    rank = len(windows.output_size)
    if input.dtype in INTEGERS and input.numel() > 0:
        # PyTorch lacks some of these and gets the indices of others wrong, so pool the elements'
        # offsets in sorted order, as floats.
        values, order = input.unique(return_inverse=True)
        order = torch.empty_like(input, dtype=torch.float64).copy_(order)
        pooled, indices = _aten_max_pool(order, windows, True)
        lowest = torch.iinfo(input.dtype).min
        maxima = values[pooled.clamp_min(0).long()].masked_fill(pooled < 0, lowest)
        output = torch.empty_like(pooled, dtype=input.dtype).copy_(maxima)
        return (output, indices) if return_indices else output
    if windows.adaptive:
        pool = getattr(F, f"adaptive_max_pool{rank}d")
        return pool(input, windows.output_size, return_indices=return_indices)
    pool = getattr(F, f"max_pool{rank}d")
    _, kernel, stride, padding, dilation = windows.full
    sizes = tuple(input.shape[-rank:])
    ceil_mode = windows.ceil_mode(sizes)
    if ceil_mode is not None and not windows.has_empty(sizes):
        return pool(input, kernel, stride, padding[::2], dilation, ceil_mode, return_indices)
    pads = windows.explicit_padding(sizes)
    lowest = -math.inf if input.is_floating_point() else torch.iinfo(input.dtype).min
    padded = F.pad(input, pads, value=lowest)
    result = pool(padded, kernel, stride, 0, dilation, False, return_indices)
    if not return_indices:
        return result
    return result[0], _unpad_indices(result[1], padded.shape, input.shape, windows)


def _unpad_indices(indices: Tensor, padded: Any, shape: Any, windows: Windows) -> Tensor:
    """Turn indices in the padded plane to indices in the plane; -1 where no element was in the window.

    A window of only -inf wins at its first element. Where that is padding, the first element in
    the window is the next one along the axis: the remainder of its (negative) position by the dilation.
    """
    _, _, _, padding, dilation = windows.full
    rank = len(windows.output_size)
    empty = torch.zeros_like(indices, dtype=torch.bool)
    flat = torch.zeros_like(indices)
    rest, scale = indices, 1
    for axis in reversed(range(rank)):
        size = shape[axis - rank]
        position = rest % padded[axis - rank] - padding[2 * axis]
        rest = rest // padded[axis - rank]
        position = torch.where(position < 0, position % dilation[axis], position)
        empty |= position >= size
        flat += position * scale
        scale *= size
    return flat.masked_fill(empty, -1)


@public
@pools("max_pool", rank=2)
def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling over 2-d planes; a drop-in for :func:`torch.nn.functional.max_pool2d`.

    In inference no index is computed. In training each output remembers its maximum's offset in the window.
    """
    windows = fixed_windows(2, input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    return max_pool(input, windows, return_indices)


@public
@pools("max_pool", rank=1)
def max_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling over sequences; a drop-in for :func:`torch.nn.functional.max_pool1d`.

    In inference no index is computed. In training each output remembers its maximum's offset in the window.
    """
    windows = fixed_windows(1, input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    return max_pool(input, windows, return_indices)


@public
@pools("max_pool", rank=3)
def max_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling over 3-d volumes; a drop-in for :func:`torch.nn.functional.max_pool3d`.

    In inference no index is computed. In training each output remembers its maximum's offset in the window.
    """
    windows = fixed_windows(3, input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    return max_pool(input, windows, return_indices)


@public
@pools("adaptive_max_pool", rank=2)
def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Max pooling to a given output size; a drop-in for :func:`torch.nn.functional.adaptive_max_pool2d`."""
    return max_pool(input, adaptive_windows(2, input.shape, output_size), return_indices)


@public
@pools("adaptive_max_pool", rank=1)
def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Max pooling to a given output size; a drop-in for :func:`torch.nn.functional.adaptive_max_pool1d`."""
    return max_pool(input, adaptive_windows(1, input.shape, output_size), return_indices)


@public
@pools("adaptive_max_pool", rank=3)
def adaptive_max_pool3d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Max pooling to a given output size; a drop-in for :func:`torch.nn.functional.adaptive_max_pool3d`."""
    return max_pool(input, adaptive_windows(3, input.shape, output_size), return_indices)
