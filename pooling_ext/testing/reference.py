"""Operators as their definitions read, in float64; pooling one window after the other.

Slow on purpose. Floating-point inputs are computed in float64 and integers in int64, so the results
are what a kernel's are rounded from. Inputs are ``(*, *spatial)``: leading dimensions are carried along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from ..ops.activations import Activation
from ..windows import Ints, Windows


def axis_positions(windows: Windows, axis: int, size: int, out: int) -> list[int]:
    """The positions along ``axis`` that window ``out`` covers, those outside the input left out."""
    if windows.adaptive:
        count = windows.output_size[axis]
        return list(range(out * size // count, -(-(out + 1) * size // count)))
    _, kernel_size, stride, padding, dilation = windows.full
    start = out * stride[axis] - padding[2 * axis]
    positions = [start + dilation[axis] * k for k in range(kernel_size[axis])]
    return [position for position in positions if 0 <= position < size]


def each_window(windows: Windows, sizes: Ints) -> Iterator[tuple[Ints, list[Ints]]]:
    """Yield every window: its position in the output and, in row-major order, the elements in it."""
    for out in product(*(range(count) for count in windows.output_size)):
        axes = [axis_positions(windows, axis, size, out[axis]) for axis, size in enumerate(sizes)]
        yield out, list(product(*axes))


def max_pool(input: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Maxima and their int64 indices in the flattened plane.

    Ties go to the first element of the window, NaN to the last NaN in it. A window with no element
    gives the lowest value of the dtype and index -1.
    """
    x, sizes, leading = _wide(input, windows)
    lowest = -math.inf if input.is_floating_point() else torch.iinfo(input.dtype).min
    output = x.new_full((*leading, *windows.output_size), lowest)
    indices = torch.full(output.shape, -1, dtype=torch.int64)
    for out, elements in each_window(windows, sizes):
        best, index = output[(..., *out)], indices[(..., *out)]
        for element in elements:
            value = x[(..., *element)]
            wins = (value > best) | (value != value) | (index < 0)
            best = torch.where(wins, value, best)
            index = torch.where(wins, _flat(element, sizes), index)
        output[(..., *out)], indices[(..., *out)] = best, index
    return output, indices


def max_pool_backward(grad: Tensor, indices: Tensor, sizes: Ints) -> Tensor:
    """Add each output's gradient at its index; -1 receives none."""
    leading = grad.shape[: grad.dim() - len(sizes)]
    flat = torch.zeros(*leading, math.prod(sizes) + 1, dtype=torch.float64)
    # Index -1 lands in one extra element, which is cut off again.
    flat_indices = indices.where(indices >= 0, math.prod(sizes)).flatten(len(leading))
    flat.scatter_add_(-1, flat_indices, grad.to(torch.float64).flatten(len(leading)))
    return flat[..., :-1].reshape(*leading, *sizes)


def avg_pool(
    input: Tensor, windows: Windows, count_include_pad: bool = True, divisor_override: int | None = None
) -> Tensor:
    """Sum over each window, over its divisor (see :func:`divisor`)."""
    x, sizes, leading = _wide(input, windows)
    output = x.new_zeros((*leading, *windows.output_size))
    for out, elements in each_window(windows, sizes):
        total = sum((x[(..., *element)] for element in elements), x.new_zeros(leading))
        output[(..., *out)] = total / divisor(windows, sizes, out, count_include_pad, divisor_override)
    return output


def avg_pool_backward(
    grad: Tensor,
    sizes: Ints,
    windows: Windows,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Share each output's gradient out over its window: the transpose of :func:`avg_pool`."""
    g, _, leading = _wide(grad, windows)
    result = g.new_zeros((*leading, *sizes))
    for out, elements in each_window(windows, sizes):
        share = g[(..., *out)] / divisor(windows, sizes, out, count_include_pad, divisor_override)
        for element in elements:
            result[(..., *element)] += share
    return result


def divisor(
    windows: Windows, sizes: Ints, out: Ints, count_include_pad: bool, divisor_override: int | None
) -> int:
    """What the sum over window ``out`` is divided by.

    With ``count_include_pad`` that is the number of elements in the padded input, otherwise in the
    input itself; elements that ``ceil_mode`` adds past the padding count in neither.
    """
    if divisor_override is not None:
        return divisor_override
    if windows.adaptive or not count_include_pad:
        return math.prod(
            len(axis_positions(windows, axis, size, out[axis])) for axis, size in enumerate(sizes)
        )
    _, kernel_size, stride, padding, _ = windows.full
    count = 1
    for axis, size in enumerate(sizes):
        before, after = padding[2 * axis : 2 * axis + 2]
        start = out[axis] * stride[axis] - before
        count *= sum(-before <= start + k < size + after for k in range(kernel_size[axis]))
    return count


def lp_pool(input: Tensor, norm_type: float, windows: Windows, safe: bool = False) -> Tensor:
    """``(mean of x ** p, times the whole window's size) ** (1 / p)``, as torch.nn.functional computes it.

    ``safe`` pools ``|x| ** p``.
    """
    sizes = tuple(input.shape[input.dim() - len(windows.output_size) :])
    magnitude = input.to(torch.float64)
    if safe or math.isinf(norm_type):
        magnitude = magnitude.abs()
    if math.isinf(norm_type):
        sign = math.copysign(1, norm_type)
        return sign * max_pool(sign * magnitude, windows)[0]
    mean = avg_pool(magnitude.pow(norm_type), windows)
    return (mean * math.prod(windows.kernel_size or sizes)).pow(1 / norm_type)


def batch_norm_act(
    input: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    residual: Tensor | None,
    activation: Activation,
) -> Tensor:
    """``activation((input - mean) / sqrt(var + eps) * weight + bias + residual)``.

    In training with the batch's moments.

    All of it is differentiable, so that autograd gives the gradients' reference.
    """

    def each_channel(values: Tensor) -> Tensor:
        return values.to(torch.float64).reshape(1, -1, *(1,) * (input.dim() - 2))

    x = input.to(torch.float64)
    if training:
        dims = [dim for dim in range(x.dim()) if dim != 1]
        mean, var = x.mean(dims), x.var(dims, correction=0)
    assert mean is not None and var is not None
    output = (x - each_channel(mean)) / (each_channel(var) + eps).sqrt()
    if weight is not None:
        output = output * each_channel(weight)
    if bias is not None:
        output = output + each_channel(bias)
    if residual is not None:
        output = output + residual.to(torch.float64)
    if activation.name == "hardsigmoid":  # of which PyTorch's gradient in float64 has float32's sixth
        return (output + 3).clamp(0, 6) / 6
    return activation(output)


def _wide(input: Tensor, windows: Windows) -> tuple[Tensor, Ints, Ints]:
    """The input in float64 or int64, its spatial sizes and its leading sizes."""
    rank = len(windows.output_size)
    x = input.to(torch.float64 if input.is_floating_point() else torch.int64)
    return x, tuple(x.shape[-rank:]), tuple(x.shape[:-rank])


def _flat(element: Ints, sizes: Ints) -> int:
    index = 0
    for position, size in zip(element, sizes, strict=True):
        index = index * size + position
    return index
