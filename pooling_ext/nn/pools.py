"""Pools; drop-ins for those of :mod:`torch.nn`, with ``"same"``, ``"valid"`` and per-side padding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import functional as F
from .._docstrings import pools
from ..errors import ArgumentError
from ..scripting import compiled_from


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
