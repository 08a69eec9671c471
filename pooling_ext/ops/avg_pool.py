"""Average pooling, with windows of fixed size and adaptive ones.

The operator is linear: its backward is its transpose, whose backward is the operator again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from .. import backends
from .._docstrings import pools
from ..arguments import as_bool, as_int
from ..autograd import Differentiable, needs_autograd, refuse_empty
from ..errors import ArgumentError
from ..exporting import leaves_us, tracing_state
from ..windows import Windows, adaptive_windows, fixed_windows, positive_part
from . import _library
from ._torch_function import public

FLOATS = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
backends.register(
    "avg_pool",
    cpu=FLOATS,
    cuda=FLOATS,
    triton=FLOATS,
    kernels=("avg_pool", "avg_pool_backward"),
    triton_module="pooling_ext.triton.pool.avg_pool",
)

_avg_pool_forward = _library.define(
    "avg_pool(Tensor input, {windows}, bool count_include_pad, int? divisor_override)",
    "Tensor",
    lambda input, output_size, *_: _library.empty(input, output_size),
)

_avg_pool_backward = _library.define(
    "avg_pool_backward(Tensor grad, SymInt[] input_size, bool channels_last, {windows}, "
    "bool count_include_pad, int? divisor_override)",
    "Tensor",
    lambda grad, input_size, channels_last, *_: grad.new_empty(input_size).contiguous(
        memory_format=_library.memory_format(len(input_size) - 2, channels_last)
    ),
)


class _AvgPool(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, windows: Windows, count_include_pad: bool, divisor: int | None) -> Tensor:
        return _avg_pool_forward(input, *windows, count_include_pad, divisor)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        input, *ctx.options = inputs
        ctx.input_size = input.shape
        ctx.channels_last = _library.keeps_channels_last(input, len(ctx.options[0].output_size))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        windows = ctx.options[0]
        # PyTorch's mean of everything, which is another operator, does not mind.
        if windows.adaptive and grads[0].numel() == 0 and any(n != 1 for n in windows.output_size):
            refuse_empty(grads[0])
        return spread(grads[0], ctx.input_size, ctx.channels_last, *ctx.options), None, None, None


class _Spread(Function):
    """The transpose of :class:`_AvgPool`: shares each value out over its window."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        input_size: tuple[int, ...],
        channels_last: bool,
        windows: Windows,
        count_include_pad: bool,
        divisor: int | None,
    ) -> Tensor:
        return _avg_pool_backward(
            grad, tuple(input_size), channels_last, *windows, count_include_pad, divisor
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.input_size, ctx.channels_last, *ctx.options = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _average(grads[0], *ctx.options), None, None, None, None, None


def _average_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    return _average(tangent, *ctx.options)


def _spread_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    return spread(tangent, ctx.input_size, ctx.channels_last, *ctx.options)


_average = Differentiable(_AvgPool, _average_jvp)
spread = Differentiable(_Spread, _spread_jvp)


def avg_pool(
    input: Tensor, windows: Windows, count_include_pad: bool = True, divisor_override: int | None = None
) -> Tensor:
    """Average ``input`` over ``windows``."""
    if divisor_override is not None:
        divisor_override = _checked_divisor(divisor_override)
    if count_include_pad is not True:
        as_bool(count_include_pad, "count_include_pad")
    if len(windows.output_size) == 1 and _library.is_channels_last_1d(input):
        return avg_pool(input.unsqueeze(-2), windows.flat, count_include_pad, divisor_override).squeeze(-2)
    if backends.choose_pool("avg_pool", input, windows) is backends.ATEN:
        return _aten_avg_pool(input, windows, count_include_pad, divisor_override)
    if needs_autograd(input):
        return _average(input, windows, count_include_pad, divisor_override)
    return _avg_pool_forward(input, *windows, count_include_pad, divisor_override)


def _checked_divisor(divisor: Any) -> int:
    number = None if isinstance(divisor, Tensor) and divisor.dim() > 0 else as_int(divisor)
    if number is None:
        raise TypeError(f"divisor_override must be an int or None, but got {divisor!r}")
    if number == 0:
        raise ArgumentError("divisor_override must be not zero, but got 0")
    if not -(2**63) <= number < 2**63:
        raise ArgumentError(f"divisor_override must fit 64 bits, but got {number}")
    return number


def _aten_avg_pool(input: Tensor, windows: Windows, count_include_pad: bool, divisor: int | None) -> Tensor:
    rank = len(windows.output_size)
    if windows.adaptive:
        return getattr(F, f"adaptive_avg_pool{rank}d")(input, windows.output_size)
    _, kernel, stride, padding, _ = windows.full
    sizes = tuple(input.shape[-rank:])
    ceil_mode = windows.ceil_mode(sizes)
    extra = () if divisor is None else (divisor,)
    # torch.onnx.export forgets the divisor.
    sums_by_divisor = not leaves_us()
    if ceil_mode is not None and (divisor is None or sums_by_divisor):
        pool = getattr(F, f"avg_pool{rank}d")
        return pool(input, kernel, stride, padding[::2], ceil_mode, count_include_pad, *extra)
    # PyTorch pads both sides alike, so pad by hand, sum, and divide by our own counts.
    sums = _sums(F.pad(input, windows.explicit_padding(sizes)), kernel, stride)
    if divisor is not None:
        counts = torch.tensor(divisor)
    elif is_compiling() or tracing_state() is not None:  # for any size
        counts = _counted(windows, sizes, count_include_pad)
    else:
        counts = torch.ones((), dtype=torch.int64)
        for axis_counts in windows.counts(sizes, count_include_pad):
            counts = counts.unsqueeze(-1) * torch.tensor(axis_counts)
    if input.is_floating_point() or input.is_complex():
        return sums / counts.to(sums)
    return torch.div(sums, counts.to(sums), rounding_mode="trunc")


def _sums(padded: Tensor, kernel: Any, stride: Any) -> Tensor:
    """Sums over windows without padding."""
    rank = len(kernel)
    if leaves_us():  # torch.onnx.export forgets a divisor
        return getattr(F, f"avg_pool{rank}d")(padded, kernel, stride) * math.prod(kernel)
    if rank == 1:  # which has no divisor, so it borrows that of two dimensions
        return F.avg_pool2d(padded.unsqueeze(-2), (1, *kernel), (1, *stride), divisor_override=1).squeeze(-2)
    return getattr(F, f"avg_pool{rank}d")(padded, kernel, stride, divisor_override=1)


def _counted(windows: Windows, sizes: Any, count_include_pad: bool) -> Tensor:
    """How many elements each window averages over, by pooling ones."""
    _, kernel, stride, padding, _ = windows.full
    sides = [side for axis in reversed(range(len(sizes))) for side in padding[2 * axis : 2 * axis + 2]]
    ones = F.pad(torch.ones((1, *sizes)), sides, value=float(count_include_pad))
    ends = zip(windows.explicit_padding(sizes), sides, strict=True)
    overhang = [positive_part(needed - own) for needed, own in ends]
    return _sums(F.pad(ones, overhang), kernel, stride).round()


@public
@pools("avg_pool", rank=2)
def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling over 2-d planes; a drop-in for :func:`torch.nn.functional.avg_pool2d`.

    Sums are accumulated in float32 (float64 for float64) whatever the input's dtype.
    """
    windows = fixed_windows(2, input.shape, kernel_size, stride, padding, 1, ceil_mode)
    return avg_pool(input, windows, count_include_pad, divisor_override)


@public
@pools("avg_pool", rank=1)
def avg_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """Average pooling over sequences; a drop-in for :func:`torch.nn.functional.avg_pool1d`.

    Sums are accumulated in float32 (float64 for float64) whatever the input's dtype.
    """
    windows = fixed_windows(1, input.shape, kernel_size, stride, padding, 1, ceil_mode)
    return avg_pool(input, windows, count_include_pad)


@public
@pools("avg_pool", rank=3)
def avg_pool3d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average pooling over 3-d volumes; a drop-in for :func:`torch.nn.functional.avg_pool3d`.

    Sums are accumulated in float32 (float64 for float64) whatever the input's dtype.
    """
    windows = fixed_windows(3, input.shape, kernel_size, stride, padding, 1, ceil_mode)
    return avg_pool(input, windows, count_include_pad, divisor_override)


def _adaptive_avg_pool(rank: int, input: Tensor, output_size: Any, zero_channels: bool) -> Tensor:
    try:
        windows = adaptive_windows(rank, input.shape, output_size, zero_channels)
    except ArgumentError:
        # PyTorch's mean of everything also takes nothing.
        if input.numel() > 0 or input.dim() not in (rank + 1, rank + 2):
            raise
        windows = adaptive_windows(rank, (1,) * input.dim(), output_size)
        if any(n != 1 for n in windows.output_size):
            raise
        return getattr(F, f"adaptive_avg_pool{rank}d")(input, windows.output_size)
    return avg_pool(input, windows)


@public
@pools("adaptive_avg_pool", rank=2)
def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Average pooling to a given output size; drop-in for :func:`torch.nn.functional.adaptive_avg_pool2d`.

    Sums are accumulated in float32 (float64 for float64) whatever the input's dtype.
    """
    return _adaptive_avg_pool(2, input, output_size, True)


@public
@pools("adaptive_avg_pool", rank=1)
def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """Average pooling to a given output size; drop-in for :func:`torch.nn.functional.adaptive_avg_pool1d`.

    Sums are accumulated in float32 (float64 for float64) whatever the input's dtype.
    """
    return _adaptive_avg_pool(1, input, output_size, True)


@public
@pools("adaptive_avg_pool", rank=3)
def adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Tensor:
    """Average pooling to a given output size; drop-in for :func:`torch.nn.functional.adaptive_avg_pool3d`.

    Sums are accumulated in float32 (float64 for float64) whatever the input's dtype.
    """
    return _adaptive_avg_pool(3, input, output_size, False)
