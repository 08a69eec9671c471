"""Pooling geometry: from the arguments users write to the windows that kernels walk.

Every operator of the library describes its windows with one :class:`Windows`. The output-size rule
is PyTorch's (``aten/src/ATen/native/Pool.h``): with ``ceil_mode`` a last window that would start
in the trailing padding is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from .errors import ArgumentError

Ints = tuple[int, ...]


class Windows(NamedTuple):
    """Where the windows of a pooling operator lie, outermost spatial axis first.

    ``padding`` holds ``(before, after)`` for each axis in turn. An empty ``stride`` stands for
    ``kernel_size``, an empty ``padding`` for zeros and an empty ``dilation`` for ones: what operators
    are not told they need not parse. An empty ``kernel_size`` means adaptive windows: output ``o``
    of ``n`` covers ``[floor(o * size / n), ceil((o + 1) * size / n))``.
    """

    output_size: Ints
    kernel_size: Ints
    stride: Ints
    padding: Ints
    dilation: Ints

    @property
    def adaptive(self) -> bool:
        return not self.kernel_size

    @property
    def full(self) -> Windows:
        """These windows with nothing left out."""
        rank = len(self.output_size)
        return self._replace(
            stride=self.stride or self.kernel_size,
            padding=self.padding or (0, 0) * rank,
            dilation=self.dilation or (1,) * rank,
        )

    def ceil_mode(self, sizes: Ints) -> bool | None:
        """The ``ceil_mode`` with which PyTorch makes these windows; None when its padding cannot."""
        _, kernel_size, strides, padding, dilations = self.full
        before, after = padding[::2], padding[1::2]
        half = tuple((d * (k - 1) + 1) // 2 for k, d in zip(kernel_size, dilations, strict=True))
        if before != after or any(pad > most for pad, most in zip(before, half, strict=True)):
            return None
        floor = tuple(
            _output_size(size, kernel, stride, pad, pad, dilation, False)
            for size, kernel, stride, pad, dilation in zip(
                sizes, kernel_size, strides, before, dilations, strict=True
            )
        )
        return floor != self.output_size

    def has_empty(self, sizes: Ints) -> bool:
        """Whether a window has no element of the input in it (dilation can step over a small one)."""
        output_size, kernel_size, strides, padding, dilations = self.full
        return any(
            (first := max(0, -((o * stride - pad) // dilation))) >= kernel
            or o * stride - pad + dilation * first >= size
            for size, out, kernel, stride, pad, dilation in zip(
                sizes, output_size, kernel_size, strides, padding[::2], dilations, strict=True
            )
            if dilation > 1 and pad
            for o in range(out)
        )

    def explicit_padding(self, sizes: Ints) -> list[int]:
        """What torch.nn.functional.pad must add so that unpadded windows are these."""
        output_size, kernel_size, strides, padding, dilations = self.full
        pads: list[int] = []
        for axis in reversed(range(len(sizes))):
            before = padding[2 * axis]
            end = (output_size[axis] - 1) * strides[axis] - before
            end += dilations[axis] * (kernel_size[axis] - 1) + 1
            pads += [before, max(end - sizes[axis], 0)]
        return pads

    def counts(self, sizes: Ints, count_include_pad: bool) -> list[list[int]]:
        """For each axis, how many elements each window averages over."""
        output_size, kernel_size, strides, padding, _ = self.full
        counts = []
        for axis, size in enumerate(sizes):
            before, after = padding[2 * axis : 2 * axis + 2]
            low, high = (-before, size + after) if count_include_pad else (0, size)
            starts = [o * strides[axis] - before for o in range(output_size[axis])]
            ends = [min(start + kernel_size[axis], high) for start in starts]
            counts.append([end - max(start, low) for start, end in zip(starts, ends, strict=True)])
        return counts


def _cached(make):
    """Remember the windows of recent calls: making them costs more than a small kernel.

    Under torch.compile the function is traced instead, and arguments that cannot be hashed (lists,
    symbolic sizes) go straight through.
    """
    remember = lru_cache(maxsize=1024, typed=True)(make)

    def windows(rank: int, shape: Ints, *arguments) -> Windows:
        if is_compiling():
            return make(rank, shape, *arguments)
        try:
            return remember(rank, shape, *arguments)
        except TypeError:
            return make(rank, shape, *arguments)

    return windows


def _ints(value: Any, name: str, rank: int, low: int) -> Ints:
    """Expand an int, or a sequence of 1 or ``rank`` ints, to ``rank`` ints of at least ``low``."""
    items: tuple[Any, ...] = (
        tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    )
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (int, torch.SymInt)):
            raise TypeError(
                f"{name} must be an int or a tuple of {rank} ints, but got {value!r} ({type(item).__name__})"
            )
    if len(items) == 1:
        items *= rank
    if len(items) != rank:
        raise ArgumentError(f"{name} must be an int or a tuple of {rank} ints, but got {value!r}")
    if any(item < low for item in items):
        allowed = "greater than zero" if low == 1 else "non-negative"
        raise ArgumentError(f"{name} must be {allowed}, but got {value!r}")
    return items


def _padding(value: Any, rank: int, sizes: Ints, kernel_size: Ints, stride: Ints, dilation: Ints) -> Ints:
    """Expand ``padding`` to ``(before, after)`` per axis, outermost axis first."""
    reach = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    if isinstance(value, str):
        if value == "valid":
            return (0, 0) * rank
        if value != "same":
            raise ArgumentError(f"padding must be an int, a tuple, 'same' or 'valid', but got {value!r}")
        pairs = []
        for size, step, extra in zip(sizes, stride, reach, strict=True):
            total = max((-(-size // step) - 1) * step + extra + 1 - size, 0)
            pairs += [total // 2, total - total // 2]
        return tuple(pairs)
    if isinstance(value, Sequence) and len(value) == 2 * rank:
        sides = _ints(value, "padding", 2 * rank, 0)
        # Written innermost axis first, as torch.nn.functional.pad takes it.
        pairs = [side for axis in reversed(range(rank)) for side in sides[2 * axis : 2 * axis + 2]]
        if any(pad > reach[i // 2] for i, pad in enumerate(pairs)):
            raise ArgumentError(
                "padding must be smaller than the effective kernel size on every side, "
                f"but got padding={value!r} with kernel_size={kernel_size} and dilation={dilation}"
            )
        return tuple(pairs)
    amounts = _ints(value, "padding", rank, 0)
    if any(pad > (extra + 1) // 2 for pad, extra in zip(amounts, reach, strict=True)):
        raise ArgumentError(
            "padding should be at most half of effective kernel size, "
            f"but got padding={value!r}, kernel_size={kernel_size} and dilation={dilation}"
        )
    return tuple(pad for amount in amounts for pad in (amount, amount))


def _spatial_sizes(rank: int, shape: Ints, may_be_zero: int = 0) -> Ints:
    """Check an input shape, batched or not, and return its spatial sizes.

    A batch may be empty; ``may_be_zero`` says how many leading dimensions may be besides.
    """
    if len(shape) not in (rank + 1, rank + 2):
        raise ArgumentError(
            f"Expected {rank + 1}D or {rank + 2}D (batch mode) tensor for input, "
            f"but got input of size {list(shape)}"
        )
    if any(size == 0 for size in shape[max(len(shape) - rank - 1, may_be_zero) :]):
        raise ArgumentError(
            "Expected input to have non-zero size for non-batch dimensions, "
            f"but got input of size {list(shape)}"
        )
    return tuple(shape[-rank:])


def _output_size(size, kernel, stride, before, after, dilation, ceil_mode):
    span = size + before + after - dilation * (kernel - 1) - 1
    count = (-(-span // stride) if ceil_mode else span // stride) + 1
    if ceil_mode and (count - 1) * stride >= size + before:
        count -= 1
    return count


def adaptive_kernel(size: int, out: int) -> int:
    """An upper bound of the adaptive windows' size along an axis, exact where they are all the same."""
    return 1 if out == 0 else size // out if size % out == 0 else size // out + 2


