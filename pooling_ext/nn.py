"""Modules: pooling, fused batch norm and convolutions; drop-ins for those of :mod:`torch.nn`.

A module that torch.nn has is a subclass of it, with the same constructor, attributes and ``extra_repr``.
Where torch.nn takes ``padding``, these also take ``"same"``, ``"valid"`` and per-side padding.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from . import functional as F
from ._docstrings import complete, pools
from ._module_docs import SECTIONS
from .errors import ArgumentError
from .ops.activations import activation_of
from .ops.batch_norm_arguments import batch_norm_arguments
from .ops.conv_bn_act.call import Call, has_plain_weights
from .ops.conv_bn_act.implementations import run
from .scripting import activated, compiled_from, renamed

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "BatchNormAct2d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBNAct2d",
    "GlobalAvgPool2d",
    "GlobalLPPool2d",
    "GlobalMaxPool2d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
]


class _Windowed:
    """What modules with windows of fixed size have in common."""

    def _beyond(self: Any) -> str | None:
        """The attribute, if there is one, by which the windows are none of PyTorch's."""
        return "padding" if isinstance(self.padding, str) else None

    def __prepare_scriptable__(self) -> Any:
        name = self._beyond()
        if name is not None:
            value = getattr(self, name)
            raise ArgumentError(f"{name}={value!r} is not PyTorch's, so torch.jit.script cannot compile it")
        return self


@pools("max_pool", rank=1)
class MaxPool1d(_Windowed, nn.MaxPool1d):
    """Max pooling over sequences; a drop-in for :class:`torch.nn.MaxPool1d`."""

    def forward(self, input: Tensor):
        window = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return F.max_pool1d(input, *window, return_indices=self.return_indices)


@pools("max_pool", rank=2)
class MaxPool2d(_Windowed, nn.MaxPool2d):
    """Max pooling over 2-d planes; a drop-in for :class:`torch.nn.MaxPool2d`."""

    def forward(self, input: Tensor):
        window = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return F.max_pool2d(input, *window, return_indices=self.return_indices)


@pools("max_pool", rank=3)
class MaxPool3d(_Windowed, nn.MaxPool3d):
    """Max pooling over 3-d volumes; a drop-in for :class:`torch.nn.MaxPool3d`."""

    def forward(self, input: Tensor):
        window = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        return F.max_pool3d(input, *window, return_indices=self.return_indices)


@pools("avg_pool", rank=1)
class AvgPool1d(_Windowed, nn.AvgPool1d):
    """Average pooling over sequences; a drop-in for :class:`torch.nn.AvgPool1d`."""

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
    ) -> None:
        # torch.nn.AvgPool1d would take a string apart, letter by letter.
        super().__init__(
            kernel_size, stride, 0 if isinstance(padding, str) else padding, ceil_mode, count_include_pad
        )
        if isinstance(padding, str):
            self.padding = padding  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        return F.avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad
        )


@pools("avg_pool", rank=2)
class AvgPool2d(_Windowed, nn.AvgPool2d):
    """Average pooling over 2-d planes; a drop-in for :class:`torch.nn.AvgPool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        window = (self.kernel_size, self.stride, self.padding)
        return F.avg_pool2d(input, *window, self.ceil_mode, self.count_include_pad, self.divisor_override)


@pools("avg_pool", rank=3)
class AvgPool3d(_Windowed, nn.AvgPool3d):
    """Average pooling over 3-d volumes; a drop-in for :class:`torch.nn.AvgPool3d`."""

    def forward(self, input: Tensor) -> Tensor:
        window = (self.kernel_size, self.stride, self.padding)
        return F.avg_pool3d(input, *window, self.ceil_mode, self.count_include_pad, self.divisor_override)


class _LPPool(_Windowed):
    """The constructor of the Lp pooling modules, of any rank."""

    # Class attributes too, so that a torch.nn module can become one of these in place.
    padding = 0
    safe = False

    def __init__(
        self,
        norm_type: float,
        kernel_size: Any,
        stride: Any = None,
        ceil_mode: bool = False,
        *,
        padding: Any = 0,
        safe: bool = False,
    ) -> None:
        super().__init__(norm_type, kernel_size, stride, ceil_mode)  # type: ignore[call-arg]
        self.padding = padding
        self.safe = safe

    def _beyond(self) -> str | None:
        return "padding" if self.padding != 0 else "safe" if self.safe else None


@pools("lp_pool", rank=1)
class LPPool1d(_LPPool, nn.LPPool1d):
    """Power-average pooling over sequences; a drop-in for :class:`torch.nn.LPPool1d`."""

    @compiled_from(nn.LPPool1d.forward)
    def forward(self, input: Tensor) -> Tensor:
        window = (self.norm_type, self.kernel_size, self.stride, self.ceil_mode)
        return F.lp_pool1d(input, *window, padding=self.padding, safe=self.safe)


@pools("lp_pool", rank=2)
class LPPool2d(_LPPool, nn.LPPool2d):
    """Power-average pooling over 2-d planes; a drop-in for :class:`torch.nn.LPPool2d`."""

    @compiled_from(nn.LPPool2d.forward)
    def forward(self, input: Tensor) -> Tensor:
        window = (self.norm_type, self.kernel_size, self.stride, self.ceil_mode)
        return F.lp_pool2d(input, *window, padding=self.padding, safe=self.safe)


@pools("lp_pool", rank=3)
class LPPool3d(_LPPool, nn.LPPool3d):
    """Power-average pooling over 3-d volumes; a drop-in for :class:`torch.nn.LPPool3d`."""

    @compiled_from(nn.LPPool3d.forward)
    def forward(self, input: Tensor) -> Tensor:
        window = (self.norm_type, self.kernel_size, self.stride, self.ceil_mode)
        return F.lp_pool3d(input, *window, padding=self.padding, safe=self.safe)


@pools("adaptive_avg_pool", rank=1)
class AdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    """Average pooling to a given output size; a drop-in for :class:`torch.nn.AdaptiveAvgPool1d`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(input, self.output_size)


