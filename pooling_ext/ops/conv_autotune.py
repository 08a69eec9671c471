"""Convolutions on a GPU, each call by the fastest candidate: cuDNN's, that of its graphs, or our kernels'.

Which that is depends on the card, the shape and the dtype; :mod:`pooling_ext.backends.autotune` measures it
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from .. import backends
from ..autograd import needs_grad
from ..backends import autotune
from . import conv as _conv
from . import cuda_conv, cudnn_frontend
from .activations import IDENTITY, RELU
from .batch_norm_operators import batch_norm_act_elemt
from .batch_norm_statistics import batch_stats

Candidate = Callable[..., Any]


class ConvParams(NamedTuple):
    """What a convolution is told besides its tensors, each for height and width."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


_chosen: dict[tuple, Candidate] = {}


def conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvParams,
    relu: bool,
) -> Tensor:
    """``relu(conv(input, weight) + bias + residual)`` without gradients; without what is None or false.

    Args:
        input: ``(N, C, H, W)``, in channels_last at best; float32, bfloat16 or float16.
        weight: ``(O, C / groups, KH, KW)``; the input's dtype.
        bias: ``(O,)``; the input's dtype.
        residual: the output's shape and dtype.

    Returns:
        ``(N, O, H_out, W_out)``.
    """
    return _fastest("conv_bias_act", _bias_act_candidates, input, weight, bias, residual, geometry, relu)


def conv_stats(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvParams, *norm: Any
) -> tuple[Tensor, Tensor]:
    """``conv(input, weight) + bias`` and its statistics, those of ``batch_norm_stats``; without gradients.

    Args:
        norm: nothing, or the batch norm that ``input`` is yet to pass: its statistics, weight, bias, eps and
            whether ReLU follows. Only our kernels and cuDNN's graphs take that.
    """
    return _fastest("conv_stats", _stats_candidates, input, weight, bias, geometry, *norm)


def conv_input_grad(
    grad: Tensor, weight: Tensor, input: Tensor, geometry: ConvParams, *norm: Any
) -> tuple[Tensor, Tensor]:
    """The gradient of what :func:`conv_stats` made of ``norm``'s output, and its sums, by our kernels alone.

    Returns:
        The gradient of what ReLU was given, and the sums of ``batch_norm_act_backward_reduce``.
    """
    return _fastest("conv_input_grad", _input_grad_candidates, grad, weight, input, geometry, *norm)


def conv_weight_grad(grad: Tensor, input: Tensor, weight: Tensor, geometry: ConvParams, *norm: Any) -> Tensor:
    """The weights' gradient of the convolution that :func:`conv_stats` made of ``norm``'s output."""
    return _fastest("conv_weight_grad", _weight_grad_candidates, grad, input, weight, geometry, *norm)


