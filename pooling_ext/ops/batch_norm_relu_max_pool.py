"""Batch normalization, ReLU and max pooling as one operator: the stem of a ResNet.

What is pooled is made a part at a time and never written as a whole; backward makes its gradient in the
same way from the offsets of the maxima. Its sums need only the elements that won. On a GPU these are kept, of
the output's size: reading them by their offsets would move the whole input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from .. import backends
from ..autograd import distinct, loses_grad, needs_grad, transformed
from ..windows import Windows, fixed_windows
from . import _library
from ._torch_function import public
from .activations import RELU
from .batch_norm_act import batch_norm_act
from .batch_norm_arguments import check
from .batch_norm_autograd import bias_grad, weight_grad
from .batch_norm_operators import FLOATS, batch_norm_act_backward_reduce, like
from .batch_norm_statistics import channel_sums, means_of_all, statistics
from .max_pool import max_pool

backends.register(
    "batch_norm_relu_max_pool",
    cpu=FLOATS,
    cuda=FLOATS,
    triton=FLOATS,
    kernels=(
        "batch_norm_relu_max_pool",
        "batch_norm_relu_max_pool_winners",
        "batch_norm_relu_max_pool_backward_elemt",
    ),
    triton_module="pooling_ext.triton.norm.batch_norm_relu_max_pool",
)

#: The largest window whose offsets fit a byte.
BYTE_WINDOW = 255

_NORM = "Tensor input, Tensor stats, Tensor? weight, Tensor? bias"

_forward = _library.define(
    f"batch_norm_relu_max_pool({_NORM}, float eps, {{windows}})",
    "Tensor",
    lambda input, stats, weight, bias, eps, output_size, *_: _library.empty(input, output_size),
    vmap=False,
)

# The CPU's, of which caches hold what the sums read.
_with_offsets = _library.define(
    f"batch_norm_relu_max_pool_with_offsets({_NORM}, float eps, {{windows}})",
    "(Tensor, Tensor)",
    lambda input, stats, weight, bias, eps, output_size, *_: (
        _library.empty(input, output_size),
        _library.empty(input, output_size, torch.uint8),
    ),
    vmap=False,
)

_sums = _library.define(
    f"batch_norm_relu_max_pool_backward_reduce(Tensor grad, Tensor offsets, {_NORM}, float eps, {{windows}})",
    "Tensor",
    lambda grad, offsets, input, *_: channel_sums(input),
    vmap=False,
)

# A GPU's: the output, the offsets of the maxima and the input there.
_winners = _library.define(
    f"batch_norm_relu_max_pool_winners({_NORM}, float eps, {{windows}})",
    "(Tensor, Tensor, Tensor)",
    lambda input, stats, weight, bias, eps, output_size, *_: (
        _library.empty(input, output_size),
        _library.empty(input, output_size, torch.uint8),
        _library.empty(input, output_size),
    ),
    vmap=False,
)

_input_grad = _library.define(
    f"batch_norm_relu_max_pool_backward_elemt(Tensor grad, Tensor offsets, {_NORM}, Tensor? sums, "
    "float count, float eps, {windows})",
    "Tensor",
    lambda grad, offsets, input, *_: like(input),
    vmap=False,
)


class _BatchNormReluMaxPool(Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        stats: Tensor,
        eps: float,
        count: float | None,
        group: Any,
        windows: Windows,
        keeps: bool,
    ) -> Tensor:
        winners = None
        if keeps:
            output, offsets, winners = _winners(input, stats, weight, bias, eps, *windows)
        else:
            output, offsets = _with_offsets(input, stats, weight, bias, eps, *windows)
        ctx.save_for_backward(input, weight, bias, stats, offsets, winners)
        ctx.options = eps, count, group, windows
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, weight, bias, stats, offsets, winners = ctx.saved_tensors
        eps, count, group, windows = ctx.options
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not is_compiling():
            wanted = _differentiable_backward(ctx, grads[0])
            return *wanted, *(None,) * 6
        grad_input = None
        sums: Any = None
        if not is_compiling():
            ctx.maybe_clear_saved_tensors()  # unless backward is to come again
        if count is not None or needs_weight or needs_bias:
            sums = _sums_of(grads[0], offsets, winners, input, (stats, weight, bias, eps), windows)
        del winners  # whose memory the gradient may take
        grad_weight = weight_grad(sums, stats, eps, weight) if needs_weight else None
        grad_bias = bias_grad(sums, bias) if needs_bias else None
        if needs_input:
            stats_grad, count = means_of_all(sums, count, group)
            grad_input = _input_grad(
                grads[0], offsets, input, stats, weight, bias, stats_grad, count, eps, *windows
            )
        return grad_input, grad_weight, grad_bias, *(None,) * 6


def _sums_of(
    grad: Tensor, offsets: Tensor, winners: Tensor | None, input: Tensor, norm: tuple, windows: Windows
) -> Tensor:
    if winners is None:
        return _sums(grad, offsets, input, *norm, *windows)
    stats, weight, bias, eps = norm
    # Those of a batch norm and ReLU of what won.
    return batch_norm_act_backward_reduce(grad, winners, stats, weight, bias, None, eps, *RELU.arguments)[1]


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients out of operators that can be differentiated again."""
    input, weight, bias, stats, *_ = ctx.saved_tensors
    eps, count, group, windows = ctx.options
    if group is not None:
        raise RuntimeError("batch_norm_relu_max_pool(): there is no double backward across processes")
    mean, var = (None, None) if count is not None else stats.to(input.dtype).unbind()
    output = batch_norm_act(input, mean, var, weight, bias, count is not None, 0.0, eps)
    wanted = [x for x, needed in zip((input, weight, bias), ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(max_pool(output, windows), wanted, grad, create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[:3])


def _usual(windows: Windows) -> bool:
    """Whether offsets fit a byte and no window can be empty."""
    _, kernel_size, _, padding, dilation = windows.full
    return (
        not windows.adaptive
        and kernel_size[0] * kernel_size[1] <= BYTE_WINDOW
        and all(step == 1 for step in dilation)
        and all(2 * pad <= kernel_size[side // 2] for side, pad in enumerate(padding))
    )


@public
def batch_norm_relu_max_pool(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    kernel_size: Any = 3,
    stride: Any = 2,
    padding: Any = 1,
    dilation: Any = 1,
    ceil_mode: bool = False,
    *,
    process_group: Any = None,
) -> Tensor:
    """``max_pool2d(relu(batch_norm(input)))``, the stem of a ResNet, without writing the activation.

    Args:
        input: a tensor, see Shape; float32, float64, bfloat16 or float16.
        running_mean: updated in place in training. None where there is none.
        running_var: as ``running_mean``.
        weight: multiplies the normalized input; None for ones.
        bias: added to it; None for zeros.
        training: normalize with the batch's own statistics instead of the running ones.
        momentum: the weight of the batch in the running statistics.
        eps: added to the variance.
        kernel_size: as :func:`max_pool2d` takes it, and so are stride, padding, dilation and ceil_mode.
        process_group: as :func:`batch_norm_act` takes it.

    Shape:
        input: ``(N, C, H, W)``.
        running_mean, running_var, weight, bias: ``(C,)``.
        output: ``(N, C, H_out, W_out)``, as of :func:`max_pool2d`.

    Returns:
        A tensor of the input's dtype and memory format.

    Raises:
        TypeError: an argument has the wrong type.
        ArgumentError: an argument does not go with the input's shape, or is out of range.

    Example:
        >>> x = torch.randn(2, 8, 16, 16)
        >>> F.batch_norm_relu_max_pool(x, None, None, training=True).shape
        torch.Size([2, 8, 8, 8])
    """
    parameters = {"weight": weight, "bias": bias}
    momentum, eps = check(input, None, parameters, running_mean, running_var, training, momentum, eps)
    windows = fixed_windows(2, input.shape, kernel_size, stride, padding, dilation, ceil_mode)
    backend = backends.choose("batch_norm_relu_max_pool", input)
    aten = backend is backends.ATEN
    if aten or transformed() or input.dim() != 4 or not _usual(windows) or loses_grad(input, weight, bias):
        output = batch_norm_act(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            process_group=process_group,
        )
        return max_pool(output, windows)
    stats, count = statistics(input, running_mean, running_var, training, momentum, process_group)
    if is_compiling():
        input, weight, bias = distinct(input, weight, bias)
    if needs_grad(input, weight, bias):
        group = process_group if training else None
        keeps = backend is not backends.CPU
        return _BatchNormReluMaxPool.apply(input, weight, bias, stats, eps, count, group, windows, keeps)
    return _forward(input, stats, weight, bias, eps, *windows)
