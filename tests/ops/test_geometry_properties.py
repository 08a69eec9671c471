"""Random geometry, layout and dtype against PyTorch, and against the reference for what PyTorch lacks.

Inputs are whole numbers, so maxima are exact and sums too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers import (
    BACKENDS,
    FLOATS,
    INTEGERS,
    LAYOUTS,
    NATIVE,
    assert_same,
    gradient,
    has_empty_window,
    in_format_of,
    integers,
    our_op,
    strides,
    torch_op,
    windows_of,
    with_layout,
)
from torch import Tensor

pytest.importorskip("hypothesis")
from hypothesis import assume, event, given, note, settings
from hypothesis import strategies as st

from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close
from pooling_ext.windows import adaptive_windows

pytestmark = pytest.mark.usefixtures("one_thread")

#: What PyTorch has for every rank; without the compiled kernels there is no more.
AVERAGED = FLOATS if NATIVE else (torch.float32, torch.float64)


#: Every test of this file, by its name: strategies and body.
SWEEPS: dict[str, tuple[Any, Any]] = {}
#: Whether kernels are interpreted, which takes a second for a few thousand elements.
small = False


def sweep(*strategies):
    """hypothesis.given, which remembers the test for other backends."""

    def decorate(body):
        SWEEPS[body.__name__] = strategies, body
        return given(*strategies)(body)

    return decorate


class Case(NamedTuple):
    rank: int
    input: Tensor
    arguments: dict[str, Any]


@st.composite
def inputs(draw, dtypes, low=-8, high=8, rank=None) -> tuple[int, Tensor]:
    """A rank and an input of that rank, batched or not, in a random layout."""
    rank = draw(st.integers(1, 3)) if rank is None else rank
    # Now and then wide enough for several vectors and a tail.
    widest = draw(st.sampled_from([4, 9] if small else [4, 9, 40, 75]))
    sizes = [draw(st.integers(1, 6 if rank == 3 else 9)) for _ in range(rank - 1)] + [
        draw(st.integers(1, widest))
    ]
    batch = draw(st.integers(1, 2 if small else 3))
    channels = draw(st.sampled_from([1, 2, 3, 5] if small else [1, 2, 3, 8, 17, 35]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(dtypes))
    x = with_layout(integers((batch, channels, *sizes), dtype, low, high), draw(st.sampled_from(LAYOUTS)))
    if draw(st.integers(0, 4)) == 0:
        x = x[0]
    note(f"{dtype} {list(x.shape)} strides {x.stride()}")
    return rank, x


def per_axis(draw, rank: int, values) -> Any:
    """A number for each axis, or one for all."""
    return draw(values) if draw(st.booleans()) else tuple(draw(values) for _ in range(rank))


def axes(value: Any, rank: int) -> tuple[int, ...]:
    return (value,) * rank if isinstance(value, int) else value


@st.composite
def cases(draw, dtypes, dilated=False, low=-8, high=8, beyond=False, padded=True) -> Case:
    """Arguments that are valid for ``input``, symmetric padding or (``beyond``) what PyTorch lacks."""
    rank, x = draw(inputs(dtypes, low, high))
    kernel = per_axis(draw, rank, st.integers(1, 5))
    stride = draw(st.none()) if draw(st.integers(0, 3)) == 0 else per_axis(draw, rank, st.integers(1, 4))
    arguments = {"kernel_size": kernel, "stride": stride, "ceil_mode": draw(st.booleans())}
    dilation = per_axis(draw, rank, st.integers(1, 3)) if dilated else 1
    if dilated:
        arguments["dilation"] = dilation
    reach = [d * (k - 1) for k, d in zip(axes(kernel, rank), axes(dilation, rank), strict=True)]
    if beyond:
        sides = tuple(draw(st.integers(0, extra)) for extra in reversed(reach) for _ in range(2))
        arguments["padding"] = draw(st.sampled_from(["same", "valid", sides]))
    elif padded:
        # PyTorch allows half the effective kernel size in some operators, half the kernel in others.
        most = [min((extra + 1) // 2, k // 2) for extra, k in zip(reach, axes(kernel, rank), strict=True)]
        arguments["padding"] = tuple(draw(st.integers(0, pad)) for pad in most)
    note(str(arguments))
    try:
        windows_of(f"max_pool{rank}d", x, **arguments)
    except ValueError as error:
        assert "Output size is too small" in str(error)
        assume(False)
    return Case(rank, x, arguments)


def grad_like(draw_from: Tensor) -> Tensor:
    return integers(draw_from.shape, draw_from.dtype)


@sweep(cases(FLOATS, dilated=True))
def test_max_pool(case):
    rank, x, arguments = case
    name = f"max_pool{rank}d"
    empty = has_empty_window(name, x, **arguments)
    event(f"window without elements: {empty}")
    ours, indices = our_op(name)(x, **arguments, return_indices=True)
    plain = our_op(name)(x, **arguments)
    assert_same(plain, ours, check_strides=rank > 1)
    theirs, their_indices = torch_op(name)(x, **arguments, return_indices=True)
    assert_same(ours, theirs, check_strides=rank == 2)
    grad = grad_like(ours)
    _, ours_grad = gradient(lambda x: our_op(name)(x, **arguments), x, grad)
    _, indexed_grad = gradient(lambda x: our_op(name)(x, **arguments, return_indices=True), x, grad)
    windows = windows_of(name, x, **arguments)
    if empty:
        # PyTorch's backward writes out of bounds here, so the reference has to do.
        _, their_indices = reference.max_pool(x, windows)
    assert torch.equal(indices, their_indices)
    expected = reference.max_pool_backward(grad, indices, tuple(x.shape[-rank:]))
    assert_close(ours_grad, expected, exact=True)
    assert_close(indexed_grad, expected, exact=True)
    if not empty:
        _, theirs_grad = gradient(lambda x: torch_op(name)(x, **arguments), x.double(), grad.double())
        assert_close(ours_grad, theirs_grad, exact=True)


@sweep(cases(INTEGERS, dilated=True))
def test_max_pool_of_integers(case):
    rank, x, arguments = case
    name = f"max_pool{rank}d"
    expected, expected_indices = reference.max_pool(x, windows_of(name, x, **arguments))
    ours, indices = our_op(name)(x, **arguments, return_indices=True)
    assert_close(ours, expected, exact=True)
    assert ours.dtype == x.dtype
    assert torch.equal(indices, expected_indices)
    assert torch.equal(our_op(name)(x, **arguments), ours)


def refused(rank: int, x: Tensor, arguments: dict[str, Any]) -> bool:
    """PyTorch's avg_pool3d takes no window larger than the input, even where padding makes room for it."""
    sizes = zip(axes(arguments["kernel_size"], rank), x.shape[-rank:], strict=True)
    return rank == 3 and any(kernel > size for kernel, size in sizes)


