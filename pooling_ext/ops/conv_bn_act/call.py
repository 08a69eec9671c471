"""One call of a convolution with what follows it, as the implementations see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from ... import backends
from ...autograd import transformed
from .._library import suggests_channels_last
from ..activations import IDENTITY, Activation
from ..conv_choice import Conv, stands_for_conv2d

#: The reason of those on the list that do no batch norm by itself.
NO_CONVOLUTION = "there is no convolution"

TRAINING, NO_ACTIVATION, EVALUATION = "training", "no activation", "evaluation"
FOLDED, POOLED = "folded", "pooled"
INFERENCE = "inference"
#: Elements from which on a call of ours saves more than it costs, on each thread. Below, the modules run one
#: by one. For 4 or 8 bytes an element in channels_last and contiguous, then for 2 bytes in both; measured
#: on one AVX-512 core with batch norms of 32 to 512 channels and 1x1 convolutions between as many.
LEAST_ELEMENTS = {
    TRAINING: (1 << 16, 1 << 16, 1 << 16, 1 << 16),
    NO_ACTIVATION: (1 << 17, 1 << 16, 1 << 17, 1 << 17),
    EVALUATION: (1 << 17, 1 << 18, 1 << 17, 1 << 17),  # with gradients, or traced
    INFERENCE: (0, 0, 0, 0),  # without; one call replaces two or three
    FOLDED: (1 << 18, 1 << 20, 1 << 18, 1 << 19),  # rather than INFERENCE
    POOLED: (1 << 17, 1 << 17, 1 << 17, 1 << 17),
}


def least_elements(how: str, input: Tensor) -> int:
    """The elements from which on ``how`` pays: none on a GPU."""
    if not input.is_cpu or transformed():  # then PyTorch's operators are called in any case
        return 0
    contiguous = not input.is_contiguous(memory_format=torch.channels_last)
    least = LEAST_ELEMENTS[how][2 * (input.element_size() == 2) + contiguous]
    # A compiler's trace holds for any number of threads.
    return least * (1 if is_compiling() else torch.get_num_threads())


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


def has_plain_weights(conv: Any) -> bool:
    """Whether the forward of a Conv2d is a convolution with zeros around, by its own parameters."""
    own = conv._parameters
    return conv.padding_mode == "zeros" and own.get("weight") is not None and "bias" in own


def is_plain(conv: Any) -> bool:
    """Whether calling ``conv`` is just that."""
    return (
        stands_for_conv2d(conv)
        and calls_only_forward(conv)
        and has_plain_weights(conv)
        and not _has_any_global_hook()
    )


#: The classes of what is a module's own.
_OWN = (nn.Parameter, Tensor)


def _shape(x: Any) -> Any:
    return x if x is None or x is False else x.shape


def _vector_kind(x: Any) -> Any:
    """Whether a vector is a plain one of the CPU; False stands for what somebody keeps elsewhere."""
    if x is None or x is False:
        return x
    return (1 if x.is_cpu else 2) if type(x) in _OWN else type(x)


def _tensor_kind(x: Any) -> tuple[Any, ...]:
    return (type(x), x.is_cpu, x.dtype, x.shape, x.stride()) if isinstance(x, Tensor) else (type(x),)


def autocast_dtype(device: str = "cpu") -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class Call:
    """``act(add(bn(conv(input)), residual))``, without what is None.

    Attributes:
        conv: a convolution that :func:`is_plain`.
        bn: a batch norm that does what PyTorch's do, and nothing besides.
        input: a tensor.
        residual: a tensor, or anything that ``add`` takes.
        act: the activation's module or function.
        activation: what it is.
        add: an addition, in place or not; "+" where it is None.
        fresh: whether nobody else has ``input``, so that it may be overwritten.
        checked: whether arguments that do not go together are an error of ours rather than PyTorch's.
        exact: whether Winograd, which is less accurate than the direct convolution, is left out.
        following: the convolution into which alone the result goes, if there is one.
        norm: the forward of ``bn`` that normalizes, where its own does more; None for its own.
        trains: whether the batch norm uses the statistics of the batch.
    """

    conv: Any
    bn: Any
    input: Tensor
    residual: Any

    __slots__ = (
        "act",
        "activation",
        "add",
        "bn",
        "checked",
        "conv",
        "exact",
        "following",
        "fresh",
        "input",
        "norm",
        "residual",
        "trains",
        "wants_grad",
    )

    def __init__(
        self,
        conv: Any,
        bn: Any,
        input: Tensor,
        residual: Any = None,
        act: Callable[[Any], Any] | None = None,
        add: Callable[[Any, Any], Any] | None = None,
        fresh: bool = False,
        checked: bool = False,
        following: Any = None,
        exact: bool = False,
        activation: Activation = IDENTITY,
        norm: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self.conv, self.bn, self.input, self.residual = conv, bn, input, residual
        self.act, self.activation, self.add = act, activation, add
        self.fresh, self.checked = fresh, checked
        self.following, self.exact, self.norm = following, exact, norm
        self.trains = bn is not None and (bn.training or bn._buffers.get("running_mean") is None)
        self.wants_grad = torch.is_grad_enabled() and self._needs_grad()

    def _needs_grad(self) -> bool:
        """Whether something that goes in requires a gradient; the parameters of a convolution mostly do."""
        for module in (self.conv, self.bn):
            if module is not None:
                own = module._parameters
                for x in (own.get("weight"), own.get("bias")):
                    if x is not None and x.requires_grad:
                        return True
        residual = self.residual
        return self.input.requires_grad or (isinstance(residual, Tensor) and residual.requires_grad)

    @property
    def dtype(self) -> torch.dtype:
        """What a convolution computes in."""
        own = self.input.dtype
        return own if own == torch.float64 else autocast_dtype(self.input.device.type) or own

    def continue_with(self, output: Tensor) -> None:
        """From now on the convolution is done: it has made ``output``, which nobody else has."""
        self.conv, self.input, self.fresh = None, output, not self.wants_grad

    def key(self) -> tuple[Any, ...]:
        """What the choice of an implementation depends on, on the CPU, but hooks and classes of modules."""
        input, residual, conv, bn = self.input, self.residual, self.conv, self.bn
        key: tuple[Any, ...] = (
            type(input),
            input.shape,
            input.stride(),
            input.dtype,
            self.trains,
            self.wants_grad,
            self.fresh,
            self.activation,
            self.add is None,
            autocast_dtype(),
            torch.get_num_threads(),
            backends.forced(),
            self.exact,
            transformed(),
        )
        if conv is not None:
            own = conv._parameters
            weight, bias = own["weight"], own["bias"]
            key += (
                weight.shape,
                weight.stride(),
                weight.dtype,
                weight.is_cpu,
                None if bias is None else bias.is_cpu,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
            )
        if bn is not None:
            running, own = bn._buffers, bn._parameters
            mean = running.get("running_mean", False)
            key += (
                type(bn),
                _shape(mean),
                _vector_kind(mean),
                _vector_kind(running.get("running_var", False)),
                _vector_kind(own.get("weight", False)),
                _vector_kind(own.get("bias", False)),
            )
        if residual is not None:
            key += _tensor_kind(residual)
        return key

    def residual_fits(self) -> bool:
        """Whether the residual is like the output that the convolution will have."""
        residual, geometry = self.residual, self.geometry()
        return (
            isinstance(residual, Tensor)
            and geometry is not None
            and residual.device == self.input.device
            and residual.dtype == geometry.dtype
            and residual.shape == (geometry.batch, geometry.features, *geometry.output_size)
        )

    def geometry(self) -> Conv | None:
        """The convolution, or None if its padding or input are none that it can have."""
        conv, input = self.conv, self.input
        weight, padding = conv._parameters["weight"], conv.padding
        if input.dim() != 4:
            return None
        if isinstance(padding, str):
            left, right, top, bottom = conv._reversed_padding_repeated_twice
            sides: tuple[int, ...] = (top, left, bottom, right)
        else:
            sides = (*padding, *padding)
        batch, channels, *size = input.shape
        return Conv(
            batch,
            channels,
            tuple(size),
            weight.shape[0],
            conv.kernel_size,
            conv.stride,
            sides,
            conv.dilation,
            conv.groups,
            self.dtype,
            suggests_channels_last(input) or suggests_channels_last(weight),
        )
