"""Residual add, ReLU and global average pooling as one operator: the tail of a ResNet."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from .. import backends
from ..autograd import distinct, loses_grad, needs_grad, transformed
from ..errors import ArgumentError
from . import _library
from ._torch_function import public
from .batch_norm_arguments import alike, check_device
from .batch_norm_operators import FLOATS, like
from .global_pool import global_avg_pool2d

backends.register(
    "add_relu_global_avg_pool",
    cpu=FLOATS,
    cuda=FLOATS,
    triton=FLOATS,
    kernels=("add_relu_global_avg_pool", "add_relu_global_avg_pool_backward"),
    triton_module="pooling_ext.triton.norm.add_relu_global_avg_pool",
)

_forward = _library.define(
    "add_relu_global_avg_pool(Tensor input, Tensor residual)",
    "Tensor",
    lambda input, residual: _library.empty(input, (1, 1)),
    vmap=False,
)

_backward = _library.define(
    "add_relu_global_avg_pool_backward(Tensor grad, Tensor input, Tensor residual)",
    "Tensor",
    lambda grad, input, residual: like(input),
    vmap=False,
)


class _AddReluGlobalAvgPool(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, residual: Tensor) -> Tensor:
        ctx.save_for_backward(input, residual)
        return _forward(input, residual)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, residual = ctx.saved_tensors
        (grad,) = grads
        if torch.is_grad_enabled() and not is_compiling():
            spread = (grad / (input.shape[2] * input.shape[3])).expand_as(input)
            shared = torch.ops.aten.threshold_backward(spread, input + residual, 0)
        else:
            shared = _backward(grad, input, residual)
        return tuple(shared if needed else None for needed in ctx.needs_input_grad)


@public
def add_relu_global_avg_pool(input: Tensor, residual: Tensor, keepdim: bool = True) -> Tensor:
    """The mean of each plane of ``relu(input + residual)``, the tail of a ResNet, without writing the sum.

    Args:
        input: a tensor, see Shape; float32, float64, bfloat16 or float16, contiguous or channels_last.
        residual: a tensor of the input's dtype.
        keepdim: keep the two axes that are pooled, with size 1.

    Shape:
        input: ``(N, C, H, W)``.
        residual: the input's shape.
        output: ``(N, C, 1, 1)``; without ``keepdim`` ``(N, C)``.

    Returns:
        A tensor of the input's dtype.

    Raises:
        TypeError: an argument is not a tensor.
        ArgumentError: the shapes differ, or the input's is out of range.

    Example:
        >>> x = torch.tensor([[[[-3.0, 1.0]]]])
        >>> F.add_relu_global_avg_pool(x, torch.ones_like(x), keepdim=False)
        tensor([[1.]])
    """
    if not isinstance(residual, Tensor):
        raise TypeError(f"residual must be a torch.Tensor, but got {type(residual).__name__}")
    check_device("residual", residual, input)
    if residual.shape != input.shape:
        raise ArgumentError(
            f"residual must have input's shape {tuple(input.shape)}, but got {tuple(residual.shape)}"
        )
    ours = backends.choose("add_relu_global_avg_pool", input) is not backends.ATEN
    ours = ours and not (transformed() or loses_grad(input, residual))
    if not ours or not alike(input, residual) or input.dim() != 4 or input.numel() == 0:
        return global_avg_pool2d(F.relu(input + residual), keepdim)
    if is_compiling():
        input, residual = distinct(input, residual)
    if needs_grad(input, residual):
        output = _AddReluGlobalAvgPool.apply(input, residual)
    else:
        output = _forward(input, residual)
    return output if keepdim else output.flatten(1)