@pools("adaptive_avg_pool", rank=2)
class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """Average pooling to a given output size; a drop-in for :class:`torch.nn.AdaptiveAvgPool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(input, self.output_size)


@pools("adaptive_avg_pool", rank=3)
class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    """Average pooling to a given output size; a drop-in for :class:`torch.nn.AdaptiveAvgPool3d`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.adaptive_avg_pool3d(input, self.output_size)


@pools("adaptive_max_pool", rank=1)
class AdaptiveMaxPool1d(nn.AdaptiveMaxPool1d):
    """Max pooling to a given output size; a drop-in for :class:`torch.nn.AdaptiveMaxPool1d`."""

    def forward(self, input: Tensor):
        return F.adaptive_max_pool1d(input, self.output_size, self.return_indices)


@pools("adaptive_max_pool", rank=2)
class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    """Max pooling to a given output size; a drop-in for :class:`torch.nn.AdaptiveMaxPool2d`."""

    def forward(self, input: Tensor):
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)


@pools("adaptive_max_pool", rank=3)
class AdaptiveMaxPool3d(nn.AdaptiveMaxPool3d):
    """Max pooling to a given output size; a drop-in for :class:`torch.nn.AdaptiveMaxPool3d`."""

    def forward(self, input: Tensor):
        return F.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class _GlobalPool(nn.Module):
    def __init__(self, keepdim: bool = True) -> None:
        super().__init__()
        self.keepdim = keepdim

    def extra_repr(self) -> str:
        return f"keepdim={self.keepdim}"


class GlobalAvgPool2d(_GlobalPool):
    """The mean of each plane; see :func:`pooling_ext.functional.global_avg_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.global_avg_pool2d(input, self.keepdim)


class GlobalMaxPool2d(_GlobalPool):
    """The maximum of each plane; see :func:`pooling_ext.functional.global_max_pool2d`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.global_max_pool2d(input, self.keepdim)


class GlobalLPPool2d(_GlobalPool):
    """The ``norm_type`` norm of each plane; see :func:`pooling_ext.functional.global_lp_pool2d`."""

    def __init__(self, norm_type: float, keepdim: bool = True, *, safe: bool = False) -> None:
        super().__init__(keepdim)
        self.norm_type = norm_type
        self.safe = safe

    def forward(self, input: Tensor) -> Tensor:
        return F.global_lp_pool2d(input, self.norm_type, self.keepdim, safe=self.safe)

    def extra_repr(self) -> str:
        return f"norm_type={self.norm_type}, {super().extra_repr()}"


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


#: The torch.nn pooling module that each of ours replaces.
REPLACES: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, ours.__name__): ours
    for ours in (
        MaxPool1d,
        MaxPool2d,
        MaxPool3d,
        AvgPool1d,
        AvgPool2d,
        AvgPool3d,
        LPPool1d,
        LPPool2d,
        LPPool3d,
        AdaptiveAvgPool1d,
        AdaptiveAvgPool2d,
        AdaptiveAvgPool3d,
        AdaptiveMaxPool1d,
        AdaptiveMaxPool2d,
        AdaptiveMaxPool3d,
    )
}

for _name, _sections in SECTIONS.items():
    complete(globals()[_name], _sections)
