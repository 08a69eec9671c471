"""A step of training as one CUDA graph: for small batches, where Python takes longer than the GPU."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .errors import ArgumentError

#: Steps that run as they are, on the stream that captures, before one is captured: kernels are compiled and
#: chosen then, and the optimizer makes its state.
WARM_UP = 3
#: Graphs that one step keeps, the last used ones; each holds the activations of its inputs' shapes.
LIMIT = 4

#: What a run of the step gives: the loss, and the parameters' gradients.
Outputs = tuple[Tensor, list["Tensor | None"]]


class Api(Protocol):
    """What a step takes of CUDA; tests bring their own."""

    def aside(self, function: Callable[[], Outputs]) -> Outputs:
        """Run ``function`` on the stream that captures, in turn with what is on the current one."""
        ...

    def capture(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        """What replays ``function``, which is not run, and the outputs that it fills."""
        ...


class _Cuda:
    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def _side(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream

    def aside(self, function: Callable[[], Outputs]) -> Outputs:
        side, current = self._side(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            outputs = function()
        current.wait_stream(side)
        for x in (outputs[0], *outputs[1]):
            if x is not None:
                x.record_stream(current)
        return outputs

    def capture(self, function: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
        graph = torch.cuda.CUDAGraph()
        # The graphs of one step never run at a time, so they share memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side()):
            outputs = function()
        self._pool = graph.pool()
        return graph.replay, outputs


class _Captured(NamedTuple):
    inputs: list[Any]
    replay: Callable[[], None]
    outputs: Outputs


class CapturedStep:
    """What :func:`capture_step` returns: call it with a batch.

    Attributes:
        why_not: why steps run as they are, where they could not be captured; else None.

    Example:
        >>> step = pooling_ext.capture_step(lambda x: model(x).sum(), model)  # doctest: +SKIP
        >>> step.why_not is None  # doctest: +SKIP
        True
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        api: Api | None = None,
    ) -> None:
        self.loss, self.model, self.optimizer = loss, model, optimizer
        self.why_not: str | None = None
        self._api = api or _Cuda()
        self._kept: OrderedDict[Any, _Captured | int] = OrderedDict()  # a number: steps that warmed up
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Tensor:
        """Make a step.

        Args:
            *inputs: what ``loss`` takes. Tensors are copied into the graph's own; the rest are its constants.

        Returns:
            The loss of the batch before the step, a scalar without gradients.
        """
        with self._lock:
            if self.why_not is not None:
                return self._run(inputs)[0].clone()
            key = self._key(inputs)
            captured = self._kept.get(key, 0)
            if isinstance(captured, int):
                if captured < WARM_UP:
                    self._keep(key, captured + 1)
                    return self._api.aside(lambda: self._run(inputs))[0].clone()
                captured = self._capture(inputs)
                if captured is None:
                    return self._run(inputs)[0].clone()
            self._keep(key, captured)
            for static, x in zip(captured.inputs, inputs, strict=True):
                if isinstance(x, Tensor):
                    static.copy_(x, non_blocking=True)
            captured.replay()
            loss, grads = captured.outputs
            for parameter, grad in zip(self.model.parameters(), grads, strict=True):
                parameter.grad = grad
            return loss.clone()

    def _keep(self, key: Any, value: _Captured | int) -> None:
        self._kept[key] = value
        self._kept.move_to_end(key)
        if len(self._kept) > LIMIT:
            self._kept.popitem(last=False)

    def _capture(self, inputs: Sequence[Any]) -> _Captured | None:
        static = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
        try:
            return _Captured(static, *self._api.capture(lambda: self._run(static)))
        except RuntimeError as error:  # it waits for the GPU somewhere
            self.why_not = str(error)
            self._kept.clear()
            warnings.warn(f"the step runs as it is, since it cannot be captured: {error}", stacklevel=3)
            return None

    def _run(self, inputs: Sequence[Any]) -> Outputs:
        for parameter in self._parameters():
            parameter.grad = None  # so that backward writes new ones, which in a graph stay in their place
        loss = self.loss(*inputs)
        if loss.dim() != 0:
            raise ArgumentError(f"loss must return a scalar, but gave a tensor of shape {tuple(loss.shape)}")
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach(), [parameter.grad for parameter in self.model.parameters()]

    def _parameters(self) -> Iterable[Tensor]:
        yield from self.model.parameters()
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            yield from group["params"]

    def _key(self, inputs: Sequence[Any]) -> Any:
        """What a graph holds for constant."""
        given = tuple(
            (x.shape, x.dtype, x.device, x.stride()) if isinstance(x, Tensor) else x for x in inputs
        )
        modes = tuple(module.training for module in self.model.modules())
        parameters = tuple((x.data_ptr(), x.requires_grad) for x in self._parameters())
        groups = self.optimizer.param_groups if self.optimizer is not None else ()
        options = tuple(
            (name, id(value) if isinstance(value, Tensor) else value)
            for group in groups
            for name, value in group.items()
            if name != "params"
        )
        return given, modes, parameters, options


