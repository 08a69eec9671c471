"""Pooling geometry: from the arguments users write to the windows that kernels walk.

Every operator of the library describes its windows with one :class:`Windows`. The output-size rule
is PyTorch's (``aten/src/ATen/native/Pool.h``): with ``ceil_mode`` a last window that would start
in the trailing padding is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch.compiler import is_compiling

from .arguments import as_bool, as_int
from .errors import ArgumentError
from .exporting import least, most

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
    def is_global(self) -> bool:
        """Whether this is one window over the whole input."""
        return self.adaptive and all(_is_known(count == 1) for count in self.output_size)

    @property
    def full(self) -> Windows:
        """These windows with nothing left out."""
        rank = len(self.output_size)
        return self._replace(
            stride=self.stride or self.kernel_size,
            padding=self.padding or (0, 0) * rank,
            dilation=self.dilation or (1,) * rank,
        )

    @property
    def flat(self) -> Windows:
        """These windows over lines as windows over planes of one row."""
        output_size, kernel_size, stride, padding, dilation = self
        return Windows(
            (1, *output_size),
            (1, *kernel_size) if kernel_size else (),
            (1, *stride) if stride else (),
            (0, 0, *padding) if padding else (),
            (1, *dilation) if dilation else (),
        )

    def ceil_mode(self, sizes: Ints) -> bool | None:
        """The ``ceil_mode`` with which PyTorch makes these windows; None when its padding cannot."""
        _, kernel_size, strides, padding, dilations = self.full
        before, after = padding[::2], padding[1::2]
        half = tuple((d * (k - 1) + 1) // 2 for k, d in zip(kernel_size, dilations, strict=True))
        if not all(map(_is_known, (a == b for a, b in zip(before, after, strict=True)))):
            return None
        if not all(map(_is_known, (pad <= most for pad, most in zip(before, half, strict=True)))):
            return None
        floor = tuple(
            _output_size(size, kernel, stride, pad, pad, dilation, False)
            for size, kernel, stride, pad, dilation in zip(
                sizes, kernel_size, strides, before, dilations, strict=True
            )
        )
        # Of a size that is a symbol, the two are known to be the same where they were computed alike.
        return not all(map(_is_known, (a == b for a, b in zip(floor, self.output_size, strict=True))))

    def has_empty(self, sizes: Ints) -> bool:
        """Whether a window has no element of the input in it (dilation can step over a small one)."""
        output_size, kernel_size, strides, padding, dilations = self.full
        if is_compiling():  # sizes may be symbols
            return any(dilation > 1 and pad for dilation, pad in zip(dilations, padding[::2], strict=True))
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
            pads += [before, positive_part(end - sizes[axis])]
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


def _is_known(fact: Any) -> bool:
    """Whether something is true; of symbols, whether it is for all that they may be."""
    if not is_compiling():
        return bool(fact)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # which imports SymPy

    return statically_known_true(fact)


def positive_part(number: Any) -> Any:
    """A number or 0, whichever is larger; it may be a symbol."""
    return most(number, 0)


#: What is remembered by its value. Anything else (a list, NumPy's numbers, a tensor, which may change) is
#: read in each call.
_PLAIN = frozenset((int, bool, str, type(None)))
_ITEMS = frozenset((int, type(None)))
_LARGEST = 2**63 - 1
_USUAL_STRIDE = 1024


def _are_plain(arguments: Sequence[Any]) -> bool:
    for value in arguments:
        if isinstance(value, tuple):
            if not _ITEMS.issuperset(map(type, value)):
                return False
        elif type(value) not in _PLAIN:
            return False
    return True


def _cached(make):
    """Remember the windows of recent calls: making them costs more than a small kernel.

    Under torch.compile the function is traced instead.
    """

    @lru_cache(maxsize=1024, typed=True)
    def remember(rank: int, shape: Ints, *arguments) -> tuple[Windows, bool]:
        if not _are_plain(arguments):
            raise TypeError("not to be remembered")
        return make(rank, shape, *arguments), any(isinstance(value, tuple) for value in arguments)

    def windows(rank: int, shape: Ints, *arguments) -> Windows:
        if is_compiling():
            return make(rank, shape, *arguments)
        try:
            found, has_tuples = remember(rank, shape, *arguments)
        except TypeError:  # an argument cannot be remembered, or has the wrong type
            return make(rank, shape, *arguments)
        # To the cache (2.0, True) is (2, 1).
        if has_tuples and not _are_plain(arguments):
            return make(rank, shape, *arguments)
        return found

    return windows


def _items(value: Any) -> tuple[Any, ...] | None:
    """What a sequence consists of; None for anything else."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else None