def conv_backward(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: ConvParams, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """PyTorch's gradients of a convolution's input, weight and bias, of which three ``wanted`` says which."""
    stride, padding, dilation, groups = geometry
    features = [weight.shape[0]]
    return torch.ops.aten.convolution_backward(
        grad, input, weight, features, stride, padding, dilation, False, [0, 0], groups, wanted
    )


def can_autotune(input: Tensor, dtype: torch.dtype) -> bool:
    """Whether the functions here are of use for such an input in ``dtype``: on a GPU, or interpreted."""
    return (
        input.dim() == 4
        and dtype in _conv.DTYPES
        and not is_compiling()
        and backends.choose("conv_bias_act", input) is not backends.ATEN
    )


def _fastest(name: str, candidates: Callable[..., dict[str, Candidate]], *args: Any) -> Any:
    return choose(name, candidates, *args)(*args)


def choose(name: str, candidates: Callable[..., dict[str, Candidate]], *args: Any) -> Candidate:
    """The fastest of the candidates for ``name`` with ``args``.

    Args:
        candidates: gives them for such arguments, each a function of these; the first is taken where there is
            no measuring. The first argument is a tensor on the device that counts.
    """
    key = (name, torch.backends.cudnn.allow_tf32, *map(_kind, args))
    candidate = _chosen.get(key)
    if candidate is None or backends.forced() is not None:
        offered = candidates(*args)
        if backends.forced() is not None:
            offered = {k: candidate for k, candidate in offered.items() if "cudnn" not in k} or offered
        calls = {label: partial(candidate, *args) for label, candidate in offered.items()}
        input = args[0]
        candidate = offered[_measured(" ".join((name, *map(_written, args))), calls, input)]
        if backends.forced() is None and not (input.is_cuda and torch.cuda.is_current_stream_capturing()):
            _chosen[key] = candidate
    return candidate


def _measured(call: str, candidates: dict[str, Candidate], input: Tensor) -> str:
    return autotune.fastest(call, candidates, input.device) if input.is_cuda else next(iter(candidates))


def _kind(x: Any) -> Any:
    """What calls that share a candidate have in common."""
    if not isinstance(x, Tensor):
        return x
    return x.shape, x.dtype, x.device, x.is_contiguous(memory_format=torch.channels_last)


def _written(x: Any) -> str:
    """The same, to be read in the tuner's file."""
    if isinstance(x, Tensor):
        layout = " channels_last" if x.is_contiguous(memory_format=torch.channels_last) else ""
        return f"{'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}{layout},"
    if isinstance(x, ConvParams):
        return f"stride {x.stride} padding {x.padding} dilation {x.dilation} groups {x.groups},"
    return f"{x},"


# --- the candidates ------------------------------------------------------------------------------


def _bias_act_candidates(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvParams,
    relu: bool,
) -> dict[str, Candidate]:
    candidates: dict[str, Candidate] = {"cudnn, then the rest": _apart}
    # In NCHW it is slow (pytorch#68506).
    if relu and input.is_cuda and weight.is_contiguous(memory_format=torch.channels_last):
        candidates["cudnn, fused"] = _cudnn_fused
    candidates |= cudnn_frontend.candidates(cudnn_frontend.conv_bias_act, input, weight, geometry.groups)
    for config in _configs(geometry, "conv_bias_act", input, weight, bias, residual, *geometry[:3], relu):
        candidates[f"triton {_label(config)}"] = partial(_triton_bias_act, config)
    for label, tile in _tiles(geometry, input, weight):
        candidates[f"cuda {label}"] = partial(_cuda_bias_act, tile)
    return candidates


def _apart(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvParams,
    relu: bool,
) -> Tensor:
    output = F.conv2d(input, weight, bias, *geometry)
    if residual is not None:
        output += residual
    return F.relu_(output) if relu else output


def _cudnn_fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvParams,
    relu: bool,
) -> Tensor:
    if residual is None:
        return torch.cudnn_convolution_relu(input, weight, bias, *geometry)
    if residual.data_ptr() == input.data_ptr():  # which cuDNN gets wrong (pytorch#62926)
        residual = residual.clone()
    return torch.cudnn_convolution_add_relu(input, weight, residual, 1.0, bias, *geometry)


def _triton_bias_act(
    config: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvParams,
    relu: bool,
) -> Tensor:
    from ..triton.conv.conv import conv_bias_act

    return conv_bias_act(input, weight, bias, residual, *geometry[:3], relu, config=config)


def _cuda_bias_act(
    tile: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: ConvParams,
    relu: bool,
) -> Tensor:
    return cuda_conv.conv_bias_act(input, weight, bias, residual, *geometry[:3], relu, tile)


def _stats_candidates(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvParams, *norm: Any
) -> dict[str, Candidate]:
    candidates: dict[str, Candidate] = {} if norm else {"cudnn, then statistics": _convolved_then_stats}
    given = norm or _NO_NORM
    for config in _configs(geometry, "conv_stats", input, weight, bias, *given, *geometry[:3]):
        candidates[f"triton {_label(config)}"] = partial(_triton_stats, config)
    for label, tile in _tiles(geometry, input, weight):
        candidates[f"cuda {label}"] = partial(_cuda_stats, tile)
    # Behind a batch norm it is not the one to fall back on.
    candidates |= cudnn_frontend.candidates(cudnn_frontend.conv_stats, input, weight, geometry.groups)
    return candidates


_NO_NORM: tuple[Any, ...] = (None, None, None, 0.0, False)


def _convolved_then_stats(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvParams
) -> tuple[Tensor, Tensor]:
    output = F.conv2d(input, weight, bias, *geometry)
    return output, batch_stats(output)