@_cached
def fixed_windows(rank: int, shape: Ints, kernel_size, stride, padding, dilation, ceil_mode: bool) -> Windows:
    """Windows of fixed size, as in :func:`torch.nn.functional.max_pool2d`.

    Raises:
        TypeError: an argument is not made of ints, or ``ceil_mode`` is not a bool.
        ArgumentError: an argument or the input's shape is out of range.
    """
    kernel = _ints(kernel_size, "kernel_size", rank, 1)
    no_stride = stride is None or (isinstance(stride, Sequence) and len(stride) == 0)
    step = kernel if no_stride else _ints(stride, "stride", rank, 1)
    spread = _ints(dilation, "dilation", rank, 1)
    if not isinstance(ceil_mode, (bool, int)):
        raise TypeError(f"ceil_mode must be a bool, but got {ceil_mode!r}")
    sizes = _spatial_sizes(rank, shape)
    pads = _padding(padding, rank, sizes, kernel, step, spread)
    output = tuple(
        _output_size(sizes[i], kernel[i], step[i], pads[2 * i], pads[2 * i + 1], spread[i], ceil_mode)
        for i in range(rank)
    )
    if any(count < 1 for count in output):
        raise ArgumentError(
            f"Output size is too small: input of size {list(shape)} with kernel_size={kernel}, "
            f"stride={step}, padding={padding!r} and dilation={spread} gives output size {list(output)}"
        )
    return Windows(
        output,
        kernel,
        () if step == kernel else step,
        pads if any(pads) else (),
        spread if any(d != 1 for d in spread) else (),
    )


@_cached
def adaptive_windows(rank: int, shape: Ints, output_size, zero_channels: bool = False) -> Windows:
    """Windows that split the input into ``output_size`` parts; ``None`` keeps an axis as it is.

    As in PyTorch the first dimension may be of size 0, and with ``zero_channels`` the channels.

    Raises:
        TypeError: ``output_size`` is not made of ints.
        ArgumentError: ``output_size`` or the input's shape is out of range.
    """
    sizes = _spatial_sizes(rank, shape, len(shape) - rank if zero_channels else 1)
    if isinstance(output_size, Sequence) and len(output_size) == rank:
        output_size = tuple(sizes[i] if want is None else want for i, want in enumerate(output_size))
    elif output_size is None:
        output_size = sizes
    return Windows(_ints(output_size, "output_size", rank, 0), (), (), (), ())


@_cached
def global_windows(rank: int, shape: Ints) -> Windows:
    """One window over each whole plane."""
    _spatial_sizes(rank, shape)
    return Windows((1,) * rank, (), (), (), ())
