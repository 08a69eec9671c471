"""Max, average and Lp pools of fixed, adaptive and global windows, in 1, 2 and 3 dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor

import pooling_ext.functional as F

from ...backends import cpu_library
from ...windows import adaptive_windows, fixed_windows, global_windows
from ..opspec import FLOATS, INTEGERS, LowLevelCall, OpSpec, Tensors, levels, positive

#: Enough channels and columns to reach the CPU kernels' vector loops, and their tails.
WIDE = {1: (2, 37, 75), 2: (2, 37, 5, 38), 3: (2, 37, 3, 4, 21)}
SMALL = {1: (2, 2, 7), 2: (2, 2, 5, 4), 3: (2, 2, 3, 4, 3)}

MAX: dict[str, dict[str, Any]] = {
    "stem": {"kernel_size": 3, "stride": 2, "padding": 1},
    "indices": {"kernel_size": 3, "stride": 2, "padding": 1, "return_indices": True},
    "2x2": {"kernel_size": 2},
    "3x3": {"kernel_size": 3, "stride": 1, "padding": 1},
    "dilated": {"kernel_size": 2, "stride": 1, "dilation": 2},
    "ceil": {"kernel_size": 2, "stride": 3, "ceil_mode": True, "return_indices": True},
    "same": {"kernel_size": 2, "stride": 1, "padding": "same"},
}
AVERAGE: dict[str, dict[str, Any]] = {
    "stem": {"kernel_size": 3, "stride": 2, "padding": 1},
    "2x2": {"kernel_size": 2},
    "3x3": {"kernel_size": 3, "stride": 1, "padding": 1},
    "ceil": {"kernel_size": 2, "ceil_mode": True},
    "no-pad-counted": {
        "kernel_size": 2,
        "stride": 2,
        "padding": 1,
        "ceil_mode": True,
        "count_include_pad": False,
    },
    "same": {"kernel_size": 2, "stride": 1, "padding": "same"},
}
#: Left, right, top and bottom, for images alone.
PER_SIDE: dict[str, dict[str, Any]] = {"per-side": {"kernel_size": 3, "stride": 2, "padding": (1, 0, 2, 1)}}
ADAPTIVE: dict[str, dict[str, Any]] = {"uneven": {"output_size": 2}, "one": {"output_size": 1}}
ADAPTIVE_MAX = ADAPTIVE | {"indices": {"output_size": 3, "return_indices": True}}
LP: dict[str, dict[str, Any]] = {
    "p1": {"norm_type": 1, "kernel_size": 2},
    "p2": {"norm_type": 2, "kernel_size": 3, "stride": 2, "ceil_mode": True},
    "p3": {"norm_type": 3, "kernel_size": 2, "stride": 1},
    "p2.5": {"norm_type": 2.5, "kernel_size": 2},
}
# Older versions of PyTorch give 1 for a norm that is infinite.
if TF.lp_pool1d(torch.tensor([[[3.0, 2.0]]]), math.inf, 2).item() == 3.0:
    LP["inf"] = {"norm_type": math.inf, "kernel_size": 2}
SAFE: dict[str, dict[str, Any]] = {
    f"{name}-safe": options | {"safe": True} for name, options in LP.items() if name != "inf"
}


def one(values: Callable[[Sequence[int], torch.dtype], Tensor]) -> Callable[..., Tensors]:
    """The arguments of an operator of one tensor."""
    return lambda shape, dtype: {"input": values(shape, dtype)}


def max_pool(input: Tensor, kernel_size: int, padding: Any = 0, **options: Any) -> Any:
    """PyTorch's, behind a padding of its own where it has none like that."""
    if not isinstance(padding, int):
        input, padding = _padded(input, kernel_size, padding, -math.inf), 0
    return getattr(TF, f"max_pool{input.dim() - 2}d")(input, kernel_size, padding=padding, **options)


def avg_pool(input: Tensor, kernel_size: int, padding: Any = 0, **options: Any) -> Any:
    """As :func:`max_pool`."""
    if not isinstance(padding, int):
        input, padding = _padded(input, kernel_size, padding, 0.0), 0
    return getattr(TF, f"avg_pool{input.dim() - 2}d")(input, kernel_size, padding=padding, **options)