def _int_list(items: tuple[Any, ...], value: Any, name: str, rank: int, low: int) -> Ints:
    """``items`` of the argument ``value`` as ints of at least ``low``."""
    found = []
    for i, item in enumerate(items):
        # As PyTorch has it, the first item tells whether these are ints.
        number = item if type(item) is int else as_int(item, booleans=i > 0)
        if number is None:
            raise TypeError(
                f"{name} must be an int or a tuple of {rank} ints, but got {value!r} ({type(item).__name__})"
            )
        found.append(number)
    if any(type(number) is int and number > _LARGEST for number in found):
        raise ArgumentError(f"{name} must be less than 2 ** 63, but got {value!r}")
    if any(number < low for number in found):
        allowed = "greater than zero" if low == 1 else "non-negative"
        raise ArgumentError(f"{name} must be {allowed}, but got {value!r}")
    return tuple(found)


def _ints(value: Any, name: str, rank: int, low: int) -> Ints:
    """Expand an int, or a sequence of 1 or ``rank`` ints, to ``rank`` ints of at least ``low``."""
    items = _items(value)
    found = _int_list((value,) if items is None else items, value, name, rank, low)
    if len(found) == 1:
        found *= rank
    if len(found) != rank:
        raise ArgumentError(f"{name} must be an int or a tuple of {rank} ints, but got {value!r}")
    return found


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
            total = positive_part((size - 1) // step * step + extra + 1 - size)
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
    # Upwards without negative numbers, which ONNX divides the other way.
    count = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if not ceil_mode:
        return count
    # A last window must not start in the trailing padding.
    return least(count, (size + before - 1) // stride + 1)


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
    as_bool(ceil_mode, "ceil_mode")
    sizes = _spatial_sizes(rank, shape)
    pads = _padding(padding, rank, sizes, kernel, step, spread)
    output = tuple(
        _output_size(sizes[i], kernel[i], step[i], pads[2 * i], pads[2 * i + 1], spread[i], ceil_mode)
        for i in range(rank)
    )
    # Beyond the padded input and a window a stride is as good as any other, and kernels need not be told of a
    # huge one.
    step = tuple(
        min(step[i], sizes[i] + pads[2 * i] + pads[2 * i + 1] + spread[i] * kernel[i])
        if step[i] > _USUAL_STRIDE
        else step[i]
        for i in range(rank)
    )
    spread = tuple(1 if k == 1 else d for k, d in zip(kernel, spread, strict=True))
    if any(count < 1 for count in output):
        raise ArgumentError(
            f"Output size is too small: input of size {list(shape)} with kernel_size={kernel}, "
            f"stride={step}, padding={padding!r} and dilation={spread} gives output size {list(output)}"
        )
    if is_compiling():  # symbols tell nothing, and AOTInductor takes no empty lists
        return Windows(output, kernel, step, pads, spread)
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
    if output_size is None:
        return Windows(sizes, (), (), (), ())
    items = _items(output_size)
    if items is None and getattr(output_size, "ndim", 0) == 1:  # an array's or a tensor's elements
        items = tuple(output_size.tolist())
    if items is None:
        return Windows(_ints(output_size, "output_size", rank, 0), (), (), (), ())
    if len(items) != rank:
        known = tuple(1 if item is None and rank > 1 else item for item in items)
        _int_list(known, output_size, "output_size", rank, 0)  # a wrong type is the first to be told
        raise ArgumentError(f"output_size must be an int or a tuple of {rank} ints, but got {output_size!r}")
    wanted = tuple(size if item is None else item for size, item in zip(sizes, items, strict=True))
    return Windows(_int_list(wanted, output_size, "output_size", rank, 0), (), (), (), ())


@_cached
def global_windows(rank: int, shape: Ints) -> Windows:
    """One window over each whole plane."""
    _spatial_sizes(rank, shape)
    return Windows((1,) * rank, (), (), (), ())
