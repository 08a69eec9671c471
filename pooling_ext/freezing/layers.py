"""The layers of a frozen model: folded, cast and prepacked weights with the activation in the epilogue.

They are for inference only, hold no parameters, and keep their weights in the layout that the
backend's kernels read. oneDNN's layout is opaque and cannot be pickled, and that of Winograd's weights is the
instruction set's, so a layer travels with plain weights and packs them again on arrival.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_map

from .. import backends
from ..graph.activations import RELU, Activation, kernel_activation
from ..ops.activations import IDENTITY
from ..ops.batch_norm_operators import batch_norm_act_elemt
from . import conv_engines
from .conv_engines import NONE, in_dtype

_mkldnn = torch.ops.mkldnn


class Prepacked(nn.Module):
    """What convolution and linear layers share: weights that are packed when made and when unpickled."""

    weight: Tensor
    bias: Tensor | None
    activation: Activation | None
    packed: bool
    _call: Callable[..., Tensor]

    @property
    def function(self) -> Callable[..., Tensor]:
        """What a call comes to, without the cost of calling a module."""
        return self._call

    @property
    def way(self) -> str:
        """How it runs, in a word."""
        return "prepacked" if self.packed else "PyTorch"

    @property
    def plain_weight(self) -> Tensor:
        """The weight in the order that any operator can read."""
        return self.weight.to_dense() if self.packed else self.weight

    def _pack(self) -> None:
        """Replace the plain ``weight`` by a packed one, if there are kernels for it."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("_call", None)
        state["weight"] = self.plain_weight
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()

    def finish(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """The epilogue by itself; ``y`` is nobody else's."""
        if residual is not None:
            y = y.add_(residual) if _broadcasts_into(residual, y) else y + residual
        return y if self.activation is None else self.activation(y, inplace=True)

    def extra_repr(self) -> str:
        what = [f"{self.weight.shape[1]} to {self.weight.shape[0]}", str(self.weight.dtype)[6:], self.way]
        if self.activation is not None:
            what.append(str(self.activation))
        return ", ".join(what)


def _broadcasts_into(residual: Tensor, y: Tensor) -> bool:
    return residual.shape == y.shape or torch.broadcast_shapes(residual.shape, y.shape) == y.shape


class PackedConv(Prepacked):
    """Convolution of any rank, plain or transposed, with a bias, a residual and an activation.

    It runs in the first way of :data:`conv_engines.ENGINES` that takes it.

    Args:
        weight, bias: folded, on the device and in the dtype to compute in.
        stride, padding, dilation, groups: as torch.nn's; ``padding`` are numbers.
        activation: applied last.
        residual: None, or how to treat the second argument of a call, which is added before the
            activation: "add", or "overwrite" where nobody else reads it afterwards, and the result may take
            its memory.
        input_size: the shape to choose the way and the weights' layout for.
        output_padding: given for a transposed convolution.
        settle: whether it chooses now; otherwise :meth:`settle` has to be called before it runs.

    Attributes:
        left_out: why Winograd's kernels were left out when the model was frozen, or None. It travels with the
            layer, so that a copy elsewhere is no less exact and takes no more memory.
        rejected: the ways that come before the one it runs in, with the reasons against them.
    """

    engine: conv_engines.Engine | None = None
    left_out: str | None
    rejected: list[tuple[str, str]]

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        activation: Activation | None = None,
        residual: str | None = None,
        input_size: Sequence[int] = (),
        output_padding: Sequence[int] | None = None,
        settle: bool = True,
    ):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups = groups
        self.activation, self.residual = activation, residual
        self.input_size = list(input_size)
        self.output_padding = None if output_padding is None else list(output_padding)
        self._fitting: Any = None
        self.packed, self.left_out, self.rejected = False, None, []
        if settle:
            self._pack()

    def settle(self, left_out: str | None) -> None:
        """Choose the way to run, for the first time or again.

        Args:
            left_out: why that may not be Winograd's, from now on; None if it may.
        """
        self.weight, self.packed = self.plain_weight, False
        self.left_out = left_out
        self._pack()

    def resume(self, engine: conv_engines.Engine, left_out: str | None) -> str | None:
        """Run as a layer like this one did before; where that cannot be, choose the way again.

        Args:
            engine: the way that was chosen then.
            left_out: see the attribute.

        Returns:
            Why it cannot be; None where it can.
        """
        self.left_out = left_out
        reason = engine.cannot(self)
        self._pack(engine if reason is None else None)
        return reason

    def _pack(self, chosen: conv_engines.Engine | None = None) -> None:
        self.engine, self.rejected = conv_engines.choose(self, chosen)
        self.weight = self.engine.pack(self)
        self.packed = self.engine is conv_engines.ONEDNN
        self._call = self.engine.bind(self)

    @property
    def in_channels(self) -> int:
        transposed = self.output_padding is not None
        return self.weight.shape[0] if transposed else self.weight.shape[1] * self.groups

    @property
    def way(self) -> str:
        return "not settled" if self.engine is None else self.engine.name

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("engine", "rejected"):  # found again on arrival
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Earlier versions knew no way to leave out.
        super().__setstate__({"left_out": "it was frozen by an earlier version", **state})

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedConv:
        if self.engine is conv_engines.WINOGRAD:
            memo[id(self.weight)] = self.weight  # nobody changes it, and the transformed one belongs to it
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def overwrite_residual(self) -> None:
        """From now on the residual's memory may take the result."""
        self.residual = "overwrite"
        if self.engine is not None:
            self._call = self.engine.bind(self)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        call = self._call
        return call(x) if residual is None else call(x, residual)

    def output_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the (not transposed) convolution of ``x``."""
        sizes = zip(x.shape[2:], self.weight.shape[2:], self.padding, self.stride, self.dilation, strict=True)
        spatial = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, p, s, d in sizes)
        return (x.shape[0], self.weight.shape[0], *spatial)

    def fits(self, x: Tensor, residual: Tensor) -> bool:
        """Whether kernels can add ``residual`` as it is; the answer for the last shapes is remembered."""
        if residual.dtype is not self.weight.dtype:
            return False
        shapes = x.shape, residual.shape
        if not is_compiling() and shapes == self._fitting:
            return True
        fits = residual.shape == self.output_shape(x)
        if fits and not is_compiling():  # a graph for all sizes remembers none
            self._fitting = shapes
        return fits

    def convolution(self, x: Tensor) -> Tensor:
        """PyTorch's, with the bias alone."""
        return torch.convolution(
            in_dtype(x, self.weight.dtype),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.output_padding is not None,
            self.output_padding or [0] * len(self.stride),
            self.groups,
        )

    def extra_repr(self) -> str:
        geometry = f"kernel={tuple(self.weight.shape[2:])}, stride={tuple(self.stride)}"
        residual = "" if self.residual is None else f", residual={self.residual}"
        return f"{super().extra_repr()}, {geometry}{residual}"


