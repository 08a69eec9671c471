"""What a fused chain of modules does when it is called.

A chain says which steps follow each other; the modules of the steps are given at each call. Where they are
just what the chain was made for, one of our operators takes them together. Where they are not (somebody has
put a hook on one, replaced it, or given it a forward of its own) they run one by one, as they would without
us.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..exporting import is_exporting
from ..graph.activations import MODULES, kernel_activation
from ..graph.modules import FunctionStep, Steps, module_activation, passes
from ..graph.op_tables import BATCH_NORMS, is_global, unchanged_class
from ..nn import AdaptiveAvgPool2d, MaxPool2d
from ..ops.activations import IDENTITY, RELU, Activation
from ..ops.add_relu_global_avg_pool import add_relu_global_avg_pool
from ..ops.avg_pool import adaptive_avg_pool2d
from ..ops.batch_norm_arguments import batch_norm_arguments
from ..ops.batch_norm_relu_max_pool import batch_norm_relu_max_pool
from ..ops.conv_bn_act import gpu
from ..ops.conv_bn_act.call import POOLED, Call, calls_only_forward, is_plain, least_elements
from ..ops.conv_bn_act.implementations import run
from ..ops.max_pool import max_pool2d
from ..ops.prologue_norm import PrologueNorm

MAX_POOLS = (nn.MaxPool2d, MaxPool2d)
AVG_POOLS = (nn.AdaptiveAvgPool2d, AdaptiveAvgPool2d)
_RELUS = (nn.ReLU,)


@dataclass(frozen=True)
class Add:
    """An addition; in place when ``function`` is operator.iadd.

    Attributes:
        function: operator.add or operator.iadd.
        residual_first: whether the residual is the left operand.
    """

    function: Callable[[Any, Any], Any]
    residual_first: bool = False

    def __call__(self, value: Any, residual: Any) -> Any:
        return self.function(residual, value) if self.residual_first else self.function(value, residual)


@dataclass(frozen=True)
class MaxPool:
    """A max pooling function with its arguments."""

    arguments: tuple[Any, ...]

    def __call__(self, value: Any) -> Any:
        return max_pool2d(value, *self.arguments)


@dataclass(frozen=True)
class GlobalAvgPool:
    """A mean over height and width, by Tensor.mean over ``dims`` or as adaptive pooling to one element."""

    keepdim: bool
    dims: tuple[int, ...] | None = None

    def __call__(self, value: Any) -> Any:
        return adaptive_avg_pool2d(value, 1) if self.dims is None else value.mean(self.dims, self.keepdim)


@dataclass(frozen=True)
class BatchNormChain:
    """``[convolution] - batch norm - [add] - [activation] - [max pooling]``.

    A step that is a function in the forward is a field here; one that is a module is an argument of the call.

    Attributes:
        add, act, pool: the functions.
        activation: what ``act`` applies.
        exact: whether convolutions are not Winograd's.
        norm: what the batch norm's own forward goes on with; None for one of torch.nn.
        gaps: how many modules that do nothing stand after each of the five steps.
    """

    add: Add | None = None
    act: FunctionStep | None = None
    activation: Activation = IDENTITY
    pool: MaxPool | None = None
    exact: bool = False
    norm: Steps | None = None
    gaps: tuple[int, ...] = (0, 0, 0, 0, 0)
    __name__ = "batch_norm_chain"

    def __call__(
        self,
        conv: nn.Module | None,
        bn: nn.Module,
        act: nn.Module | None,
        pool: nn.Module | None,
        input: Any,
        residual: Any = None,
        *passed: nn.Module,
        following: nn.Module | None = None,
    ) -> Any:
        """Run the chain.

        Args:
            input: a value, or what an earlier chain left to this one.
            passed: the modules between the steps that do nothing.
            following: the convolution of the chain that alone takes the result, which then may be left to it.
        """
        own = self._own_steps(bn)
        if (
            own is None
            or (own and not (act is None and self.act is None and self.add is None))
            or (passed and not all(map(passes, passed)))
            or _has_any_global_hook()
        ):
            return self._one_by_one(input, conv, bn, act, pool, residual, passed)
        step, activation, rest = self._activation(act, own)
        prologue = input if type(input) is PrologueNorm else None
        value: Any = input if prologue is None else prologue.output
        if conv is not None and not (isinstance(value, Tensor) and is_plain(conv)):
            value = conv(input if prologue is None else prologue.computed())
            conv = prologue = None
        if not isinstance(value, Tensor):
            return self._one_by_one(input if prologue else value, conv, bn, act, pool, residual, passed)
        norm = None if self.norm is None else self.norm.inherited
        call = Call(
            conv, bn, value, residual, step, self.add, exact=self.exact, activation=activation, norm=norm
        )
        if pool is not None or self.pool is not None:
            return self._pooled(call, rest, pool, prologue)
        call.following = None if rest else following
        if prologue is None:
            output = run(call)
        elif gpu.why_not(call) is None:
            output = gpu.run(call, prologue)
        else:
            call.input = prologue.computed()
            output = run(call)
        for step in rest:
            output = step(output)
        return output

    def _own_steps(self, bn: Any) -> Sequence[Any] | None:
        """What follows in the forward of the batch norm itself; None where it is not what it was."""
        if self.norm is None:
            return () if _is_just(bn, BATCH_NORMS) else None
        return self.norm.of(bn) if self.norm.holds(bn) and calls_only_forward(bn) else None

    def _activation(self, act: Any, own: Sequence[Any]) -> tuple[Any, Activation, Sequence[Any]]:
        """The activation that our kernels apply, as a step and by name, and the steps that are left."""
        if own:
            act, own = (own[0], ()) if len(own) == 1 else (None, own)
        if act is None:
            return self.act, self.activation, own
        activation = step_activation(act)
        return (None, IDENTITY, (act,)) if activation is None else (act, activation, own)

    def _pooled(self, call: Call, rest: Sequence[Any], pool: Any, prologue: PrologueNorm | None) -> Any:
        if call.conv is not None:
            value = call.input if prologue is None else prologue.computed()
            call.continue_with(run(Call(call.conv, None, value, exact=self.exact)))
        input, bn = call.input, call.bn
        if (
            input.dim() == 4
            and call.activation == RELU
            and not rest
            and not is_exporting()  # as in the list of implementations
            and (pool is None or (_is_just(pool, MAX_POOLS) and not pool.return_indices))
            # PyTorch's own is for GPUs, so ours takes it at any size.
            and (input.numel() >= least_elements(POOLED, input) or isinstance(bn, nn.SyncBatchNorm))
        ):
            arguments = batch_norm_arguments(bn)
            return batch_norm_relu_max_pool(input, **arguments, **_pool_arguments(pool, self.pool))
        output = run(call)
        for step in rest:
            output = step(output)
        return _step(pool, self.pool, output)

    def _one_by_one(
        self, value: Any, conv: Any, bn: Any, act: Any, pool: Any, residual: Any, passed: Sequence[Any]
    ) -> Any:
        """What the forward does without us."""
        value = value.computed() if type(value) is PrologueNorm else value
        add = None if self.add is None else partial(self.add, residual=residual)
        modules = iter(passed)
        act, pool = self.act if act is None else act, self.pool if pool is None else pool
        for step, gap in zip((conv, bn, add, act, pool), self.gaps, strict=True):
            for each in (step, *islice(modules, gap)):
                value = value if each is None else each(value)
        return value


#: The activations of our kernels that modules apply which have no parameters; to look here is faster.
_WITHOUT_PARAMETERS = {
    kind: kernel_activation(MODULES[kind](None))
    for kind in (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid)
}


def step_activation(step: Any) -> Activation | None:
    """The activation of our kernels that ``step`` applies and nothing else; None if there is none."""
    known = _WITHOUT_PARAMETERS.get(type(step))
    if known is not None:
        return known if calls_only_forward(step) else None
    found = module_activation(step)
    return None if found is None else kernel_activation(found)


@dataclass(frozen=True)
class LoneBatchNorm:
    """A batch norm whose caller's forward is not known; ``norm`` as in :class:`BatchNormChain`."""

    kind: type
    norm: Steps | None = None

    def __call__(self, bn: Any, input: Any, forward: Callable[[Any, Any], Any]) -> Any:
        """What ``forward``, the batch norm's own, gives for ``input``."""
        own: Any = () if self.norm is None else self.norm.of(bn) if self.norm.holds(bn) else None
        if own is None or not isinstance(input, Tensor) or _has_any_global_hook():
            return forward(bn, input)
        act, rest = (own[0], ()) if len(own) == 1 else (None, own)
        activation = None if act is None else step_activation(act)
        if activation is None:
            act, activation, rest = None, IDENTITY, own
        norm = self.kind.forward  # type: ignore[attr-defined]
        output = run(Call(None, bn, input, None, act, activation=activation, norm=norm))
        for step in rest:
            output = step(output)
        return output


