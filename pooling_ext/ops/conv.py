"""Convolution with what stands beside it in a network fused into its prologue and epilogue.

Four low-level operators, out of which :func:`conv_bn_act` can be made: for inference with the bias, an
addition and ReLU as the output is written; for training with the statistics of the output, for the batch
norm that follows; the gradient of the input, with ReLU's mask and the sums of the batch norm before; and
the gradient of the weights, with that batch norm and ReLU applied to the input as it is read. They take
2-d convolutions of one group and give results in channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..errors import ArgumentError
from . import _library

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))
GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation"


class ConvGeometry(NamedTuple):
    """A convolution's sizes: ``channels`` in, ``features`` out, the others as (height, width)."""

    batch: int
    channels: int
    features: int
    size: tuple[int, int]
    output_size: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, *self.size

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.features, *self.output_size

    @property
    def pointwise(self) -> bool:
        """Whether each output is made of one pixel of the input, which there always is."""
        return self.kernel_size == (1, 1) and self.padding == (0, 0)

    @property
    def window(self) -> dict[str, int]:
        """The size and place of the windows, by the names that kernels give them."""
        fields = {"KERNEL": self.kernel_size, "PADDING": self.padding, "DILATION": self.dilation}
        return {f"{name}_{axis}": pair[i] for name, pair in fields.items() for i, axis in enumerate("HW")}


def geometry(
    input_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    name: str = "input",
) -> ConvGeometry:
    """Check a convolution's arguments.

    Args:
        input_size: ``(N, C, H, W)``.
        weight_size: ``(O, C, KH, KW)``.
        stride: for height and width, as ``padding`` and ``dilation``.
        name: what the argument is called from which ``input_size`` comes.

    Raises:
        ArgumentError: they do not go together.
    """
    if len(input_size) != 4:
        raise ArgumentError(f"{name} must be (N, C, H, W), but got {tuple(input_size)}")
    if len(weight_size) != 4 or 0 in weight_size:
        raise ArgumentError(f"weight must be (out, in, height, width), but got {tuple(weight_size)}")
    for what, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(value) != 2 or min(value) < least:
            raise ArgumentError(f"{what} must be two integers of at least {least}, but got {list(value)}")
    batch, channels, *size = input_size
    features, given, *kernel_size = weight_size
    if given != channels:
        raise ArgumentError(
            f"weight must have shape (out, {channels}, height, width) for {name} of {channels} channels, "
            f"but got {tuple(weight_size)}; groups other than 1 are not supported"
        )
    output_size = [
        (extent + 2 * pad - reach * (kernel - 1) - 1) // step + 1
        for extent, kernel, step, pad, reach in zip(size, kernel_size, stride, padding, dilation, strict=True)
    ]
    if min(output_size) < 1:
        raise ArgumentError(
            f"weight's windows must fit into {name} with its padding, but kernel size {tuple(kernel_size)} "
            f"with dilation {list(dilation)} and padding {list(padding)} is more than {tuple(size)}"
        )
    pairs = ((a, b) for a, b in (size, output_size, kernel_size, stride, padding, dilation))
    return ConvGeometry(batch, channels, features, *pairs)


def check_like(name: str, value: Tensor, shape: Sequence[int], other: str, like: Tensor) -> None:
    """Raise ArgumentError unless ``value`` has ``shape`` and ``other``'s dtype and device, ``like``'s."""
    if tuple(value.shape) != tuple(shape):
        raise ArgumentError(f"{name} must have shape {tuple(shape)}, but got {tuple(value.shape)}")
    if value.dtype != like.dtype or value.device != like.device:
        raise ArgumentError(
            f"{name} must have {other}'s dtype and device, {like.dtype} on {like.device}, but got "
            f"{value.dtype} on {value.device}"
        )


def check_dtypes(name: str, value: Tensor, weight: Tensor) -> None:
    """Raise ArgumentError unless there are kernels for ``value``'s dtype, and ``weight`` has it too."""
    if value.dtype not in DTYPES:
        raise ArgumentError(f"{name} must be float32, bfloat16 or float16, but got {value.dtype}")
    check_like("weight", weight, weight.shape, name, value)


def check_vector(name: str, value: Tensor | None, channels: int) -> None:
    """Raise ArgumentError unless ``value`` is None or has one number for each of ``channels``."""
    if value is not None and tuple(value.shape) != (channels,):
        raise ArgumentError(f"{name} must have shape ({channels},), but got {tuple(value.shape)}")


