"""OpSpec: an operator as data, of which :mod:`pooling_ext.testing.checks` makes every check.

A spec names the public function, its reference, its arguments and how far results may differ. So values,
derivatives, ``torch.func``, ``torch.compile``, ``opcheck``, instruction sets, the stable ABI and GPUs are
checked by the same code for every operator, those of plugins too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
#: A call of a low-level operator: a label, the operator and its arguments.
LowLevelCall = tuple[str, Any, tuple[Any, ...]]

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "offset", "expanded")

#: One rounding of the largest; see OpSpec.off.
ONE_ROUNDING = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}

#: Arguments that have the input's layout.
ACTIVATIONS = ("input", "residual")
#: Arguments that training updates in place.
BUFFERS = ("running_mean", "running_var")


@dataclass(frozen=True)
class OpSpec:
    """One operator.

    Attributes:
        name: the public function's; usable as a test id.
        function: the public function, of ``tensors`` by name and one of ``options``.
        reference: the same of PyTorch's operators, or of :mod:`pooling_ext.testing.reference`; called in
            float64 with the same arguments.
        tensors: makes the arguments that are tensors, for the input's shape and dtype.
        wide: the input's shape where values are compared: whole vectors of every instruction set, and tails.
        small: the input's shape for derivatives by differences, and for kernels that are interpreted.
        options: sets of the other arguments, by name.
        dtypes: of the input.
        exact: the reference's values, rounded, are the operator's to the last bit.
        scale: multiplies the tolerance of outputs; see :mod:`pooling_ext.testing.tolerances`.
        gradient_scale: multiplies that of gradients, which are sums of more terms.
        off: how far, beyond that, any element may be off, as a part of the largest, for each of the input's
            dtypes: where terms of sums are rounded before they are added.
        fast: compare derivatives along one random direction, where there are too many arguments for all.
        autocast: it runs in autocast's dtype, and as PyTorch's own on meta tensors: a convolution.
        changes_in_programs: compiled or exported, it may have PyTorch's operators, whose sums
            have another order.
        keeps_format: the output has the input's memory format.
        takes_unbatched: the input may be one sample, without a batch.
        low_level: yields calls of the low-level operators that belong to it, for ``opcheck``.
    """

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    tensors: Callable[[Sequence[int], torch.dtype], Tensors]
    wide: tuple[int, ...]
    small: tuple[int, ...]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    dtypes: tuple[torch.dtype, ...] = FLOATS
    exact: bool = False
    scale: float = 2.0
    gradient_scale: float = 2.0
    off: Mapping[torch.dtype, float] = field(default_factory=dict)
    fast: bool = False
    autocast: bool = False
    changes_in_programs: bool = False
    keeps_format: bool = True
    takes_unbatched: bool = False
    low_level: Callable[[], Iterable[LowLevelCall]] = tuple

    def cases(self) -> Iterator[OpCase]:
        """The operator with each set of options."""
        return (OpCase(self, name, dict(options)) for name, options in self.options.items())

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class OpCase:
    """An operator with one set of options."""

    spec: OpSpec
    label: str
    options: dict[str, Any]

    def tensors(
        self, shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", buffers: bool = True
    ) -> Tensors:
        """Arguments for the input's ``shape``.

        Args:
            shape: of the input.
            dtype: of the input.
            layout: of the input and the residual, one of :data:`LAYOUTS`.
            buffers: also what training updates in place, which ``torch.func`` refuses.
        """
        made = self.spec.tensors(shape, dtype)
        keep = buffers or not self.options.get("training", False)
        return {
            name: with_layout(x, layout) if name in ACTIVATIONS else x
            for name, x in made.items()
            if keep or name not in BUFFERS
        }

    def ours(self, **tensors: Tensor | None) -> Any:
        """The operator's result."""
        return self.spec.function(**tensors, **self.options)

    def theirs(self, **tensors: Tensor | None) -> Any:
        """The reference's result."""
        return self.spec.reference(**tensors, **self.options)

    def __str__(self) -> str:
        return f"{self.spec}-{self.label}" if self.label else self.spec.name


def cases(specs: Iterable[OpSpec]) -> list[OpCase]:
    """Every operator with each set of its options."""
    return [case for spec in specs for case in spec.cases()]


def differentiable(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of the arguments that have gradients."""
    return tuple(name for name, x in tensors.items() if x.is_floating_point() and name not in BUFFERS)


def first(result: Any) -> Tensor:
    """The output, without the indices that may come with it."""
    return result[0] if isinstance(result, (tuple, list)) else result


def levels(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Multiples of 1/32 (in integers of 1) that every dtype has, without 0 in floating point.

    Up to 145 elements differ from each other, so that no small step changes which is the largest. They lie
    so far apart that batch norm in 16 bits keeps their order.
    """
    values = torch.randperm(math.prod(shape)).reshape(tuple(shape)) % 145 - 72
    if dtype == torch.uint8:
        values = values + 72
    return ((values.double() + 0.5) / 32).to(dtype) if dtype.is_floating_point else values.to(dtype)


def positive(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The magnitudes of :func:`levels`, moved away from 0."""
    return levels(shape, dtype).abs() + 0.5


def with_layout(x: Tensor, layout: str) -> Tensor:
    """A tensor equal to ``x`` (batched) with other strides.

    "channels_last" is PyTorch's memory format of that name in 2-d and 3-d, and ``(N, L, C)`` in 1-d.
    "expanded" repeats the first sample with stride 0, so its values differ from ``x``'s.
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "offset":
        # One element past an aligned address, where a vector load must not assume alignment.
        return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    raise AssertionError(layout)