@dataclass(frozen=True)
class AddPoolChain:
    """``add - ReLU - global average pooling``; fields and arguments as in :class:`BatchNormChain`."""

    add: Add
    pool: GlobalAvgPool | None = None
    relu: Callable[[Any], Any] | None = None
    __name__ = "add_pool_chain"

    def __call__(self, relu: nn.Module | None, pool: nn.Module | None, input: Any, residual: Any) -> Any:
        if (
            _is_batch(input)
            and _alike(residual, input)
            and (relu is None or _is_just(relu, _RELUS))
            and (pool is None or (_is_just(pool, AVG_POOLS) and is_global(pool.output_size)))
            and not _has_any_global_hook()
        ):
            return add_relu_global_avg_pool(input, residual, self.pool is None or self.pool.keepdim)
        output = _step(relu, self.relu, self.add(input, residual))
        return _step(pool, self.pool, output)


def _step(module: nn.Module | None, function: Callable[[Any], Any] | None, value: Any) -> Any:
    if module is not None:
        return module(value)
    return value if function is None else function(value)


def _is_just(module: Any, kinds: tuple[type, ...]) -> bool:
    cls = type(module)
    return (cls in kinds or unchanged_class(cls) in kinds) and calls_only_forward(module)


def _is_batch(input: Any) -> bool:
    return isinstance(input, Tensor) and input.dim() == 4


def _alike(residual: Any, value: Tensor) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == value.shape
        and residual.dtype == value.dtype
        and residual.device == value.device
    )


def _pool_arguments(module: Any, function: MaxPool | None) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    if module is not None:
        return {name: getattr(module, name) for name in names}
    assert function is not None
    return dict(zip(names, function.arguments, strict=True))


#: In place and out of place, by which a forward may call ReLU.
RELUS: dict[bool, Callable[[Any], Any]] = {True: torch.relu_, False: torch.relu}
ADDS = {True: operator.iadd, False: operator.add}
