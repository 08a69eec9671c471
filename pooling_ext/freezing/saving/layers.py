"""The layers of a frozen graph as data: plain weights, and the way that each convolution runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from .. import conv_allotment, conv_engines
from ..conv_engines import WINOGRAD
from ..layers import Call, FrozenBatchNormAct, InPlaceActivation, Kept, PackedConv, PackedLinear
from . import modules, operators
from .values import Decoder, Encoder, Fields

_ENGINES = {engine.name: engine for engine in conv_engines.ENGINES}
_RESIDUALS = (None, "add", "overwrite")
_GEOMETRY = ("stride", "padding", "dilation", "groups", "residual", "input_size", "output_padding")
_VECTORS = ("mean", "var", "weight", "bias")


def encode(layer: Any, encoder: Encoder) -> dict[str, Any]:
    """What a graph calls or reads, as data.

    Raises:
        Unsupported: it has no such form.
    """
    if not isinstance(layer, nn.Module):
        return {"kind": "constant", "value": encoder.value(layer)}
    if isinstance(layer, (PackedConv, PackedLinear)):
        own = {name: encoder.value(getattr(layer, name)) for name in ("bias", "activation")}
        own["weight"] = encoder.tensor(layer.plain_weight)
        if isinstance(layer, PackedLinear):
            return {"kind": "linear", **own, "rows": layer.rows}
        geometry = {name: getattr(layer, name) for name in _GEOMETRY}
        return {"kind": "conv", **own, **geometry, "way": layer.way, "left_out": layer.left_out}
    if isinstance(layer, FrozenBatchNormAct):
        own = {name: encoder.value(getattr(layer, name)) for name in (*_VECTORS, "activation")}
        return {"kind": "batch_norm", **own, "eps": layer.eps}
    if isinstance(layer, InPlaceActivation):
        return {"kind": "in_place", "activation": encoder.value(layer.activation)}
    if isinstance(layer, Call):
        name = operators.name_of(layer.function)
        return {
            "kind": "call",
            "function": name,
            "args": encoder.value(layer.args),
            "kwargs": encoder.value(layer.kwargs),
        }
    if isinstance(layer, Kept):
        dtypes = {name: encoder.value(getattr(layer, name)) for name in ("own", "dtype")}
        inner = modules.encode(layer.module, encoder)
        return {"kind": "kept", "module": inner, **dtypes, "contiguous": layer.contiguous}
    return modules.encode(layer, encoder)


class LayerReader:
    """Makes layers of data.

    Attributes:
        changed: by the names of convolutions, why they do not run as they did where they were saved.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.changed: dict[str, str] = {}
        self._settling: dict[str, tuple[PackedConv, conv_engines.Engine, str | None]] = {}

    def read(self, name: str, path: str, data: Any) -> Any:
        """What a graph calls ``name``; convolutions do not run before :meth:`settle`.

        Args:
            path: what errors call it.

        Raises:
            ArgumentError: the data stand for no layer.
        """
        fields = Fields(data, path)
        kind = fields.get("kind", str)
        make = {
            "constant": lambda: self.decoder.value(fields.get("value")),
            "conv": lambda: self._conv(name, fields),
            "linear": lambda: self._linear(fields),
            "batch_norm": lambda: self._batch_norm(fields),
            "in_place": lambda: InPlaceActivation(self._activation(fields, optional=False)),
            "call": lambda: self._call(fields),
            "kept": lambda: self._kept(fields),
            "module": lambda: modules.decode(fields, self.decoder),
        }.get(kind)
        if make is None:
            raise ArgumentError(f"{path}: it is a {kind!r}, which no file has")
        try:
            return make()
        except ArgumentError as error:
            text = str(error)
            raise error if text.startswith(f"{path}: ") else ArgumentError(f"{path}: {text}") from error

    def settle(self, left: int) -> None:
        """Let convolutions run in the way that they ran in, as far as that can be had here.

        Args:
            left: the bytes that weights may take which are transformed for Winograd's kernels.
        """
        resumed = self._settling.values()
        beyond = conv_allotment.beyond(
            (layer for layer, engine, _ in resumed if engine is WINOGRAD and WINOGRAD.cannot(layer) is None),
            left,
        )
        for name, (layer, engine, left_out) in self._settling.items():
            reason = beyond.get(layer)
            if reason is not None:
                layer.settle(reason)
            else:
                reason = layer.resume(engine, left_out)
            if reason is not None:
                self.changed[name] = f"{layer.way}, not {engine.name}: {reason}"

    def _conv(self, name: str, data: Fields) -> PackedConv:
        weight, bias = self._weights(data, range(3, 6))
        rank, groups = weight.dim() - 2, data.get("groups", int)
        transposed = data.get("output_padding", list, type(None)) is not None
        sizes = {"stride": 1, "padding": 0, "dilation": 1} | ({"output_padding": 0} if transposed else {})
        for key, least in sizes.items():
            numbers = data.items(key, int)
            if len(numbers) != rank or min(numbers) < least:
                raise ArgumentError(f"{key} must be {rank} numbers of at least {least}, but got {numbers}")
        out, multiple = (weight.shape[1] * groups, weight.shape[0]) if transposed else (weight.shape[0],) * 2
        if groups < 1 or multiple % groups:
            raise ArgumentError(f"groups must divide {multiple}, but got {groups}")
        _check_vector("bias", bias, out)
        residual, way = data.get("residual"), data.get("way", str)
        if residual not in _RESIDUALS:
            raise ArgumentError(f"residual must be one of {_RESIDUALS}, but got {residual!r}")
        if way not in _ENGINES:
            raise ArgumentError(f"way must be one of {tuple(_ENGINES)}, but got {way!r}")
        geometry = {key: data.get(key) for key in _GEOMETRY}
        geometry["input_size"] = data.items("input_size", int)
        activation = self._activation(data)
        layer = PackedConv(weight, bias, activation=activation, settle=False, **geometry)
        self._settling[name] = layer, _ENGINES[way], data.get("left_out", str, type(None))
        return layer

    def _linear(self, data: Fields) -> PackedLinear:
        weight, bias = self._weights(data, range(2, 3))
        _check_vector("bias", bias, weight.shape[0])
        rows = data.get("rows", int)
        if rows < 0:
            raise ArgumentError(f"rows must be at least 0, but got {rows}")
        return PackedLinear(weight, bias, self._activation(data), rows)

    def _weights(self, data: Fields, ranks: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        weight, bias = self._tensor(data, "weight"), self._tensor(data, "bias")
        if weight is None or weight.dim() not in ranks or not weight.is_floating_point():
            raise ArgumentError(f"weight must be floating and of {ranks[0]} dimensions or more")
        if bias is not None and bias.dtype != weight.dtype:
            raise ArgumentError(f"bias must be {weight.dtype}, but got {bias.dtype}")
        return weight, bias

    def _batch_norm(self, data: Fields) -> FrozenBatchNormAct:
        vectors = {name: self._tensor(data, name) for name in _VECTORS}
        mean, eps = vectors["mean"], data.get("eps", float)
        if mean is None or vectors["var"] is None or mean.dim() != 1 or not mean.is_floating_point():
            raise ArgumentError("mean and var must be floating vectors")
        for name, vector in vectors.items():
            _check_vector(name, vector, mean.numel())
            if vector is not None and vector.dtype != mean.dtype:
                raise ArgumentError(f"{name} must be {mean.dtype}, but got {vector.dtype}")
        if not math.isfinite(eps):
            raise ArgumentError(f"eps must be finite, but got {eps}")
        activation = self._activation(data)
        return FrozenBatchNormAct(*vectors.values(), eps=eps, activation=activation)  # type: ignore[arg-type]

    def _call(self, data: Fields) -> Call:
        function = operators.function_named(data.get("function", str))
        args, kwargs = self.decoder.value(data.get("args")), self.decoder.value(data.get("kwargs"))
        if type(args) is not tuple or type(kwargs) is not dict or any(type(key) is not str for key in kwargs):
            raise ArgumentError("args must be a tuple, and kwargs a dict")
        if function is getattr:
            raise ArgumentError("it asks for an attribute")
        return Call(function, args, kwargs)

    def _kept(self, data: Fields) -> Kept:
        module = modules.decode(Fields(data.get("module"), data.where), self.decoder)
        own, dtype = (self.decoder.value(data.get(name)) for name in ("own", "dtype"))
        if not all(x is None or isinstance(x, torch.dtype) for x in (own, dtype)):
            raise ArgumentError("own and dtype must be dtypes or None")
        return Kept(module, own, dtype, data.get("contiguous", bool))

    def _tensor(self, data: Fields, name: str) -> Tensor | None:
        value = data.get(name)
        return None if value is None else self.decoder.tensor(value)

    def _activation(self, data: Fields, optional: bool = True) -> Any:
        value = data.get("activation")
        if value is None and optional:
            return None
        if type(value) is not list or value[:1] != ["activation"]:
            raise ArgumentError(f"activation must be one, but got {value!r}")
        return self.decoder.value(value)


def _check_vector(name: str, vector: Tensor | None, length: int) -> None:
    if vector is not None and vector.shape != (length,):
        raise ArgumentError(f"{name} must have {length} elements, but got shape {tuple(vector.shape)}")
