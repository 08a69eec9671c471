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

from .nn import AdaptiveAvgPool2d, MaxPool2d
from .ops.add_relu_global_avg_pool import add_relu_global_avg_pool
from .ops.avg_pool import adaptive_avg_pool2d
from .ops.batch_norm_act import batch_norm_act, batch_norm_arguments
from .ops.batch_norm_relu_max_pool import batch_norm_relu_max_pool
from .ops.conv_bn_act import folded, folds, outputs
from .ops.max_pool import max_pool2d

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


#: Smaller inputs go through the modules one by one: a call of ours costs more than it saves there.
LEAST_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class BatchNormChain:
    """``[convolution] - batch norm - [add] - [ReLU] - [max pooling]``.

    A step that is a function in the forward is a field here; one that is a module is an argument of the call.
    """

    add: Add | None = None
    relu: Callable[[Any], Any] | None = None
    pool: MaxPool | None = None
    __name__ = "batch_norm_chain"

    def __call__(
        self,
        conv: nn.Module | None,
        bn: nn.Module,
        relu: nn.Module | None,
        pool: nn.Module | None,
        input: Any,
        residual: Any = None,
    ) -> Any:
        pooled = pool is not None or self.pool is not None
        if conv is not None:
            if (
                not (bn.training or pooled)
                and type(conv) is nn.Conv2d
                and _is_batch(input)
                and outputs(conv, input) >= LEAST_ELEMENTS
                and calls_only_forward(conv)
                and self._is_fused(bn, relu, pool)
                and (self.add is None or _fits(residual, conv, input))
                and folds(conv, bn, input, residual)
            ):
                return folded(conv, bn, input, residual, self._activation(relu))
            input = conv(input)
        if (
            isinstance(input, Tensor)
            # PyTorch's synchronised batch norm is for GPUs, so ours takes that at any size.
            and (input.numel() >= LEAST_ELEMENTS or type(bn) is nn.SyncBatchNorm)
            and input.dim() == 4
            and self._is_fused(bn, relu, pool)
            and (self.add is None or _alike(residual, input))
        ):
            arguments = batch_norm_arguments(bn)
            if pooled:
                return batch_norm_relu_max_pool(input, **arguments, **_pool_arguments(pool, self.pool))
            return batch_norm_act(input, **arguments, residual=residual, activation=self._activation(relu))
        output = bn(input)
        if self.add is not None:
            output = self.add(output, residual)
        output = _step(relu, self.relu, output)
        return _step(pool, self.pool, output)

    def _is_fused(self, bn: Any, relu: Any, pool: Any) -> bool:
        """Whether the modules are what the chain was made for, and calling them does nothing else."""
        return (
            _is_just(bn, BATCH_NORMS)
            and (relu is None or _is_just(relu, _RELUS))
            and (pool is None or (_is_just(pool, MAX_POOLS) and not pool.return_indices))
            and not _has_any_global_hook()
        )

    def _activation(self, relu: Any) -> str:
        return "identity" if relu is None and self.relu is None else "relu"


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


def is_global(output_size: Any) -> bool:
    """Whether an adaptive pooling of that output size makes one element of each plane."""
    return output_size == 1 or (isinstance(output_size, (tuple, list)) and list(output_size) == [1, 1])


def _step(module: nn.Module | None, function: Callable[[Any], Any] | None, value: Any) -> Any:
    if module is not None:
        return module(value)
    return value if function is None else function(value)


def _is_just(module: Any, kinds: tuple[type, ...]) -> bool:
    return type(module) in kinds and calls_only_forward(module)


def calls_only_forward(module: Any) -> bool:
    """Whether calling ``module`` does nothing but its class's forward, global hooks aside."""
    return (
        not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and module._compiled_call_impl is None
        and "forward" not in module.__dict__
    )


def _is_batch(input: Any) -> bool:
    return isinstance(input, Tensor) and input.dim() == 4


def _alike(residual: Any, value: Tensor) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == value.shape
        and residual.dtype == value.dtype
        and residual.device == value.device
    )


def _fits(residual: Any, conv: Any, input: Tensor) -> bool:
    """Whether ``residual`` is like the output that ``conv`` will have."""
    if not isinstance(residual, Tensor) or residual.dim() != 4 or residual.device != input.device:
        return False
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    if residual.dtype != dtype or residual.shape[:2] != (input.shape[0], conv.out_channels):
        return False
    for axis in (0, 1):
        span = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        if conv.padding == "same":
            size = input.shape[2 + axis]
        else:
            padding = 0 if conv.padding == "valid" else conv.padding[axis]
            size = (input.shape[2 + axis] + 2 * padding - span - 1) // conv.stride[axis] + 1
        if residual.shape[2 + axis] != size:
            return False
    return True


def _pool_arguments(module: Any, function: MaxPool | None) -> dict[str, Any]:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    if module is not None:
        return {name: getattr(module, name) for name in names}
    assert function is not None
    return dict(zip(names, function.arguments, strict=True))


#: In place and out of place, by which a forward may call ReLU.
RELUS: dict[bool, Callable[[Any], Any]] = {True: torch.relu_, False: torch.relu}
ADDS = {True: operator.iadd, False: operator.add}
