"""Modules of torch.nn that a frozen graph calls as they are: class, arguments and tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ... import nn as ours
from ...errors import ArgumentError
from ...graph.op_tables import is_hooked
from .values import Decoder, Encoder, Fields, Unsupported

_ranks = [f"{name}{rank}d" for name in (
    "AdaptiveAvgPool", "AdaptiveMaxPool", "AvgPool", "MaxPool", "LPPool", "BatchNorm", "InstanceNorm", "Conv",
    "ConvTranspose", "CircularPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "ZeroPad", "Dropout",
) for rank in (1, 2, 3)]  # fmt: skip
_SINGLE = """
    Linear Bilinear Identity Flatten Unflatten Embedding LayerNorm GroupNorm RMSNorm LocalResponseNorm
    Upsample UpsamplingNearest2d UpsamplingBilinear2d PixelShuffle PixelUnshuffle ChannelShuffle Fold Unfold
    CosineSimilarity PairwiseDistance Softmax Softmax2d LogSoftmax Softmin MultiheadAttention
    Dropout AlphaDropout FeatureAlphaDropout
    CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6
    RReLU SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold
"""
# Arguments that are not attributes of the same name.
_ARGUMENTS: dict[tuple[type, str], Callable[[Any], Any]] = {
    (nn.MultiheadAttention, "bias"): lambda m: m.in_proj_bias is not None,
    (nn.MultiheadAttention, "add_bias_kv"): lambda m: m.bias_k is not None,
}
# Where tensors are made, and of what: the file has them.
_ELSEWHERE = ("device", "dtype")
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_NORM = ("eps", "momentum", "affine", "track_running_stats")
_ACTIVATION = ("activation", "negative_slope")


@cache
def _classes() -> dict[str, type[nn.Module]]:
    names = [*_ranks, *_SINGLE.split()]
    found = {f"torch.nn.{name}": getattr(nn, name) for name in names if hasattr(nn, name)}
    found |= {f"pooling_ext.{name}": getattr(ours, name) for name in ours.__all__}
    return {name: cls for name, cls in found.items() if isinstance(cls, type) and issubclass(cls, nn.Module)}


@cache
def _names() -> dict[type, str]:
    return {cls: name for name, cls in _classes().items()}


def encode(module: nn.Module, encoder: Encoder) -> dict[str, Any]:
    """A module as data.

    Raises:
        Unsupported: it is none that can be made again from the arguments of its class.
    """
    name = _names().get(type(module))
    if name is None:
        raise Unsupported("it runs as it is, by code of its own")
    config = _config(module)
    data = {
        "kind": "module",
        "class": name,
        "config": {key: encoder.value(value) for key, value in config.items()},
        "state": {key: encoder.tensor(value) for key, value in module.state_dict().items()},
    }
    try:
        twin = _make(type(module), config)
    except Exception as error:
        raise Unsupported(f"it cannot be made again from its arguments: {error}") from error
    if (different := _difference(module, twin)) is not None:
        raise Unsupported(f"it was changed after it was made: {different}")
    return data


def decode(data: Fields, decoder: Decoder) -> nn.Module:
    """The module that data stand for.

    Raises:
        ArgumentError: they stand for none.
    """
    name = data.get("class", str)
    if name not in _classes():
        raise ArgumentError(f"{data.where}: it is a {name!r}, which no file has")
    config = {key: decoder.value(value) for key, value in data.get("config", dict).items()}
    state = {key: decoder.tensor(value) for key, value in data.get("state", dict).items()}
    try:
        module = _make(_classes()[name], config)
        module.load_state_dict(state, assign=True)
    except Exception as error:
        raise ArgumentError(f"{data.where}: {name} cannot be made of its arguments: {error}") from error
    return module.requires_grad_(False)


def _make(cls: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    """A module in eval mode whose tensors are still to come."""
    with torch.device("meta"):
        return cls(**config).eval()


def _config(module: nn.Module) -> dict[str, Any]:
    """The arguments to make a module with."""
    if isinstance(module, ours.ConvBNAct2d):
        config = {name: getattr(module.conv, name) for name in (*_CONV, "padding_mode")}
        config |= {name: getattr(module.bn, name) for name in _NORM}
        config |= {name: getattr(module, name) for name in _ACTIVATION}
        return {**config, "bias": module.conv.bias is not None}
    cls, config = type(module), {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name in ("self", *_ELSEWHERE):
            continue
        if (cls, name) in _ARGUMENTS:
            config[name] = _ARGUMENTS[cls, name](module)
        elif hasattr(module, name):
            value = getattr(module, name)
            is_vector = name == "bias" and (value is None or isinstance(value, Tensor))
            config[name] = value is not None if is_vector else value
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            raise Unsupported(f"its argument {name} is not known")
    return config


def _difference(module: nn.Module, twin: nn.Module) -> str | None:
    """What ``twin`` has not that ``module`` has, other than tensors' values."""
    own, other = dict(module.named_modules()), dict(twin.named_modules())
    if own.keys() != other.keys():
        return "its children"
    for path, one in own.items():
        prefix = f"{path}." if path else ""
        if is_hooked(one) or type(one) is not type(other[path]):
            return f"{prefix}{type(one).__name__}"
        for name in sorted(_attributes(one) | _attributes(other[path])):
            mine, made = getattr(one, name, None), getattr(other[path], name, None)
            if type(mine) is not type(made) or mine != made:
                return f"{prefix}{name}"
    if module.state_dict().keys() != twin.state_dict().keys():
        return "its tensors"
    return None


def _attributes(module: nn.Module) -> set[str]:
    return {name for name, value in vars(module).items() if name[:1] != "_" and not isinstance(value, Tensor)}
