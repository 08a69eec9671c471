"""The layers of a frozen model: folded, cast and prepacked weights with the activation in the epilogue.

They are for inference only, hold no parameters, and keep their weights in the layout that the
backend's kernels read. oneDNN's layout is opaque and cannot be pickled, so a layer travels with plain
weights and packs them again on arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import backends
from ..graph.activations import RELU, Activation
from ..ops import tuned_conv
from ..ops.batch_norm_act import _forward as _batch_norm_act

_mkldnn = torch.ops.mkldnn


#: What oneDNN is told where there is no activation.
_NONE = Activation("none")


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has prepacked kernels for ``dtype`` on ``device``."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return _mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return _mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


class Prepacked(nn.Module):
    """What convolution and linear layers share: weights that are packed when made and when unpickled."""

    weight: Tensor
    bias: Tensor | None
    activation: Activation | None
    packed: bool
    _call: Callable[..., Tensor]

    @property
    def function(self) -> Callable[..., Tensor]:
        """What a call comes to, without the cost of calling a module."""
        return self._call if self.packed else self.forward

    def _pack(self) -> None:
        """Replace the plain ``weight`` by a packed one, if there are kernels for it."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_call", None)
        if self.packed:
            state["weight"] = self.weight.to_dense()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def _finish(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """The epilogue by itself; ``y`` is nobody else's."""
        if residual is not None:
            y = y.add_(residual) if _broadcasts_into(residual, y) else y + residual
        return y if self.activation is None else self.activation(y, inplace=True)

    def extra_repr(self) -> str:
        what = [f"{self.weight.shape[1]} to {self.weight.shape[0]}", str(self.weight.dtype)[6:]]
        what.append("oneDNN" if self.packed else "plain")
        if self.activation is not None:
            what.append(str(self.activation))
        return ", ".join(what)


def _broadcasts_into(residual: Tensor, y: Tensor) -> bool:
    return residual.shape == y.shape or torch.broadcast_shapes(residual.shape, y.shape) == y.shape


class PackedConv(Prepacked):
    """Convolution of any rank, plain or transposed, with a bias, a residual and an activation.

    Args:
        weight, bias: folded, on the device and in the dtype to compute in.
        stride, padding, dilation, groups: as torch.nn's; ``padding`` are numbers.
        activation: applied last.
        residual: None, or how to treat the second argument of a call, which is added before the
            activation: "add", or "overwrite" where nobody else reads it afterwards.
        input_size: the shape to choose the weights' layout for.
        output_padding: given for a transposed convolution.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        activation: Activation | None = None,
        residual: str | None = None,
        input_size: Sequence[int] = (),
        output_padding: Sequence[int] | None = None,
    ):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups = groups
        self.activation, self.residual = activation, residual
        self.input_size = list(input_size)
        self.output_padding = None if output_padding is None else list(output_padding)
        self._fitting: Any = None
        self._pack()

    def _pack(self) -> None:
        geometry = self.padding, self.stride, self.dilation, self.groups
        weight = self.weight
        plain = self.output_padding is None and weight.dim() in (4, 5)
        fits = self.residual is None or self.activation in (None, RELU)
        self.packed = plain and fits and weight.numel() > 0 and packs(weight.device, weight.dtype)
        if self.packed:
            self.weight = _mkldnn._reorder_convolution_weight(weight.contiguous(), *geometry, self.input_size)
        elif weight.dim() == 4 and self.output_padding is None:
            self.weight = weight.contiguous(memory_format=torch.channels_last)
        self._bind()

    def _bind(self) -> None:
        """Choose the function behind a call, with all but the tensors given, so that calls cost little."""
        weight = self.weight
        geometry = self.padding, self.stride, self.dilation, self.groups
        if not self.packed:
            self._call = self._aten_residual if self.residual else self._aten
            if weight.dim() == 4 and self.output_padding is None and self.activation in (None, RELU):
                self._call = self._tuned
            return
        if self.residual is None:
            name, scalars, algorithm = self.activation or _NONE
            epilogue = self.bias, *geometry, name, list(scalars), algorithm
            self._call = _bound(_mkldnn._convolution_pointwise.default, weight, epilogue)
            return
        unary = None if self.activation is None else self.activation.name
        epilogue = weight, self.bias, *geometry, "add", 1.0, unary, [], ""
        add, overwrite = _mkldnn._convolution_pointwise.binary, _mkldnn._convolution_pointwise_.binary
        in_place, dtype = self.residual == "overwrite", weight.dtype

        def call(x: Tensor, residual: Tensor) -> Tensor:
            x = _as(x, dtype)
            if not self._fits(x, residual):
                return self._unfused(x, residual)
            if in_place and residual.is_contiguous(memory_format=_channels_last(x)):
                return overwrite(residual, x, *epilogue)
            return add(x, residual, *epilogue)

        self._call = call

    def overwrite_residual(self) -> None:
        """From now on the residual's memory takes the result."""
        self.residual = "overwrite"
        self._bind()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        call = self._call
        return call(x) if residual is None else call(x, residual)

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the (not transposed) convolution of ``x``."""
        sizes = zip(x.shape[2:], self.weight.shape[2:], self.padding, self.stride, self.dilation, strict=True)
        spatial = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in sizes)
        return (x.shape[0], self.weight.shape[0], *spatial)

    def _fits(self, x: Tensor, residual: Tensor) -> bool:
        """Whether oneDNN can add ``residual`` as it is; the answer for the last shapes is remembered."""
        if residual.dtype is not self.weight.dtype:
            return False
        shapes = x.shape, residual.shape
        if shapes == self._fitting:
            return True
        fits = residual.shape == self.output_shape(x)
        if fits:
            self._fitting = shapes
        return fits

    def _unfused(self, x: Tensor, residual: Tensor) -> Tensor:
        geometry = self.padding, self.stride, self.dilation, self.groups
        y = _mkldnn._convolution_pointwise.default(x, self.weight, self.bias, *geometry, "none", [], "")
        return self._finish(y, _as(residual, y.dtype))

    def _convolution(self, x: Tensor) -> Tensor:
        return torch.convolution(
            _as(x, self.weight.dtype),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.output_padding is not None,
            self.output_padding or [0] * len(self.stride),
            self.groups,
        )

    def _aten(self, x: Tensor) -> Tensor:
        return self._finish(self._convolution(x))

    def _aten_residual(self, x: Tensor, residual: Tensor) -> Tensor:
        return self._finish(self._convolution(x), residual)

    def _tuned(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """In the fastest way on a GPU."""
        x = _as(x, self.weight.dtype)
        fits = residual is None or (residual.dtype is x.dtype and residual.shape == self.output_shape(x))
        if not (fits and tuned_conv.takes(x, x.dtype)):
            return self._finish(self._convolution(x), residual)
        stride, padding, dilation = tuple(self.stride), tuple(self.padding), tuple(self.dilation)
        geometry = tuned_conv.Geometry(stride, padding, dilation, self.groups)
        return tuned_conv.conv_bias_act(
            x, self.weight, self.bias, residual, geometry, self.activation == RELU
        )

    def extra_repr(self) -> str:
        geometry = f"kernel={tuple(self.weight.shape[2:])}, stride={tuple(self.stride)}"
        residual = "" if self.residual is None else f", residual={self.residual}"
        return f"{super().extra_repr()}, {geometry}{residual}"


def _bound(operator: Any, weight: Tensor, epilogue: tuple) -> Callable[..., Tensor]:
    """``operator(x, weight, *epilogue)`` as a function of ``x``."""
    dtype = weight.dtype

    def call(x: Tensor) -> Tensor:
        return operator(x if x.dtype is dtype else x.to(dtype), weight, *epilogue)

    return call


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def _channels_last(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


class PackedLinear(Prepacked):
    """A linear layer with a bias and an activation.

    Args:
        weight, bias: on the device and in the dtype to compute in.
        activation: applied last.
        rows: how many rows of input to choose the weights' layout for.
    """

    residual = None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None, rows: int = 1
    ):
        super().__init__()
        self.weight, self.bias, self.activation, self.rows = weight, bias, activation, rows
        self._pack()

    def _pack(self) -> None:
        weight = self.weight
        self.packed = weight.numel() > 0 and packs(weight.device, weight.dtype)
        if self.packed:
            name, scalars, algorithm = self.activation or _NONE
            self.weight = _mkldnn._reorder_linear_weight(weight.contiguous(), self.rows)
            epilogue = self.bias, name, list(scalars), algorithm
            self._call = _bound(_mkldnn._linear_pointwise.default, self.weight, epilogue)
        else:
            self._call = self._aten

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)

    def _aten(self, x: Tensor) -> Tensor:
        return self._finish(F.linear(_as(x, self.weight.dtype), self.weight, self.bias))


class FrozenBatchNormAct(nn.Module):
    """Batch normalization by running statistics that could not be folded, with residual and ReLU.

    Args:
        mean, var, weight, bias, eps: the normalization's.
        relu: whether a ReLU follows.
    """

    def __init__(
        self, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relu: bool
    ):
        super().__init__()
        self.stats = torch.stack((mean, var)).double()
        self.mean, self.var, self.weight, self.bias = mean, var, weight, bias
        self.eps, self.relu = eps, relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if _has_batch_norm_act(x) and (residual is None or residual.shape == x.shape):
            return _batch_norm_act(x, self.stats, self.weight, self.bias, residual, self.eps, self.relu)
        y = F.batch_norm(x, self.mean, self.var, self.weight, self.bias, eps=self.eps)
        if residual is not None:
            y = y + residual
        return y.relu_() if self.relu else y

    def extra_repr(self) -> str:
        return f"{self.mean.numel()}{', relu' * self.relu}"


@cache
def _has_cpu_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"pooling_ext::{name}", "CPU")


def _has_batch_norm_act(x: Tensor) -> bool:
    return _has_cpu_kernel("batch_norm_act") and backends.choose("batch_norm_act", x) is not backends.ATEN


class InPlaceActivation(nn.Module):
    """An activation that overwrites its input, which nobody else reads."""

    def __init__(self, activation: Activation):
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x, inplace=True)

    def extra_repr(self) -> str:
        return str(self.activation)


class Kept(nn.Module):
    """A module that runs as it is, in its own dtype.

    Args:
        own, dtype: the dtype that it computes in, and that of the graph around it.
        contiguous: whether its code looks at memory formats; then it is given contiguous tensors.
    """

    contiguous = False

    def __init__(
        self,
        module: nn.Module,
        own: torch.dtype | None,
        dtype: torch.dtype | None,
        contiguous: bool = False,
    ):
        super().__init__()
        self.module, self.own, self.dtype, self.contiguous = module, own, dtype, contiguous

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.contiguous:
            args, kwargs = tree_map(lambda x: x.contiguous() if isinstance(x, Tensor) else x, (args, kwargs))
        if self.own == self.dtype:
            return self.module(*args, **kwargs)
        args, kwargs = _cast((args, kwargs), self.own)
        return _cast(self.module(*args, **kwargs), self.dtype)


class Call(nn.Module):
    """A call of a function, as a module: torch.fx, which reads graphs back from pickles, leaves those alone.

    Args:
        function: what is called with the arguments of a call of this.
        args, kwargs: its arguments where a call of this has none.
    """

    def __init__(self, function: Callable[..., Any], args: tuple = (), kwargs: dict | None = None):
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs or {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*(args or self.args), **(kwargs or self.kwargs))

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def _cast(tree: Any, dtype: torch.dtype | None) -> Any:
    def one(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tree_map(one, tree)