def capture_step(
    loss: Callable[..., Tensor], model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> CapturedStep:
    """Make a function of a batch that does a step of training by replaying one CUDA graph.

    For each shape of the inputs the first three calls train as usual, the fourth captures, and those after
    replay: a step is then one launch, whatever the model's Python takes, which decides at small batches.
    Gradients of an earlier step are dropped; those of this one stay in ``parameter.grad``. What cannot be
    captured goes on being run, with a warning.

    A graph holds for constant what is not a tensor: the optimizer's options, the modules' modes, which
    parameters are trained. Where one of these changes, the step is captured anew, after three calls as usual.
    Where the learning rate changes at each step, make it a tensor of an optimizer with ``capturable=True``,
    or leave the optimizer out and step by yourself.

    Not for models whose forward depends on values of tensors, for gradient scalers, for batch norms with
    ``momentum=None``, or in several processes. This has not run on a GPU yet.

    Args:
        loss: runs the model on a batch, under autocast if so wanted, and returns the loss, a scalar.
        model: whose parameters get gradients; on a GPU.
        optimizer: is stepped in the graph. Of those that have an option ``capturable`` it must be true. None
            leaves the step to the caller, after each call.

    Returns:
        A function of what ``loss`` takes, which returns the loss.

    Raises:
        ArgumentError: ``model`` is not on a GPU or has no parameters, or ``optimizer`` is not capturable.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> pooling_ext.capture_step(lambda x: model(x).sum(), model)
        Traceback (most recent call last):
        pooling_ext.errors.ArgumentError: model must be on a GPU, but weight is on cpu
        >>> model = model.cuda()  # doctest: +SKIP
        >>> step = pooling_ext.capture_step(lambda x: model(x).sum(), model)  # doctest: +SKIP
        >>> loss = step(torch.randn(8, 4, device="cuda"))  # doctest: +SKIP
    """
    _check(loss, model, optimizer)
    return CapturedStep(loss, model, optimizer)


def _check(loss: Any, model: Any, optimizer: Any, device: str = "cuda") -> None:
    if not callable(loss):
        raise TypeError(f"loss must be a function, but got {type(loss).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer or None, but got {type(optimizer).__name__}"
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not any(isinstance(tensor, nn.Parameter) for _, tensor in tensors):
        raise ArgumentError("model must have parameters, but it has none")
    for name, tensor in tensors:
        if tensor.device.type != device:
            raise ArgumentError(f"model must be on a GPU, but {name} is on {tensor.device}")
    for number, group in enumerate(optimizer.param_groups if optimizer is not None else ()):
        if group.get("capturable") is False:
            raise ArgumentError(
                f"optimizer must be made with capturable=True, but group {number} of "
                f"{type(optimizer).__name__} has capturable=False"
            )