@sweep(cases(AVERAGED), st.booleans(), st.sampled_from([None, None, 1, 2, 3, -4, 7]))
def test_avg_pool(case, count_include_pad, divisor):
    rank, x, arguments = case
    assume(not refused(*case))
    name = f"avg_pool{rank}d"
    arguments["count_include_pad"] = count_include_pad
    if rank > 1:
        arguments["divisor_override"] = divisor
    ours = our_op(name)(x, **arguments)
    theirs = torch_op(name)(x.double(), **arguments)
    assert_close(ours, theirs)
    if NATIVE:
        assert rank == 1 or strides(ours) == strides(in_format_of(x, ours))
    grad = grad_like(ours)
    _, ours_grad = gradient(lambda x: our_op(name)(x, **arguments), x, grad)
    _, theirs_grad = gradient(lambda x: torch_op(name)(x, **arguments), x.double(), grad.double())
    assert_close(ours_grad, theirs_grad, scale=2)


@sweep(cases(AVERAGED, low=1, high=6, padded=False), st.sampled_from([1, 2, 3, 4]), st.booleans())
def test_lp_pool(case, norm, safe):
    rank, x, arguments = case
    assume(not refused(*case))
    name = f"lp_pool{rank}d"
    if not NATIVE and not safe:
        x = x.double()
    ours = our_op(name)(x, norm, **arguments, safe=safe)
    if rank == 1:
        # PyTorch's lp_pool1d takes no tuple.
        (arguments["kernel_size"],) = axes(arguments["kernel_size"], 1)
    theirs, theirs_grad = gradient(lambda x: torch_op(name)(x, norm, **arguments), x.double())
    assert_close(ours, theirs)
    _, ours_grad = gradient(lambda x: our_op(name)(x, norm, **arguments, safe=safe), x)
    # The gradient goes through several operators in the input's dtype.
    assert_close(ours_grad, theirs_grad, scale=16)


