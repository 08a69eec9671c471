"""Convolutions by cuDNN's graph API, with what goes before and after them in one kernel.

It is reached through the optional package ``nvidia-cudnn-frontend``; without it, nothing here is offered.
There are two graphs: convolution, addition, bias and ReLU for inference; and scale, bias and ReLU,
convolution and the sums of its statistics for training. :mod:`.conv_autotune` compares them with the others
on the card.

This has not run on a GPU. The variance is that of float32 sums of values and of squares, as cuDNN makes
them; it is less exact than ours where a channel's mean is far larger than its deviation.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: cuDNN's names of dtypes.
DTYPES = {torch.bfloat16: "BFLOAT16", torch.float16: "HALF", torch.float32: "FLOAT"}

_local = threading.local()  # handles and graphs: no two threads may share one


@cache
def module() -> Any:
    """The package, or None where there is none."""
    try:
        return importlib.import_module("cudnn")
    except Exception:  # an ImportError, or an OSError of a library that it lacks
        return None


def candidates(convolution: Callable[..., Any], input: Tensor, weight: Tensor, groups: int) -> dict[str, Any]:
    """``convolution`` (:func:`conv_bias_act` or :func:`conv_stats`) by its name, where the API takes it."""
    if not input.is_cuda or groups != 1 or input.dtype not in (torch.bfloat16, torch.float16):
        return {}
    last = torch.channels_last
    if not (input.is_contiguous(memory_format=last) and weight.is_contiguous(memory_format=last)):
        return {}
    return {} if module() is None else {"cudnn graph": convolution}


def conv_bias_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Any, relu: bool
) -> Tensor:
    """As :func:`pooling_ext.ops.conv_autotune.conv_bias_act`, rounded once."""
    key = "bias_act", input.shape, weight.shape, input.dtype, input.device
    key = *key, bias is None, residual is None, tuple(geometry), relu
    make = partial(_bias_act_graph, input, weight, bias, residual, geometry, relu)
    graph = _graph(key, make)
    output = _output(input, weight, geometry)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    graph(input, weight, bias, residual, output)
    return output


def conv_stats(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any, *norm: Any
) -> tuple[Tensor, Tensor]:
    """As :func:`pooling_ext.ops.conv_autotune.conv_stats`."""
    scale = shift = None
    relu = False
    if norm:
        stats, bn_weight, bn_bias, eps, relu = norm
        scale, shift = _affine(stats, bn_weight, bn_bias, eps)
    key = "stats", input.shape, weight.shape, input.dtype, input.device
    key = *key, bias is None, bool(norm), tuple(geometry), relu
    make = partial(_stats_graph, input, weight, bias, geometry, bool(norm), relu)
    graph = _graph(key, make)
    output = _output(input, weight, geometry)
    sums = torch.empty(2, 1, len(weight), 1, 1, dtype=torch.float32, device=input.device)
    graph(input, weight, bias, scale, shift, output, *sums)
    mean, square = sums.view(2, -1).double() * (len(weight) / max(output.numel(), 1))
    return output, torch.stack((mean, (square - mean * mean).clamp_min_(0)))


def probe(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What the API says of both graphs in ``dtype`` on a small input: "ok", or why not."""
    package = module()
    if package is None:
        return {"frontend": "nvidia-cudnn-frontend is not installed"}

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)

    input, weight = tensor(8, 64, 28, 28), tensor(64, 64, 3, 3)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    norm = torch.ones(2, 64, dtype=torch.float64, device=device), None, None, 1e-5, True
    found: dict[str, Any] = {"frontend": package.__version__, "dtype": str(dtype)}
    calls = {
        "conv_bias_act": lambda: conv_bias_act(
            input, weight, weight[:, 0, 0, 0].clone(), None, geometry, True
        ),
        "conv_stats": lambda: conv_stats(input, weight, None, geometry),
        "norm_conv_stats": lambda: conv_stats(input, weight, None, geometry, *norm),
    }
    for name, call in calls.items():
        try:
            call()
            found[name] = "ok"
        except Exception as error:  # cudnnGraphNotSupportedError, which is an answer
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


# --- graphs --------------------------------------------------------------------------------------


class _Graph(NamedTuple):
    """A graph that is built; it takes its tensors in the order in which they were made, None for none."""

    graph: Any
    tensors: Sequence[Any]
    workspace: int

    def __call__(self, *data: Tensor | None) -> None:
        pack = {
            tensor: x
            for tensor, x in zip(self.tensors, data, strict=True)
            if tensor is not None and x is not None
        }
        device = next(iter(pack.values())).device
        # Of PyTorch's own memory, which a CUDA graph's capture keeps.
        workspace = torch.empty(max(self.workspace, 1), dtype=torch.uint8, device=device)
        self.graph.execute(pack, workspace, handle=_handle(device))