def check_stats(name: str, stats: Tensor, channels: int) -> None:
    if tuple(stats.shape) != (2, channels) or stats.dtype != torch.float64:
        raise ArgumentError(
            f"{name} must be float64 of shape (2, {channels}), means and variances, but got "
            f"{stats.dtype} of {tuple(stats.shape)}"
        )


def check_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> ConvGeometry:
    """Check what every forward convolution takes, and return its geometry; raise ArgumentError as they do."""
    found = geometry(input.shape, weight.shape, stride, padding, dilation)
    check_dtypes("input", input, weight)
    check_vector("bias", bias, found.features)
    return found


def check_norm(stats: Tensor, bn_weight: Tensor | None, bn_bias: Tensor | None, channels: int) -> None:
    """Raise ArgumentError unless these describe a batch norm of so many channels."""
    check_stats("stats", stats, channels)
    check_vector("bn_weight", bn_weight, channels)
    check_vector("bn_bias", bn_bias, channels)


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An uninitialized tensor in channels_last."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _output(input: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> Tensor:
    return empty(input, geometry(input.shape, weight.shape, stride, padding, dilation).output_shape)


def bias_act_fake(
    input: Tensor, weight: Tensor, bias: Any, residual: Any, stride: Any, padding: Any, dilation: Any, *_: Any
) -> Tensor:
    return _output(input, weight, stride, padding, dilation)


def stats_fake(
    input: Tensor, weight: Tensor, bias: Any, stats: Any, bn_weight: Any, bn_bias: Any, *rest: Any
) -> tuple[Tensor, Tensor]:
    _, _, stride, padding, dilation, *_ = rest
    output = _output(input, weight, stride, padding, dilation)
    return output, input.new_empty((2, weight.shape[0]), dtype=torch.float64)


#: ``relu(conv(input, weight) + bias + residual)``, rounded once; without what is not given.
conv_bias_act = _library.define(
    f"conv_bias_act(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {GEOMETRY}, bool relu)",
    "Tensor",
    bias_act_fake,
    vmap=False,
)

#: ``conv(input, weight) + bias`` and its statistics, as batch_norm_stats has them. Where ``stats`` are
#: given the convolution is that of batch_norm_act_elemt(input, stats, bn_weight, bn_bias, None, eps, relu),
#: padded with zeros.
conv_stats = _library.define(
    "conv_stats(Tensor input, Tensor weight, Tensor? bias, Tensor? stats, Tensor? bn_weight, "
    f"Tensor? bn_bias, float eps, bool relu, {GEOMETRY})",
    "(Tensor, Tensor)",
    stats_fake,
    vmap=False,
)

#: The gradient of a convolution's input, of ``input_size``. Where ``input`` and ``stats`` are given the
#: convolution's input was batch_norm_act_elemt(input, stats, bn_weight, bn_bias, None, eps, relu): the
#: gradient is that of what ReLU was given, and its sums are those of batch_norm_act_backward_reduce. Else
#: there are no sums.
conv_input_grad = _library.define(
    "conv_input_grad(Tensor grad, Tensor weight, SymInt[] input_size, Tensor? input, Tensor? stats, "
    f"Tensor? bn_weight, Tensor? bn_bias, float eps, bool relu, {GEOMETRY})",
    "(Tensor, Tensor)",
    lambda grad, weight, input_size, input, stats, *_: (
        empty(grad, input_size),
        grad.new_empty(0 if stats is None else (2, input_size[1]), dtype=torch.float64),
    ),
    vmap=False,
)

#: The gradient of a convolution's weights, of ``weight_size``. Where ``stats`` are given the convolution's
#: input was batch_norm_act_elemt(input, stats, bn_weight, bn_bias, None, eps, relu).
conv_weight_grad = _library.define(
    "conv_weight_grad(Tensor grad, Tensor input, SymInt[] weight_size, Tensor? stats, Tensor? bn_weight, "
    f"Tensor? bn_bias, float eps, bool relu, {GEOMETRY})",
    "Tensor",
    lambda grad, input, weight_size, *_: empty(grad, weight_size),
    vmap=False,
)

# CUDA's kernels of these are operators of their own, in cuda_conv.py.
for _name in ("conv_bias_act", "conv_stats"):
    backends.register(
        _name,
        cuda=DTYPES,
        triton=DTYPES,
        cuda_kernels=(f"{_name}_cuda",),
        triton_module="pooling_ext.triton.conv.conv",
    )
for _name in ("conv_input_grad", "conv_weight_grad"):
    backends.register(_name, triton=DTYPES, triton_module=f"pooling_ext.triton.conv.{_name}")