def _triton_stats(
    config: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvParams, *norm: Any
) -> tuple[Tensor, Tensor]:
    from ..triton.conv.conv import conv_stats

    rest: tuple[Any, ...] = (*(norm or _NO_NORM), *geometry[:3])
    return conv_stats(input, weight, bias, *rest, config=config)


def _input_grad_candidates(
    grad: Tensor, weight: Tensor, input: Tensor, geometry: ConvParams, *norm: Any
) -> dict[str, Candidate]:
    args = grad, weight, input.shape, input, *norm, *geometry[:3]
    return {
        f"triton {_label(config)}": partial(_triton_input_grad, config)
        for config in _configs(geometry, "conv_input_grad", *args)
    }


def _triton_input_grad(
    config: Any, grad: Tensor, weight: Tensor, input: Tensor, geometry: ConvParams, *norm: Any
) -> tuple[Tensor, Tensor]:
    from ..triton.conv.conv_input_grad import conv_input_grad

    rest: tuple[Any, ...] = (*norm, *geometry[:3])
    return conv_input_grad(grad, weight, input.shape, input, *rest, config=config)


def _weight_grad_candidates(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: ConvParams, *norm: Any
) -> dict[str, Candidate]:
    candidates: dict[str, Candidate] = {"normalized, then cudnn": _normalized_then_weight_grad}
    args = grad, input, weight.shape, *norm, *geometry[:3]
    for config in _configs(geometry, "conv_weight_grad", *args):
        candidates[f"triton {_label(config)}"] = partial(_triton_weight_grad, config)
    return candidates


def _normalized_then_weight_grad(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: ConvParams, *norm: Any
) -> Tensor:
    *affine, eps, relu = norm
    activation = RELU if relu else IDENTITY
    normalized = batch_norm_act_elemt(input, *affine, None, eps, *activation.arguments)
    _, grad_weight, _ = conv_backward(grad, normalized, weight, geometry, (False, True, False))
    assert grad_weight is not None
    return grad_weight


def _triton_weight_grad(
    config: Any, grad: Tensor, input: Tensor, weight: Tensor, geometry: ConvParams, *norm: Any
) -> Tensor:
    from ..triton.conv.conv_weight_grad import conv_weight_grad

    rest: tuple[Any, ...] = (*norm, *geometry[:3])
    return conv_weight_grad(grad, input, weight.shape, *rest, config=config)


def _cuda_stats(
    tile: int, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvParams, *norm: Any
) -> tuple[Tensor, Tensor]:
    rest: tuple[Any, ...] = (*(norm or _NO_NORM), *geometry[:3], tile)
    return cuda_conv.conv_stats(input, weight, bias, *rest)


def _tiles(geometry: ConvParams, input: Tensor, weight: Tensor) -> list[tuple[str, int]]:
    """The tiles of the CUDA kernels; none where they do not take the call."""
    return list(cuda_conv.tiles(input, weight, geometry[:3])) if geometry.groups == 1 else []


def _configs(geometry: ConvParams, operator: str, *args: Any) -> tuple[Any, ...]:
    """The configurations of our kernels; none where they do not take the call."""
    if geometry.groups != 1:
        return ()
    if not backends.offers(backends.TRITON, operator, args[0]):
        return ()
    from ..triton.conv.conv_configs import configs_of

    return configs_of(operator, *args)


def _label(config: Any) -> str:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    return f"{tile}, {config.num_warps} warps, {config.num_stages} stages"


# --- training ------------------------------------------------------------------------------------


def conv_stats_with_grad(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvParams
) -> tuple[Tensor, Tensor]:
    """:func:`conv_stats` with gradients of the convolution; the statistics pass none on."""
    if needs_grad(input, weight, bias):
        return _ConvStats.apply(input, weight, bias, geometry)
    return conv_stats(input, weight, bias, geometry)


class _ConvStats(Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvParams
    ) -> tuple[Tensor, Tensor]:
        output, stats = conv_stats(input, weight, bias, geometry)
        ctx.save_for_backward(input, weight)
        ctx.geometry = geometry
        ctx.mark_non_differentiable(stats)
        return output, stats

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, weight = ctx.saved_tensors
        gradients = conv_backward(grads[0], input, weight, ctx.geometry, ctx.needs_input_grad[:3])
        return *gradients, None
