"""The convolutions of :mod:`pooling_ext.ops.conv` as CUDA kernels, which take a tile to work in.

They are operators of their own: where there are Triton's kernels too a tuner compares them on the same
tensors (:mod:`pooling_ext.ops.conv_autotune`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from .. import backends
from ..backends import cuda_library
from . import _library
from .conv import (
    GEOMETRY,
    bias_act_fake,
    check_conv,
    check_like,
    check_norm,
    stats_fake,
)

_bias_act = _library.define(
    f"conv_bias_act_cuda(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {GEOMETRY}, "
    "bool relu, int tile)",
    "Tensor",
    bias_act_fake,
    vmap=False,
)

_stats = _library.define(
    "conv_stats_cuda(Tensor input, Tensor weight, Tensor? bias, Tensor? stats, Tensor? bn_weight, "
    f"Tensor? bn_bias, float eps, bool relu, {GEOMETRY}, int tile)",
    "(Tensor, Tensor)",
    stats_fake,
    vmap=False,
)


def tiles(input: Tensor, weight: Tensor, geometry: Sequence[Sequence[int]]) -> Iterator[tuple[str, int]]:
    """The name and number of each tile worth trying for a convolution; none where there are no kernels.

    Nor on a GPU that they are not for, unless the backend was asked for.

    Args:
        geometry: stride, padding and dilation.
    """
    if not backends.offers(backends.CUDA, "conv_bias_act", input):
        return
    if backends.forced() != backends.CUDA.name and not cuda_library.convolves_on(input.device):
        return
    found = check_conv(input, weight, None, *geometry)
    pixels = found.batch * found.output_size[0] * found.output_size[1]
    known = cuda_library.conv_tiles()
    for number, tile in enumerate(known):
        # The last is for what is read element by element, and the smallest.
        if number + 1 < len(known) and (
            found.channels * input.element_size() % 16
            or tile.pixels >= 2 * pixels
            or tile.channels >= 2 * found.features
        ):
            continue
        step = 64 // input.element_size()
        yield f"{tile.pixels}x{tile.channels}x{step}, {tile.stages} stages", number


def conv_bias_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
    tile: int,
) -> Tensor:
    """``relu(conv(input, weight) + bias + residual)``, rounded once; bias and residual are optional.

    Args:
        input: ``(N, C, H, W)``, float32, bfloat16 or float16; any strides, but channels_last is not copied.
        weight: ``(O, C, KH, KW)`` of its dtype; likewise.
        bias: ``(O,)`` of any floating-point dtype.
        residual: of the output's shape and the input's dtype; likewise.
        stride: for height and width, as ``padding`` and ``dilation``.
        tile: of ``cuda_library.conv_tiles()``; the last where 16 bytes of channels cannot be read at once.

    Returns:
        ``(N, O, H_out, W_out)`` in channels_last.

    Raises:
        ArgumentError: an argument does not go with the others.
    """
    found = check_conv(input, weight, bias, stride, padding, dilation)
    if residual is not None:
        check_like("residual", residual, found.output_shape, "input", input)
    return _bias_act(input, weight, bias, residual, stride, padding, dilation, relu, tile)


def conv_stats(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stats: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    relu: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    tile: int,
) -> tuple[Tensor, Tensor]:
    """``conv(input, weight) + bias`` and its statistics.

    With ``stats`` it is the convolution of
    ``batch_norm_act_elemt(input, stats, bn_weight, bn_bias, None, eps, relu)``, which is not stored.

    Args:
        input, weight, bias, stride, padding, dilation, tile: as for :func:`conv_bias_act`.
        stats: ``(2, C)`` float64: means and variances with which the input is to be normalized.
        bn_weight, bn_bias: ``(C,)`` or None for ones and zeros.

    Returns:
        ``(N, O, H_out, W_out)`` in channels_last; and float64 ``(2, O)``: means and biased variances of what
        is stored there (zeros for an empty batch).

    Raises:
        ArgumentError: an argument does not go with the others.
    """
    found = check_conv(input, weight, bias, stride, padding, dilation)
    if stats is not None:
        check_norm(stats, bn_weight, bn_bias, found.channels)
    return _stats(input, weight, bias, stats, bn_weight, bn_bias, eps, relu, stride, padding, dilation, tile)
