"""Convolutions, and batch norm with an activation, with and without a convolution before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from .. import functional as F
from .._conv_docstrings import convolutions
from ..ops.activations import activation_of
from ..ops.batch_norm_arguments import batch_norm_arguments
from ..ops.conv_bn_act.call import Call, has_plain_weights
from ..ops.conv_bn_act.implementations import run
from ..scripting import activated, compiled_from, renamed


class _Activated:
    """What modules that end in an activation have in common."""

    activation = "relu"
    negative_slope = 0.01  # also of modules pickled before there was one

    def _set_activation(self, activation: str, negative_slope: float) -> None:
        activation_of(activation, negative_slope)
        self.activation, self.negative_slope = activation, negative_slope

    def _described(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"activation={self.activation!r}{slope}"


@convolutions(1)
class Conv1d(nn.Conv1d):
    """A convolution of sequences; a drop-in for :class:`torch.nn.Conv1d`.

    :func:`pooling_ext.functional.conv1d` says which kernels run it. Transformed weights are kept as
    :class:`Conv2d` does.
    """

    _pooling_ext_stands_for = nn.Conv1d

    @compiled_from(nn.Conv1d.forward)
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor) and has_plain_weights(self) and not is_tracing():
            geometry = self.stride, self.padding, self.dilation, self.groups
            return F.conv1d(input, self.weight, self.bias, *geometry)
        return super().forward(input)


@convolutions(2)
class Conv2d(nn.Conv2d):
    """A convolution of images; a drop-in for :class:`torch.nn.Conv2d`.

    :func:`pooling_ext.functional.conv2d` says which kernels run it. Without gradients the transformed weights
    are kept until the weight changes, by whatever means. They are in no ``state_dict``, copy or pickle.
    """

    _pooling_ext_stands_for = nn.Conv2d

    @compiled_from(nn.Conv2d.forward)
    def forward(self, input: Tensor) -> Tensor:
        # A trace by torch.jit gets PyTorch's operator, and no weight that was transformed for this call.
        if isinstance(input, Tensor) and has_plain_weights(self) and not is_tracing():
            return run(Call(self, None, input))
        return super().forward(input)


@convolutions(3)
class Conv3d(nn.Conv3d):
    """A convolution of volumes or videos; a drop-in for :class:`torch.nn.Conv3d`.

    :func:`pooling_ext.functional.conv3d` says which kernels run it. Transformed weights are kept as
    :class:`Conv2d` does.
    """

    _pooling_ext_stands_for = nn.Conv3d

    @compiled_from(nn.Conv3d.forward)
    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor) and has_plain_weights(self) and not is_tracing():
            geometry = self.stride, self.padding, self.dilation, self.groups
            return F.conv3d(input, self.weight, self.bias, *geometry)
        return super().forward(input)


#: Convolutions of ours, by torch.nn's.
CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
}


def _scripted_batch_norm_act(self: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
    return activated(self._batch_norm(input), residual, self.activation, self.negative_slope)


def _scripted_conv_bn_act(self: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
    return activated(self.bn(self.conv(input)), residual, self.activation, self.negative_slope)


class BatchNormAct2d(_Activated, nn.BatchNorm2d):
    """Batch norm, an optional residual and an activation in one pass; a :class:`torch.nn.BatchNorm2d`.

    ``forward(input, residual=None)`` is ``activation(batch_norm(input) + residual)``; see
    :func:`pooling_ext.functional.batch_norm_act`. Parameters, buffers and ``state_dict`` are BatchNorm2d's.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str = "relu",
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._set_activation(activation, negative_slope)

    _batch_norm = renamed(nn.BatchNorm2d.forward, "_batch_norm")  # for torch.jit.script

    @compiled_from(_scripted_batch_norm_act)
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        act = {"activation": self.activation, "negative_slope": self.negative_slope}
        return F.batch_norm_act(input, **batch_norm_arguments(self), residual=residual, **act)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._described()}"


class ConvBNAct2d(_Activated, nn.Module):
    """A convolution (``conv``), a batch norm (``bn``), an optional residual and an activation.

    ``forward(input, residual=None)`` is ``activation(bn(conv(input)) + residual)``; see
    :func:`pooling_ext.functional.conv_bn_act`. ``conv`` is a :class:`torch.nn.Conv2d`, ``bn`` a
    :class:`torch.nn.BatchNorm2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str = "relu",
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.bn = nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats, device, dtype)
        self._set_activation(activation, negative_slope)

    @compiled_from(_scripted_conv_bn_act)
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        slope = self.negative_slope
        return F.conv_bn_act(self.conv, self.bn, input, residual, self.activation, negative_slope=slope)

    def extra_repr(self) -> str:
        return self._described()
