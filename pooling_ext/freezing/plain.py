"""What the layers of a frozen graph come to: as they are, in compiled graphs, on PyTorch's operators alone.

The last is for torch.export, torch.jit.trace and torch.func.
Weights that oneDNN keeps in an order of its own become tensors again that any operator can read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..autograd import transformed
from ..exporting import constant_in_graphs, is_recording
from .conv_engines import in_dtype
from .layers import FrozenBatchNormAct, PackedConv, PackedLinear, Prepacked


def is_wanted() -> bool:
    """Whether what is called has to be PyTorch's operators."""
    return is_recording() or transformed()


def plain(layer: Any) -> Any:
    """What a call of ``layer`` comes to; ``layer`` itself where that is PyTorch's operators anyway."""
    if isinstance(layer, PackedConv):
        weight = _dense(layer)
        return _conv(layer, lambda: weight)
    if isinstance(layer, PackedLinear):
        return _linear(layer)
    return layer.by_pytorch if isinstance(layer, FrozenBatchNormAct) else layer


def packed(layer: Any) -> Any:
    """What a call of ``layer`` comes to, without the cost of calling a module of ours."""
    return layer.function if isinstance(layer, Prepacked) else layer


def compiled(layer: Any) -> Any:
    """What a call of ``layer`` comes to in compiled graphs, which take no packed weight of a Linear."""
    if not isinstance(layer, PackedLinear) or not layer.packed:
        return packed(layer)
    dense = constant_in_graphs(lambda: _dense(layer))
    dtype = layer.weight.dtype

    def call(x: Tensor) -> Tensor:
        return layer.finish(F.linear(in_dtype(x, dtype), dense(), layer.bias))

    return call


def exported(layer: Any) -> Any:
    """What a call of ``layer`` comes to in a strict export, which takes no packed weight."""
    if isinstance(layer, PackedConv):
        return _conv(layer, constant_in_graphs(lambda: _dense(layer)))
    return layer.by_pytorch if isinstance(layer, FrozenBatchNormAct) else compiled(layer)


def _conv(layer: PackedConv, dense: Callable[[], Tensor]) -> Callable[..., Tensor]:
    transposed = layer.output_padding is not None
    geometry = layer.stride, layer.padding, layer.dilation, transposed
    rest = layer.output_padding or [0] * len(layer.stride), layer.groups

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight = dense()
        y = torch.convolution(in_dtype(x, weight.dtype), weight, layer.bias, *geometry, *rest)
        y = y if residual is None else y + in_dtype(residual, y.dtype)
        return y if layer.activation is None else layer.activation(y)

    return call


def _linear(layer: PackedLinear) -> Callable[[Tensor], Tensor]:
    weight = _dense(layer)

    def call(x: Tensor) -> Tensor:
        return layer.finish(F.linear(in_dtype(x, weight.dtype), weight, layer.bias))

    return call


def _dense(layer: Prepacked) -> Tensor:
    if not layer.packed:
        return layer.weight
    with _unrecorded():
        return layer.plain_weight


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Let operators run as they do where no program is made of them."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[arg-type]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[arg-type]