def _graph(key: tuple, make: Callable[[], _Graph]) -> _Graph:
    graphs: dict[tuple, _Graph] = _local.__dict__.setdefault("graphs", {})
    if key not in graphs:
        graphs[key] = make()
    return graphs[key]


def _handle(device: torch.device) -> Any:
    """This thread's handle, on PyTorch's current stream."""
    handles: dict[torch.device, Any] = _local.__dict__.setdefault("handles", {})
    package = module()
    with torch.cuda.device(device):
        if device not in handles:
            handles[device] = package.create_handle()
        package.set_stream(handle=handles[device], stream=torch.cuda.current_stream(device).cuda_stream)
    return handles[device]


def _new_graph(input: Tensor) -> Any:
    types = module().data_type
    return module().pygraph(
        io_data_type=getattr(types, DTYPES[input.dtype]),
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
        handle=_handle(input.device),
    )


def _finish(graph: Any, tensors: Sequence[Any]) -> _Graph:
    modes = module().heur_mode
    graph.build([modes.A, modes.FALLBACK])
    return _Graph(graph, tensors, graph.get_workspace_size())


def _bias_act_graph(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, geometry: Any, relu: bool
) -> _Graph:
    graph = _new_graph(input)
    x, w = _tensor(graph, "input", input), _tensor(graph, "weight", weight)
    y = _convolve(graph, x, w, geometry)
    r = b = None
    if residual is not None:
        r = _tensor(graph, "residual", residual.contiguous(memory_format=torch.channels_last))
        y = graph.add(y, r)
    if bias is not None:
        b = _channels(graph, "bias", len(bias), bias.dtype)
        y = graph.bias(y, b)
    if relu:
        y = graph.relu(y)
    _mark(y, input.dtype)
    return _finish(graph, (x, w, b, r, y))


def _stats_graph(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any, norm: bool, relu: bool
) -> _Graph:
    graph = _new_graph(input)
    x, w = _tensor(graph, "input", input), _tensor(graph, "weight", weight)
    scale = shift = b = None
    read = x
    if norm:
        scale, shift = (_channels(graph, name, input.shape[1], torch.float32) for name in ("scale", "shift"))
        read = graph.bias(graph.scale(read, scale), shift)
        read = graph.relu(read) if relu else read
    y = _convolve(graph, read, w, geometry)
    if bias is not None:
        b = _channels(graph, "bias", len(bias), bias.dtype)
        y = graph.bias(y, b)
    sums = graph.genstats(y)
    _mark(y, input.dtype)
    for total in sums:
        _mark(total, torch.float32)
    return _finish(graph, (x, w, b, scale, shift, y, *sums))


def _convolve(graph: Any, x: Any, w: Any, geometry: Any) -> Any:
    stride, padding, dilation, _ = geometry
    return graph.conv_fprop(x, w, padding=list(padding), stride=list(stride), dilation=list(dilation))


def _tensor(graph: Any, name: str, x: Tensor) -> Any:
    # PyTorch's strides of dimensions of size 1 are arbitrary.
    n, c, h, w = x.shape
    strides = [c * h * w, 1, c * w, c]
    return graph.tensor(name=name, dim=[n, c, h, w], stride=strides, data_type=_type(x.dtype))


def _channels(graph: Any, name: str, count: int, dtype: torch.dtype) -> Any:
    dim, stride = [1, count, 1, 1], [count, 1, count, count]
    return graph.tensor(name=name, dim=dim, stride=stride, data_type=_type(dtype))


def _mark(tensor: Any, dtype: torch.dtype) -> None:
    tensor.set_output(True).set_data_type(_type(dtype))


def _type(dtype: torch.dtype) -> Any:
    return getattr(module().data_type, DTYPES[dtype])


def _affine(stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """A batch norm as a factor and an addend of each channel, in float32."""
    mean, var = stats
    scale = torch.rsqrt(var + eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return scale.float(), shift.float()


def _output(input: Tensor, weight: Tensor, geometry: Any) -> Tensor:
    stride, padding, dilation, _ = geometry
    sides = [
        (size + 2 * pad - step * (kernel - 1) - 1) // by + 1
        for size, kernel, by, pad, step in zip(
            input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return torch.empty(
        (len(input), len(weight), *sides),
        dtype=input.dtype, device=input.device, memory_format=torch.channels_last,
    )  # fmt: skip
