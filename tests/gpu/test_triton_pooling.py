"""What only large inputs reach in the Triton kernels of pooling, brought about with small ones."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import FLOATS, assert_same, dtype_id, gradient, with_layout

import pooling_ext.functional as F
from pooling_ext.testing import reference
from pooling_ext.testing.tolerances import assert_close
from pooling_ext.windows import fixed_windows, global_windows

TRITON = pytest.mark.parametrize(
    "backend", ["triton", pytest.param("triton-cuda", marks=pytest.mark.gpu)], indirect=True
)
KERNELS = pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@pytest.fixture
def geometry():
    """The module, whose memory of tilings is empty before and after."""
    from pooling_ext.triton.pool import geometry

    geometry.tiling.cache_clear()
    geometry._geometry.cache_clear()
    yield geometry
    geometry.tiling.cache_clear()
    geometry._geometry.cache_clear()


@TRITON
@KERNELS
@LAYOUTS
def test_strips_of_tiles(backend, layout, name, geometry, monkeypatch):
    """One program for several tiles below one another, the last of them partly outside."""
    x = with_layout(torch.randn(1, 3, 29, 7, dtype=torch.float64), layout)
    monkeypatch.setattr(geometry, "TILE_BYTES", 256)
    pool = getattr(F, name)
    apart = gradient(lambda x: pool(x, 3, 2, 1), x)
    geometry.tiling.cache_clear()
    monkeypatch.setattr(geometry, "ENOUGH_PROGRAMS", 1)
    assert geometry.tiling(3, 15, 4, 1, 8, 203).strip > 1
    geometry.tiling.cache_clear()
    assert_same(gradient(lambda x: pool(x, 3, 2, 1), x), apart)


@TRITON
@KERNELS
@LAYOUTS
@pytest.mark.parametrize("kernel", [3, (1, 40)], ids=["unrolled", "loop"])
def test_offsets_of_64_bits(backend, kernel, layout, name, geometry, monkeypatch):
    """An item of 2 ** 31 elements or more, or what says it is."""
    x = with_layout(torch.randn(1, 2, 5, 41, dtype=torch.float64), layout)
    pool = getattr(F, name)
    narrow = gradient(lambda x: pool(x, kernel, 2), x)
    monkeypatch.setattr(geometry.PoolGeometry, "wide", True)
    assert_same(gradient(lambda x: pool(x, kernel, 2), x), narrow)


@TRITON
@LAYOUTS
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32], ids=dtype_id)
def test_planes_in_parts(backend, dtype, layout):
    """Planes that several programs share: ties between parts go to the first, NaN to the last."""
    x = torch.randint(-4, 4, (1, 4, 48, 50)).to(dtype)
    if dtype.is_floating_point:
        x[0, 1, 3, 3] = x[0, 1, 47, 49] = x[0, 2, 0, 0] = math.nan
        x[0, 3] = -math.inf
    x = with_layout(x, layout)
    expected, indices = reference.max_pool(x, global_windows(2, x.shape))
    output, found = F.adaptive_max_pool2d(x, 1, return_indices=True)
    assert_close(output, expected, exact=True)
    assert torch.equal(found, indices)
    assert_close(F.global_max_pool2d(x), expected, exact=True)
    if dtype.is_floating_point:
        assert_close(F.global_avg_pool2d(x), reference.avg_pool(x, global_windows(2, x.shape)), scale=2)


@TRITON
@LAYOUTS
def test_many_cells_and_few(backend, layout):
    """Strides beyond what is unrolled, and larger than the windows."""
    x = with_layout(torch.randn(2, 3, 13, 17, dtype=torch.float64), layout)
    for arguments in ((2, 7, 1), ((2, 1), (3, 4), 0), ((5, 7), 5, 2)):
        windows = fixed_windows(2, x.shape, *arguments, 1, False)
        output, grad = gradient(lambda x, arguments=arguments: F.max_pool2d(x, *arguments), x)
        expected, indices = reference.max_pool(x, windows)
        assert_close(output, expected, exact=True)
        ones = torch.ones_like(output)
        assert_close(grad, reference.max_pool_backward(ones, indices, (13, 17)), exact=True)
        output, grad = gradient(lambda x, arguments=arguments: F.avg_pool2d(x, *arguments), x)
        assert_close(output, reference.avg_pool(x, windows))
        assert_close(grad, reference.avg_pool_backward(ones, (13, 17), windows))