class PackedLinear(Prepacked):
    """A linear layer with a bias and an activation.

    Args:
        weight, bias: on the device and in the dtype to compute in.
        activation: applied last.
        rows: how many rows of input to choose the weights' layout for.
    """

    residual = None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None = None, rows: int = 1
    ):
        super().__init__()
        self.weight, self.bias, self.activation, self.rows = weight, bias, activation, rows
        self._pack()

    def _pack(self) -> None:
        weight = self.weight
        self.packed = weight.numel() > 0 and conv_engines.packs(weight.device, weight.dtype)
        if self.packed:
            name, scalars, algorithm = self.activation or NONE
            self.weight = _mkldnn._reorder_linear_weight(weight.contiguous(), self.rows)
            epilogue = self.bias, name, list(scalars), algorithm
            self._call = conv_engines.bound(_mkldnn._linear_pointwise.default, self.weight, epilogue)
        else:
            self._call = self._aten

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)

    def _aten(self, x: Tensor) -> Tensor:
        return self.finish(F.linear(in_dtype(x, self.weight.dtype), self.weight, self.bias))


class FrozenBatchNormAct(nn.Module):
    """Batch normalization by running statistics that could not be folded, with residual and activation.

    Args:
        mean, var, weight, bias, eps: the normalization's.
        activation: one that our kernels have, applied last.
    """

    def __init__(
        self,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        activation: Activation | None,
    ):
        super().__init__()
        self.stats = torch.stack((mean, var)).double()
        self.mean, self.var, self.weight, self.bias = mean, var, weight, bias
        self.eps, self.activation = eps, activation

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "relu" in state:  # of an earlier version
            state = {**state, "activation": RELU if state["relu"] else None}
        super().__setstate__(state)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        fits = residual is None or residual.shape == x.shape
        if fits and backends.choose("batch_norm_act", x) is not backends.ATEN:
            ours = IDENTITY if self.activation is None else kernel_activation(self.activation)
            vectors = self.stats, self.weight, self.bias
            return batch_norm_act_elemt(x, *vectors, residual, self.eps, *ours.arguments)  # type: ignore[union-attr]
        return self.by_pytorch(x, residual)

    def by_pytorch(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same by PyTorch's operators."""
        y = F.batch_norm(x, self.mean, self.var, self.weight, self.bias, eps=self.eps)
        if residual is not None:
            y = y + residual
        return y if self.activation is None else self.activation(y, inplace=True)

    def extra_repr(self) -> str:
        return f"{self.mean.numel()}{'' if self.activation is None else f', {self.activation}'}"


class InPlaceActivation(nn.Module):
    """An activation that overwrites its input, which nobody else reads."""

    def __init__(self, activation: Activation):
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x, inplace=True)

    def extra_repr(self) -> str:
        return str(self.activation)


class Kept(nn.Module):
    """A module that runs as it is, in its own dtype.

    Args:
        own, dtype: the dtype that it computes in, and that of the graph around it.
        contiguous: whether its code looks at memory formats; then it is given contiguous tensors.
    """

    contiguous = False

    def __init__(
        self,
        module: nn.Module,
        own: torch.dtype | None,
        dtype: torch.dtype | None,
        contiguous: bool = False,
    ):
        super().__init__()
        self.module, self.own, self.dtype, self.contiguous = module, own, dtype, contiguous

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.contiguous:
            args, kwargs = tree_map(lambda x: x.contiguous() if isinstance(x, Tensor) else x, (args, kwargs))
        if self.own == self.dtype:
            return self.module(*args, **kwargs)
        args, kwargs = _cast((args, kwargs), self.own)
        return _cast(self.module(*args, **kwargs), self.dtype)


class Call(nn.Module):
    """A call of a function, as a module: torch.fx, which reads graphs back from pickles, leaves those alone.

    Args:
        function: what is called with the arguments of a call of this.
        args, kwargs: its arguments where a call of this has none.
    """

    def __init__(self, function: Callable[..., Any], args: tuple = (), kwargs: dict | None = None):
        super().__init__()
        self.function, self.args, self.kwargs = function, args, kwargs or {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*(args or self.args), **(kwargs or self.kwargs))

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def _cast(tree: Any, dtype: torch.dtype | None) -> Any:
    def one(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    return tree_map(one, tree)