def _padded(input: Tensor, kernel_size: int, padding: Any, value: float) -> Tensor:
    """Each side by its own number; "same" for as many windows of stride 1 as elements, the odd one last."""
    if padding == "same":
        missing = kernel_size - 1
        padding = [missing // 2, missing - missing // 2] * (input.dim() - 2)
    return TF.pad(input, list(padding), value=value)


def lp_pool(input: Tensor, norm_type: float, kernel_size: int, safe: bool = False, **options: Any) -> Tensor:
    """PyTorch's, of magnitudes where that is asked for."""
    pool = getattr(TF, f"lp_pool{input.dim() - 2}d")
    return pool(input.abs() if safe else input, norm_type, kernel_size, **options)


def _global_avg(input: Tensor, keepdim: bool = True) -> Tensor:
    return input.mean((2, 3), keepdim=keepdim)


def _global_lp(input: Tensor, norm_type: float, safe: bool = False) -> Tensor:
    return TF.lp_pool2d(input.abs() if safe else input, norm_type, (input.shape[2], input.shape[3]))


#: Of global pools.
SHAPES: dict[str, dict[str, Any]] = {"planes": {}, "flat": {"keepdim": False}}


def _global_max(input: Tensor, keepdim: bool = True) -> Tensor:
    output = TF.adaptive_max_pool2d(input, 1)
    return output if keepdim else output.flatten(1)


def _pools(rank: int) -> Iterator[OpSpec]:
    def spec(name: str, reference: Callable[..., Any], values: Any, options: Any, **others: Any) -> OpSpec:
        function = getattr(F, name)
        shapes = WIDE[rank], SMALL[rank]
        return OpSpec(
            name, function, reference, one(values), *shapes, options, takes_unbatched=True, **others
        )

    integers = {"dtypes": FLOATS + INTEGERS, "exact": True}
    calls, more = (_low_level, PER_SIDE) if rank == 2 else (tuple, {})
    yield spec(f"max_pool{rank}d", max_pool, levels, MAX | more, **integers, low_level=calls)
    yield spec(f"avg_pool{rank}d", avg_pool, levels, AVERAGE | more)
    # The gradient goes through several operators in the input's dtype.
    yield spec(f"lp_pool{rank}d", lp_pool, positive, LP, gradient_scale=8.0)
    yield spec(f"lp_pool{rank}d", lp_pool, levels, SAFE, gradient_scale=8.0)
    theirs = getattr(TF, f"adaptive_max_pool{rank}d")
    yield spec(f"adaptive_max_pool{rank}d", theirs, levels, ADAPTIVE_MAX, **integers)
    yield spec(f"adaptive_avg_pool{rank}d", getattr(TF, f"adaptive_avg_pool{rank}d"), levels, ADAPTIVE)


def _global(name: str, reference: Callable[..., Any], values: Any, **others: Any) -> OpSpec:
    return OpSpec(name, getattr(F, name), reference, one(values), (2, 37, 5, 38), (2, 2, 3, 4), **others)


def _low_level() -> Iterator[LowLevelCall]:
    """Every low-level pool, with windows as they lie."""
    ops, x = torch.ops.pooling_ext, torch.rand(2, 3, 7, 8)
    fixed = fixed_windows(2, x.shape, 3, 2, (1, 0, 1, 1), 1, True)
    for windows in (fixed, adaptive_windows(2, x.shape, fixed.output_size)):
        kind = "adaptive" if windows.adaptive else "fixed"
        yield f"max_pool-{kind}", ops.max_pool, (x, *windows)
        grad = torch.rand(2, 3, *fixed.output_size)
        for indices in (False, True):
            label = f"{kind}-{'indices' if indices else 'offsets'}"
            yield f"max_pool_with_offsets-{label}", ops.max_pool_with_offsets, (x, *windows, indices)
            if cpu_library.module is not None:
                _, offsets = ops.max_pool_with_offsets(x, *windows, indices)
                yield f"max_pool_gather-{label}", ops.max_pool_gather, (x, offsets, *windows)
                yield f"max_pool_backward-{label}", ops.max_pool_backward, (grad, offsets, x.shape, *windows)
        yield f"avg_pool-{kind}", ops.avg_pool, (x, *windows, True, None)
        back = (grad, x.shape, False, *windows, True, None)
        yield f"avg_pool_backward-{kind}", ops.avg_pool_backward, back
    yield "avg_pool-divisor", ops.avg_pool, (x, *fixed, False, 3)
    yield "lp_pool-fixed", ops.lp_pool, (x, *fixed, 2, False)
    yield "lp_pool-global", ops.lp_pool, (x, *global_windows(2, x.shape), 3, True)
    line, cube = torch.rand(2, 3, 9), torch.rand(3, 4, 5, 6)
    yield "max_pool-1d", ops.max_pool, (line, *fixed_windows(1, line.shape, 3, 2, 1, 2, False))
    windows = fixed_windows(3, cube.shape, 2, 1, 0, 1, False)
    yield "avg_pool-3d-unbatched", ops.avg_pool, (cube, *windows, True, None)


SPECS: tuple[OpSpec, ...] = (
    *(spec for rank in (1, 2, 3) for spec in _pools(rank)),
    _global("global_max_pool2d", _global_max, levels, options=SHAPES, dtypes=FLOATS + INTEGERS, exact=True),
    _global("global_avg_pool2d", _global_avg, levels, options=SHAPES),
    _global("global_lp_pool2d", _global_lp, positive, options={"p2": {"norm_type": 2}}, gradient_scale=8.0),
    _global(
        "global_lp_pool2d",
        _global_lp,
        levels,
        options={"p3-safe": {"norm_type": 3, "safe": True}},
        changes_in_programs=True,
        gradient_scale=8.0,
    ),
)
