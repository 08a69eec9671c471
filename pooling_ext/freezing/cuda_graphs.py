"""CUDA graphs of a function without side effects, one for each kind of input it is called with.

A graph replays the kernels of one run without any of Python's or PyTorch's work between them. It reads
and writes the memory of that run, so inputs are copied in and outputs out.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

#: Graphs kept for one function, each with memory of its own.
LIMIT = 8

#: Makes a graph of ``function(*inputs)``: gives what replays it, and the outputs that this fills.
Capture = Callable[[Callable[..., Any], Sequence[Any]], tuple[Callable[[], None], Any]]


class Graphs:
    """Calls a function through CUDA graphs.

    The first call with inputs of new shapes runs the function, so that kernels are compiled and chosen; the
    second captures it; those after replay. What cannot be captured goes on being run. It may be called from
    several threads and on several streams: calls take turns.

    Args:
        function: takes tensors and constants, and computes the same from the same.
        enter: turns an argument into what ``function`` takes.
        capture: makes the graph; torch.cuda's unless a test brings its own.
    """

    def __init__(
        self, function: Callable[..., Any], enter: Callable[[Any], Any], capture: Capture | None = None
    ):
        self.function, self.enter = function, enter
        self._capture = capture or _CudaCapture()
        self._kept: OrderedDict[Any, _Graph | None] = OrderedDict()  # None: run once, or not to be captured
        self._hopeless: set[Any] = set()
        self._lock = threading.Lock()
        self._turns = _Turns()

    def __call__(self, *args: Any) -> Any:
        key = tuple(map(_kind, args))
        with self._lock:
            graph = self._graph(key, args)
            if graph is not None:
                return self._turns.take(partial(graph, args), args)
        return self.function(*map(self.enter, args))

    def _graph(self, key: Any, args: Sequence[Any]) -> _Graph | None:
        if key in self._hopeless:
            return None
        seen = key in self._kept
        graph = self._kept.get(key)
        if seen and graph is None:
            inputs = [self.enter(x).clone() if isinstance(x, Tensor) else x for x in args]
            try:
                graph = _Graph(inputs, *self._capture(self.function, inputs))
            except RuntimeError:  # it waits for the GPU somewhere, or makes memory in its own way
                self._hopeless.add(key)
                del self._kept[key]
                return None
        self._kept[key] = graph
        self._kept.move_to_end(key)
        if len(self._kept) > LIMIT:
            self._kept.popitem(last=False)
        return graph


class _Graph:
    def __init__(self, inputs: Sequence[Any], replay: Callable[[], None], outputs: Any):
        self.inputs, self.replay, self.outputs = inputs, replay, outputs

    def __call__(self, args: Sequence[Any]) -> Any:
        for static, x in zip(self.inputs, args, strict=True):
            if isinstance(x, Tensor):
                static.copy_(x)
        self.replay()
        return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.outputs)


class _Turns:
    """Has a replay wait on the GPU for the one before it, of whatever graph and stream.

    All graphs of one function share a memory pool, so two that ran at once would overwrite each other's
    intermediate results.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None

    def take(self, call: Callable[[], Any], args: Sequence[Any]) -> Any:
        device = next((x.device for x in args if isinstance(x, Tensor) and x.is_cuda), None)
        if device is None:
            return call()
        stream = torch.cuda.current_stream(device)
        if self._last is not None:
            stream.wait_event(self._last)
        result = call()
        self._last = torch.cuda.Event()
        self._last.record(stream)
        return result


class _CudaCapture:
    """Captures on a stream of its own; all graphs take their memory from one pool, since they take turns."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, function: Callable[..., Any], inputs: Sequence[Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = function(*inputs)
        self.pool = graph.pool()
        return graph.replay, outputs


def _kind(x: Any) -> Any:
    """What two arguments must have in common to share a graph."""
    return (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x
