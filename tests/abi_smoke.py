"""Checks the library against PyTorch's operators in whatever PyTorch runs this script.

`make abi` runs it under another PyTorch than the one the library was built with, which is the
promise of the stable ABI. It needs neither pytest nor an installed package:

    PYTHONPATH=. python tests/abi_smoke.py              # the compiled kernels have to load
    POOLING_EXT_NO_NATIVE=1 python tests/abi_smoke.py --fallback
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

if __package__ in (None, ""):  # run as a script: import the checkout that it lies in
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
SHAPES = {1: (3, 5, 37), 2: (2, 19, 13, 37), 3: (2, 5, 7, 9, 11)}
#: How many roundings to the input's dtype PyTorch's own operators may add up, for the fallback.
ROUNDINGS = {"max_pool": 0, "avg_pool": 8, "lp_pool": 32}
LAYOUTS = ("contiguous", "channels_last", "strided")

MAX = {
    "stem": dict(kernel_size=3, stride=2, padding=1),
    "dilated": dict(kernel_size=2, stride=1, dilation=2),
    "ceil": dict(kernel_size=3, stride=2, ceil_mode=True),
}
AVERAGE = {
    "stem": dict(kernel_size=3, stride=2, padding=1),
    "ceil": dict(kernel_size=3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
}
LP = {
    "l2": dict(norm_type=2, kernel_size=3, stride=2),
    "l3-ceil": dict(norm_type=3, kernel_size=2, ceil_mode=True),
}
ADAPTIVE = {"adaptive": dict(output_size=3), "global": dict(output_size=1)}


def values(rank: int, dtype: torch.dtype, layout: str) -> Tensor | None:
    """Positive values without ties beyond what the dtype forces; None where the rank lacks the layout."""
    shape = SHAPES[rank]
    if layout == "channels_last" and rank == 1:
        return None
    generator = torch.Generator().manual_seed(rank)
    if layout == "strided":
        shape = (*shape[:-1], 2 * shape[-1])
    if dtype.is_floating_point:
        x = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.25
    else:
        x = torch.randint(0, 127, shape, generator=generator)
    x = x.to(dtype)
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last if rank == 2 else torch.channels_last_3d)
    return x[..., ::2] if layout == "strided" else x


def cases() -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Yield ``(kind, name of the function, rank, arguments)``."""
    for rank in SHAPES:
        for kind, options in (("max_pool", MAX), ("avg_pool", AVERAGE), ("lp_pool", LP)):
            for arguments in options.values():
                yield kind, f"{kind}{rank}d", rank, arguments
        for kind, arguments in itertools.product(("max_pool", "avg_pool"), ADAPTIVE.values()):
            yield kind, f"adaptive_{kind}{rank}d", rank, arguments


def check(ours: Callable[..., Any], theirs: Callable[..., Any], x: Tensor, kind: str, native: bool) -> None:
    """Compare values, memory format, indices and gradients.

    The reference runs in float64: low precision is compared with the correctly rounded result, and
    integers too, which PyTorch does not pool everywhere.
    """
    tolerance = ROUNDINGS[kind] * torch.finfo(x.dtype).eps if x.is_floating_point() else 0
    same = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    wide = x.double()
    expected = theirs(wide)
    with torch.no_grad():
        actual = ours(x)
    same(actual, expected.to(x.dtype))
    if native:  # PyTorch's own 3-d average does not keep it
        assert suggest_memory_format(actual) == suggest_memory_format(x), "the memory format was not kept"
    if kind == "max_pool":
        output, indices = ours(x, return_indices=True)
        wide_output, wide_indices = theirs(wide, return_indices=True)
        same(output, wide_output.to(x.dtype))
        same(indices, wide_indices)
    if x.is_floating_point():
        # Small integers make the sums of a max pool's gradient exact in every dtype; one sign, so that
        # nothing cancels in the others'.
        grad = torch.randint(1, 5, expected.shape, generator=torch.Generator().manual_seed(0))
        leaf, wide_leaf = x.detach().requires_grad_(), wide.detach().requires_grad_()
        ours(leaf).backward(grad.to(x.dtype))
        theirs(wide_leaf).backward(grad.double())
        assert leaf.grad is not None and wide_leaf.grad is not None
        same(leaf.grad, wide_leaf.grad.to(x.dtype))


def release(version: str) -> str:
    """``"2.13.0+cpu"`` to ``"2.13.0"``."""
    return version.partition("+")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--fallback", action="store_true", help="expect that the kernels are missing")
    options = parser.parse_args()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import pooling_ext
        import pooling_ext.functional
        from pooling_ext import _native
    told = [w for w in caught if issubclass(w.category, pooling_ext.NativeUnavailableWarning)]

    if options.fallback:
        assert _native.module is None, "the compiled kernels loaded although none were expected"
        assert len(told) == 1, f"expected one NativeUnavailableWarning, but got {len(told)}"
        built, backend, dtypes = None, "aten", (torch.float32, torch.float64)  # PyTorch pools no other in 3-d
    else:
        assert _native.module is not None, f"the compiled kernels did not load: {_native.why_not}"
        assert not told, f"unexpected warning: {told[0].message}"
        built = _native.module.build_torch
        assert release(built) != release(torch.__version__), (
            f"built with {built}: run it under another PyTorch"
        )
        backend, dtypes = "cpu", FLOATS + INTEGERS

    checked = 0
    for (kind, name, rank, arguments), dtype, layout in itertools.product(cases(), dtypes, LAYOUTS):
        x = values(rank, dtype, layout)
        if x is None or (kind != "max_pool" and dtype in INTEGERS):
            continue
        ours = partial(getattr(pooling_ext.functional, name), **arguments)
        theirs = partial(getattr(F, name), **arguments)
        try:
            took = pooling_ext.explain(ours, x)
            assert took.backend == backend, f"expected backend {backend!r}, but got: {took}"
            check(ours, theirs, x, kind, native=not options.fallback)
        except Exception as error:
            print(f"{name}({arguments}) of {dtype}, {layout}, failed", file=sys.stderr)
            raise error
        checked += 1
    library = f"library built with {built}" if built else "without the library"
    print(f"PyTorch {torch.__version__}, {library}: {checked} cases agree with PyTorch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
