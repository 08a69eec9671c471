"""What a fused chain of modules does when it is called.

A chain says which steps follow each other; the modules of the steps are given at each call. Where they are
just what the chain was made for, one of our operators takes them together. Where they are not (somebody has
put a hook on one, replaced it, or given it a forward of its own) they run one by one, as they would without
us.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..exporting import is_exporting
from ..graph.op_tables import is_global, unchanged_class
from ..nn import AdaptiveAvgPool2d, MaxPool2d
from ..ops.add_relu_global_avg_pool import add_relu_global_avg_pool
from ..ops.avg_pool import adaptive_avg_pool2d
from ..ops.batch_norm_act import batch_norm_arguments
from ..ops.batch_norm_relu_max_pool import batch_norm_relu_max_pool
from ..ops.conv_bn_act import gpu
from ..ops.conv_bn_act.call import POOLED, Call, calls_only_forward, is_plain, least_elements
from ..ops.conv_bn_act.implementations import run
from ..ops.conv_bn_act.norm import run_eager
from ..ops.deferred_norm import Deferred
from ..ops.max_pool import max_pool2d

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
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
    """``[convolution] - batch norm - [add] - [ReLU] - [max pooling]``.

    A step that is a function in the forward is a field here; one that is a module is an argument of the call.
    With ``exact`` convolutions are not Winograd's.
    """

    add: Add | None = None
    relu: Callable[[Any], Any] | None = None
    pool: MaxPool | None = None
    exact: bool = False
    __name__ = "batch_norm_chain"

    def __call__(
        self,
        conv: nn.Module | None,
        bn: nn.Module,
        relu: nn.Module | None,
        pool: nn.Module | None,
        input: Any,
        residual: Any = None,
        following: nn.Module | None = None,
    ) -> Any:
        """Run the chain.

        Args:
            input: a value, or what an earlier chain left to this one.
            following: the convolution of the chain that alone takes the result, which then may be left to it.
        """
        if pool is not None or self.pool is not None:
            return self._pooled(conv, bn, relu, pool, input)
        deferred = input if type(input) is Deferred else None
        value: Any = input if deferred is None else deferred.output
        if conv is not None and not (isinstance(value, Tensor) and is_plain(conv)):
            value = conv(input if deferred is None else deferred.computed())
            conv = deferred = None
        rectifies = relu if relu is not None else self.relu
        if not (isinstance(value, Tensor) and self._is_fused(bn, relu, None)):
            value = value if deferred is None else deferred.computed()
            value = value if conv is None else run(Call(conv, None, value, exact=self.exact))
            return run_eager(Call(None, bn, value, residual, rectifies, self.add))
        call = Call(conv, bn, value, residual, rectifies, self.add, following=following, exact=self.exact)
        if deferred is None:
            return run(call)
        if gpu.why_not(call) is None:
            return gpu.run(call, deferred)
        call.input = deferred.computed()
        return run(call)

    def _pooled(self, conv: Any, bn: Any, relu: Any, pool: Any, input: Any) -> Any:
        if conv is not None:
            input = input.computed() if type(input) is Deferred else input
            plain = isinstance(input, Tensor) and is_plain(conv)
            input = run(Call(conv, None, input, exact=self.exact)) if plain else conv(input)
        if (
            isinstance(input, Tensor)
            and input.dim() == 4
            and not is_exporting()  # as in the list of implementations
            and self._is_fused(bn, relu, pool)
            # PyTorch's own is for GPUs, so ours takes it at any size.
            and (input.numel() >= least_elements(POOLED, input) or type(bn) is nn.SyncBatchNorm)
        ):
            arguments = batch_norm_arguments(bn)
            return batch_norm_relu_max_pool(input, **arguments, **_pool_arguments(pool, self.pool))
        output = run_eager(Call(None, bn, input, None, relu if relu is not None else self.relu))
        return _step(pool, self.pool, output)

    def _is_fused(self, bn: Any, relu: Any, pool: Any) -> bool:
        """Whether the modules are what the chain was made for, and calling them does nothing else."""
        return (
            _is_just(bn, BATCH_NORMS)
            and (relu is None or _is_just(relu, _RELUS))
            and (pool is None or (_is_just(pool, MAX_POOLS) and not pool.return_indices))
            and not _has_any_global_hook()
        )


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
