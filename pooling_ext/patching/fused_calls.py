"""What a fused chain of modules does when it is called.

A chain says which steps follow each other; the modules of the steps are given at each call. Where they are
just what the chain was made for, one of our operators takes them together. Where they are not (somebody has
put a hook on one, replaced it, or given it a forward of its own) they run one by one, as they would without
us.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ..graph.op_tables import is_global, unchanged_class
from ..nn import AdaptiveAvgPool2d, MaxPool2d
from ..ops.add_relu_global_avg_pool import add_relu_global_avg_pool
from ..ops.avg_pool import adaptive_avg_pool2d
from ..ops.batch_norm_act import batch_norm_act, batch_norm_arguments, transformed
from ..ops.batch_norm_relu_max_pool import batch_norm_relu_max_pool
from ..ops.conv_bn_act import (
    calls_only_forward,
    convolved,
    evaluated,
    folded,
    folds,
    outputs,
    tuned,
    tunes,
)
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


TRAINING, NO_RELU, EVALUATION, FOLDED, POOLED = "training", "no ReLU", "evaluation", "folded", "pooled"
INFERENCE = "inference"
#: Elements from which on a call of ours saves more than it costs, on each thread. Below, the modules run one
#: by one. For 4 or 8 bytes an element in channels_last and contiguous, then for 2 bytes in both; measured
#: on one AVX-512 core with batch norms of 32 to 512 channels and 1x1 convolutions between as many.
LEAST_ELEMENTS = {
    TRAINING: (1 << 16, 1 << 16, 1 << 16, 1 << 16),
    NO_RELU: (1 << 17, 1 << 16, 1 << 17, 1 << 17),
    EVALUATION: (1 << 17, 1 << 18, 1 << 17, 1 << 17),  # with gradients, or traced
    INFERENCE: (0, 0, 0, 0),  # without; one call takes the place of two or three
    FOLDED: (1 << 18, 1 << 20, 1 << 18, 1 << 19),  # rather than INFERENCE
    POOLED: (1 << 17, 1 << 17, 1 << 17, 1 << 17),
}


def _least() -> int:
    """The elements below which nothing pays but inference."""
    return min(min(least) for how, least in LEAST_ELEMENTS.items() if how != INFERENCE)


_smallest = _least()


def _pays(how: str, elements: int, input: Tensor) -> bool:
    if not input.is_cpu:
        return True
    contiguous = not input.is_contiguous(memory_format=torch.channels_last)
    least = LEAST_ELEMENTS[how][2 * (input.element_size() == 2) + contiguous]
    # A compiler's trace holds for any number of threads.
    return elements >= least * (1 if is_compiling() else torch.get_num_threads())


@contextmanager
def from_size(elements: int) -> Iterator[None]:
    """Take chains together from this size on, in the whole process, whatever pays; for tests."""
    global _smallest
    before = dict(LEAST_ELEMENTS)
    LEAST_ELEMENTS.update(dict.fromkeys(LEAST_ELEMENTS, (elements, elements, elements, elements)))
    _smallest = _least()
    try:
        yield
    finally:
        LEAST_ELEMENTS.update(before)
        _smallest = _least()


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
        following: nn.Module | None = None,
    ) -> Any:
        """Run the chain.

        Args:
            input: a value, or what an earlier chain left to this one.
            following: the convolution of the chain that alone takes the result, which then may be left to it.
        """
        pooled = pool is not None or self.pool is not None
        fresh = False  # whether the modules are just what they were, and nobody else has the input
        if conv is not None:
            deferred = type(input) is Deferred
            value = input.output if deferred else input
            if (
                isinstance(value, Tensor)
                and not pooled
                and tunes(conv, bn, value, residual)
                and calls_only_forward(conv)
                and self._is_fused(bn, relu, pool)
                and (self.add is None or _fits(residual, conv, value))
            ):
                return tuned(conv, bn, input, residual, self._activation(relu), following)
            if deferred:
                input = input.computed()
            if (
                not (bn.training or pooled)
                and type(conv) is nn.Conv2d
                and isinstance(input, Tensor)
                and calls_only_forward(conv)
                and self._is_fused(bn, relu, pool)
                and not transformed()
            ):
                if self.add is None and _pays(FOLDED, outputs(conv, input), input) and folds(conv, bn, input):
                    return folded(conv, bn, input, self._activation(relu))
                input = convolved(conv, input)
                fresh = True
            else:
                input = conv(input)
        if (
            not (bn.training or pooled)
            and isinstance(input, Tensor)
            and input.numel() >= LEAST_ELEMENTS[INFERENCE][0]
            and (fresh or self._is_fused(bn, relu, pool))
            and (self.add is None or _alike(residual, input))
        ):
            rectifies = relu is not None or self.relu is not None
            output = evaluated(bn, input, residual, rectifies, overwrite=fresh)
            if output is not None:
                return output
        if (
            isinstance(input, Tensor)
            # What comes first decides for most of a small network, where each check shows.
            and (input.numel() >= _smallest or type(bn) is nn.SyncBatchNorm or not input.is_cpu)
            and input.dim() == 4
            and (fresh or self._is_fused(bn, relu, pool))
            and (self.add is None or _alike(residual, input))
            and (
                _pays(self._way(bn, relu, pooled), input.numel(), input)
                # PyTorch's own is for GPUs, so ours takes it at any size.
                or type(bn) is nn.SyncBatchNorm
            )
        ):
            arguments = batch_norm_arguments(bn)
            if pooled:
                return batch_norm_relu_max_pool(input, **arguments, **_pool_arguments(pool, self.pool))
            return batch_norm_act(input, **arguments, residual=residual, activation=self._activation(relu))
        output = _batch_norm(bn, input)
        if self.add is not None:
            output = self.add(output, residual)
        if relu is not None:
            output = relu(output)
        elif self.relu is not None:
            output = self.relu(output)
        return _step(pool, self.pool, output) if pooled else output

    def _is_fused(self, bn: Any, relu: Any, pool: Any) -> bool:
        """Whether the modules are what the chain was made for, and calling them does nothing else."""
        return (
            _is_just(bn, BATCH_NORMS)
            and (relu is None or _is_just(relu, _RELUS))
            and (pool is None or (_is_just(pool, MAX_POOLS) and not pool.return_indices))
            and not _has_any_global_hook()
        )

    def _way(self, bn: Any, relu: Any, pooled: bool) -> str:
        if pooled:
            return POOLED
        if not bn.training:
            return EVALUATION
        return NO_RELU if relu is None and self.relu is None else TRAINING

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


def _batch_norm(bn: Any, input: Any) -> Any:
    """``bn(input)``, without what takes PyTorch's module longer than the operator takes when small."""
    if type(bn) is not nn.BatchNorm2d or not calls_only_forward(bn) or _has_any_global_hook():
        return bn(input)
    buffers, parameters = bn._buffers, bn._parameters
    try:
        mean, variance, counter = (
            buffers["running_mean"],
            buffers["running_var"],
            buffers["num_batches_tracked"],
        )
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:  # somebody keeps them elsewhere
        return bn(input)
    training, momentum = bn.training, bn.momentum
    if mean is None or counter is None or momentum is None or not bn.track_running_stats:
        return bn(input)
    if not isinstance(input, Tensor) or input.dim() != 4:
        return bn(input)
    if training:
        counter.add_(1)
    return F.batch_norm(input, mean, variance, weight, bias, training, momentum, bn.eps)


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
