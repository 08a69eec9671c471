"""Windows that reach or step far beyond the input: results are PyTorch's, and take no longer than others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from helpers import (
    POOLING_BACKENDS,
    assert_same,
    here,
    integers,
    interpreted,
    our_op,
    windows_of,
    with_layout,
)
from torch import Tensor

import pooling_ext.functional as F
from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close

FAR = 2**28
#: Of two dimensions a window has more elements than 32 bits count, of three fewer than 64 bits do.
LONG = 2**17

STEPS: dict[str, dict[str, Any]] = {
    "stride": dict(kernel_size=2, stride=FAR),
    "stride-padding": dict(kernel_size=3, stride=FAR, padding=1),
    "stride-ceil": dict(kernel_size=2, stride=FAR, ceil_mode=True),
    "stride-two": dict(kernel_size=2, stride=7),  # two windows, which is as far as they can be apart
}
SIZES: dict[str, dict[str, Any]] = {
    "kernel-ceil": dict(kernel_size=LONG, ceil_mode=True),
    "kernel-padding": dict(kernel_size=LONG, padding=LONG // 2),
    "kernel-padding-stride": dict(kernel_size=LONG, padding=LONG // 2, stride=2),
}
#: Of which PyTorch takes only the last, with a step that is longer still.
DILATIONS: dict[str, dict[str, Any]] = {
    "dilation": dict(kernel_size=3, stride=1, padding=FAR, dilation=FAR),
    "dilation-stride": dict(kernel_size=3, stride=3, padding=FAR, dilation=FAR),
    "dilation-kernel": dict(kernel_size=2**10 + 1, stride=2, padding=2**19, dilation=2**10),
    "dilation-ceil": dict(kernel_size=2, stride=4 * FAR, dilation=FAR, ceil_mode=True),
}
#: Many small planes are pooled in blocks, few in rows, channels_last by pixels.
SHAPES = {
    1: ((7, 10, 9), (2, 1, 75)),
    2: ((7, 11, 9, 9), (1, 2, 9, 75), (2, 37, 9, 11)),
    3: ((2, 3, 9, 8, 9),),
}
LAYOUTS = {1: ("contiguous",), 2: ("contiguous", "channels_last"), 3: ("contiguous", "channels_last")}


def cases(*kinds: str, **sets: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("kind", "rank", "arguments"),
        [
            pytest.param(kind, rank, arguments, id=f"{kind}{rank}d-{name}")
            for kind in kinds
            for rank in SHAPES
            for name, arguments in sets.items()
            # PyTorch refuses these.
            if not (kind == "lp_pool" and "padding" in arguments)
            if not (kind != "max_pool" and rank == 3 and name in SIZES)
        ],
    )


#: Triton's kernels count elements and offsets in 32 bits, which these sums and dilations go beyond.
NOT_TRITON = pytest.mark.parametrize(
    "backend", ["cpu", "cuda", pytest.param("cuda-cuda", marks=pytest.mark.gpu)], indirect=True
)
all_pools = cases("max_pool", "avg_pool", "lp_pool", **STEPS, **SIZES)
dilated = cases("max_pool", **DILATIONS)


def inputs(rank: int) -> list[Tensor]:
    """Whole numbers, so that maxima have ties and sums are exact."""
    return [
        with_layout(integers(shape, torch.float32, 0, 8), layout)
        for shape in SHAPES[rank]
        for layout in LAYOUTS[rank]
    ]


def call(function: Callable[..., Any], kind: str, x: Tensor, arguments: dict[str, Any]) -> Any:
    return function(x, 2, **arguments) if kind == "lp_pool" else function(x, **arguments)


@POOLING_BACKENDS
@cases("max_pool", "avg_pool", "lp_pool", **STEPS)
def test_steps_as_pytorch(backend, kind, rank, arguments):
    check_as_pytorch(backend, kind, rank, arguments)


@POOLING_BACKENDS
@cases("max_pool", **SIZES)
def test_maxima_as_pytorch(backend, kind, rank, arguments):
    check_as_pytorch(backend, kind, rank, arguments)


@NOT_TRITON
@cases("avg_pool", "lp_pool", **SIZES)
def test_sums_as_pytorch(backend, kind, rank, arguments):
    check_as_pytorch(backend, kind, rank, arguments)


def check_as_pytorch(backend: str, kind: str, rank: int, arguments: dict[str, Any]) -> None:
    theirs, ours = getattr(TF, f"{kind}{rank}d"), our_op(f"{kind}{rank}d")
    given = inputs(rank)
    for x in [given[0][:1, :2, ..., :5]] if interpreted(backend) else given:
        x = here(x)
        leaf, other = x.clone().requires_grad_(), x.double().requires_grad_()
        output, expected = call(ours, kind, leaf, arguments), call(theirs, kind, other, arguments)
        grad = torch.arange(1.0, 1 + output.numel()).view(output.shape)
        output.backward(grad)
        expected.backward(grad.double())
        with torch.no_grad():
            alone = call(ours, kind, x, arguments)
        assert_close(alone, expected)
        assert_close(output, expected)
        assert_close(leaf.grad, other.grad, scale=4)
        if kind != "max_pool":
            continue
        indexed, indices = ours(x.clone().requires_grad_(), **arguments, return_indices=True)
        wanted, wanted_indices = theirs(x.double(), **arguments, return_indices=True)
        assert_close(indexed, wanted, exact=True)
        assert_same(indices, wanted_indices)


@NOT_TRITON
@dilated
def test_dilated(backend, kind, rank, arguments):
    """As the reference has it."""
    ours = our_op(f"{kind}{rank}d")
    x = integers((*SHAPES[rank][0][:2], *(9, 8, 7)[:rank]), torch.float32)
    windows = windows_of(f"{kind}{rank}d", x, **arguments)
    expected, indices = reference.max_pool(x, windows)
    for layout in LAYOUTS[rank]:
        leaf = here(with_layout(x, layout)).clone().requires_grad_()
        output, where = ours(leaf, **arguments, return_indices=True)
        assert_same(output, here(expected.float()), check_strides=False)
        assert_same(where, here(indices), check_strides=False)
        output = ours(leaf, **arguments)
        grad = torch.arange(1.0, 1 + output.numel()).view(output.shape)
        output.backward(grad)
        assert_close(leaf.grad, here(reference.max_pool_backward(grad.cpu(), indices, x.shape[2:])))


@pytest.mark.native
@pytest.mark.timing
@all_pools
def test_at_once(kind, rank, arguments):
    """Nothing is made for each step of a stride, or for each element of a window, beyond the input."""
    check_time(kind, rank, arguments)


@pytest.mark.native
@pytest.mark.timing
@dilated
def test_dilated_at_once(kind, rank, arguments):
    check_time(kind, rank, arguments)


def check_time(kind: str, rank: int, arguments: dict[str, Any]) -> None:
    pool = our_op(f"{kind}{rank}d")
    for x in inputs(rank):
        leaf = x.requires_grad_()
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            call(pool, kind, leaf, arguments).sum().backward()
            best = min(best, time.perf_counter() - start)
        assert best < 0.05, f"{tuple(x.shape)}: {best:.3f} s"


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float64])
def test_every_dtype(dtype):
    x = integers((3, 5, 9, 75), dtype, 0, 8)
    for arguments in (STEPS["stride"], SIZES["kernel-ceil"], DILATIONS["dilation-ceil"]):
        output, indices = F.max_pool2d(x, **arguments, return_indices=True)
        wanted, wanted_indices = TF.max_pool2d(x.double(), **arguments, return_indices=True)
        assert_same(output, wanted.to(dtype))
        assert_same(indices, wanted_indices)


@pytest.mark.native
def test_padding_of_one_side():
    """Each window's last element alone is inside, at the end of what PyTorch's padding cannot say."""
    x = integers((2, 3, 9), torch.float32)
    output, indices = F.max_pool1d(x, 2, 4, padding=(FAR, 0), dilation=FAR, return_indices=True)
    assert torch.equal(output, x[..., ::4])
    assert torch.equal(indices, torch.arange(0, 9, 4).expand(2, 3, 3))


@pytest.mark.native
@pytest.mark.parametrize("layout", LAYOUTS[2])
def test_the_stem(layout):
    x = with_layout(integers((2, 37, 9, 11), torch.float32), layout)
    mean, var = torch.zeros(37), torch.ones(37)
    leaf, other = x.clone().requires_grad_(), x.double().requires_grad_()
    output = F.batch_norm_relu_max_pool(leaf, mean, var, kernel_size=2, stride=FAR, padding=0, eps=0.0)
    expected = TF.max_pool2d(TF.relu(other), 2, FAR)
    assert_close(output, expected)
    output.sum().backward()
    expected.sum().backward()
    assert_close(leaf.grad, other.grad)
