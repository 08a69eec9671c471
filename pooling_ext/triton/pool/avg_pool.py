"""Average pooling in Triton; the operators are defined in pooling_ext/ops/avg_pool.py."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...ops import _library
from .backward import spread_windows
from .forward import pool_windows
from .geometry import channels_last as suggests_channels_last
from .geometry import dense, geometry
from .global_reduce import pool_planes, spread_planes
from .reductions import MEAN

Ints = Sequence[int]


def avg_pool(
    input: Tensor,
    output_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """The averages of all windows."""
    return pool_means(
        input,
        (output_size, kernel_size, stride, padding, dilation),
        include_pad=count_include_pad,
        divisor=divisor_override or 0,
    )


def pool_means(
    input: Tensor,
    windows: tuple[Ints, ...],
    *,
    norm: int = 0,
    magnitude: bool = False,
    include_pad: bool = True,
    divisor: int = 0,
) -> Tensor:
    """Averages, or with ``norm`` power averages of values or magnitudes."""
    output = _library.empty(input, windows[0])
    if output.numel() == 0:
        return output
    channels_last = suggests_channels_last(input, len(windows[0]))
    g = geometry(input.shape, channels_last, *windows)
    x = dense(input, channels_last)
    if g.whole:
        pool_planes(x, output, None, g, MEAN, norm=norm, magnitude=magnitude, divisor=divisor)
    else:
        pool_windows(
            x, output, None, g, MEAN, norm=norm, magnitude=magnitude, include_pad=include_pad, divisor=divisor
        )
    return output


def avg_pool_backward(
    grad: Tensor,
    input_size: Ints,
    channels_last: bool,
    output_size: Ints,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """The input's gradient: every output's is shared out over its window."""
    result = grad.new_empty(input_size).contiguous(
        memory_format=_library.memory_format(len(input_size) - 2, channels_last)
    )
    if result.numel() == 0:
        return result
    if grad.numel() == 0:
        return result.zero_()
    g = geometry(input_size, channels_last, output_size, kernel_size, stride, padding, dilation)
    grad, divisor = dense(grad, channels_last), divisor_override or 0
    if g.whole:
        spread_planes(grad, None, result, g, divisor)
    else:
        spread_windows(grad, None, result, g, include_pad=count_include_pad, divisor=divisor)
    return result