@st.composite
def adaptive_cases(draw, dtypes) -> tuple[int, Tensor, Any]:
    rank, x = draw(inputs(dtypes))
    one = st.one_of(st.none(), st.integers(1, 8))
    out = draw(st.integers(1, 8)) if draw(st.booleans()) else tuple(draw(one) for _ in range(rank))
    note(f"output_size {out}")
    # PyTorch's 1-d operators do not take None.
    return (
        rank,
        x,
        tuple(x.shape[-1] if n is None else n for n in out) if rank == 1 and isinstance(out, tuple) else out,
    )


@sweep(adaptive_cases(FLOATS))
def test_adaptive_max_pool(case):
    rank, x, out = case
    name = f"adaptive_max_pool{rank}d"
    theirs = torch_op(name)(x, out, return_indices=True)
    ours = our_op(name)(x, out, return_indices=True)
    assert_same(ours, theirs, check_strides=False)
    assert rank == 1 or strides(ours[0]) == strides(in_format_of(x, ours[0])) or not NATIVE
    assert_same(our_op(name)(x, out), theirs[0], check_strides=False)
    grad = grad_like(ours[0])
    _, ours_grad = gradient(lambda x: our_op(name)(x, out), x, grad)
    _, theirs_grad = gradient(lambda x: torch_op(name)(x, out), x.double(), grad.double())
    assert_close(ours_grad, theirs_grad, exact=True)


@sweep(adaptive_cases(AVERAGED))
def test_adaptive_avg_pool(case):
    rank, x, out = case
    name = f"adaptive_avg_pool{rank}d"
    ours = our_op(name)(x, out)
    assert_close(ours, torch_op(name)(x.double(), out))
    assert rank == 1 or strides(ours) == strides(in_format_of(x, ours)) or not NATIVE
    grad = grad_like(ours)
    _, ours_grad = gradient(lambda x: our_op(name)(x, out), x, grad)
    expected = reference.avg_pool_backward(grad, tuple(x.shape[-rank:]), adaptive_windows(rank, x.shape, out))
    assert_close(ours_grad, expected, scale=2)


@sweep(cases(FLOATS, dilated=True, beyond=True))
def test_max_pool_beyond_pytorch(case):
    rank, x, arguments = case
    name = f"max_pool{rank}d"
    expected, expected_indices = reference.max_pool(x, windows_of(name, x, **arguments))
    ours, indices = our_op(name)(x, **arguments, return_indices=True)
    assert_close(ours, expected, exact=True)
    assert torch.equal(indices, expected_indices)
    grad = grad_like(ours)
    _, ours_grad = gradient(lambda x: our_op(name)(x, **arguments), x, grad)
    assert_close(ours_grad, reference.max_pool_backward(grad, indices, tuple(x.shape[-rank:])), exact=True)


@sweep(cases(AVERAGED, beyond=True), st.booleans(), st.sampled_from([None, None, 1, -4, 7]))
def test_avg_pool_beyond_pytorch(case, count_include_pad, divisor):
    rank, x, arguments = case
    name = f"avg_pool{rank}d"
    windows = windows_of(name, x, **arguments)
    arguments["count_include_pad"] = count_include_pad
    if rank > 1:
        arguments["divisor_override"] = divisor
    else:
        divisor = None
    ours = our_op(name)(x, **arguments)
    assert_close(ours, reference.avg_pool(x, windows, count_include_pad, divisor))
    grad = grad_like(ours)
    _, ours_grad = gradient(lambda x: our_op(name)(x, **arguments), x, grad)
    sizes = tuple(x.shape[-rank:])
    expected = reference.avg_pool_backward(grad, sizes, windows, count_include_pad, divisor)
    assert_close(ours_grad, expected, scale=2)


@sweep(cases(AVERAGED, low=1, high=6, beyond=True), st.sampled_from([1, 2, 3]))
def test_lp_pool_beyond_pytorch(case, norm):
    rank, x, arguments = case
    name = f"lp_pool{rank}d"
    ours = our_op(name)(x, norm, **arguments, safe=True)
    assert_close(ours, reference.lp_pool(x, norm, windows_of(name, x, **arguments)), scale=2)


@BACKENDS
@pytest.mark.parametrize("name", SWEEPS)
def test_on_backend(backend, name, monkeypatch):
    """The tests above, a few cases of each."""
    strategies, body = SWEEPS[name]
    monkeypatch.setitem(globals(), "small", backend == "triton")
    settings(max_examples=4)(given(*strategies)(body))()
