"""Which convolutions of the CPU are done here: by Winograd, depthwise, of images, or as matrix products.

All are asked with what is known before a convolution runs, so that functions, modules, patched and frozen
models decide alike. No answer depends on the number of threads: results of Winograd's differ from those of
the direct convolution in their last bits.

``POOLING_EXT_WINOGRAD=0`` in the environment leaves Winograd out, as does ``exact=True`` of patch and freeze.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from ..backends import cpu_library
from ..exporting import are_known, constant_in_graphs
from . import conv_speeds
from .conv_shape import LEAST_CHANNELS, Conv, has_winograd_kernel

#: What a convolution is in training: each is decided for itself.
FORWARD, INPUT_GRAD, WEIGHT_GRAD = PHASES = ("forward", "input gradient", "weight gradient")

DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
#: Depthwise kernels are square.
KERNEL_SIZES = (3, 5, 7)
STRIDES = (1, 2)
#: Where there are more, oneDNN fills its vectors well enough.
MOST_IMAGE_CHANNELS = 4
#: With fewer tiles than this, a transformed weight of more bytes than a second-level cache has makes
#: Winograd slower than the direct convolution: it is four times as large, and reading it takes longer than
#: the arithmetic that is saved. 512 channels at 7x7 in a batch of 1 (4 tiles, 38 MB) run at 1.5 times the
#: speed of oneDNN's prepacked convolution.
FEWEST_TILES, SMALL_WEIGHT = 4, 2 << 20
#: With fewer multiplications of the direct way, some 20 us of a core, to ask takes longer than it gains;
#: for those who ask at every call.
LEAST_WORK = 1 << 20
#: The smallest planes of a dilated convolution's phases that are worth it: those where Winograd's way has so
#: many times fewer multiplications. (28x28 in phases of 2x3 pixels, with 1.4 times fewer, run at 0.7 times
#: oneDNN's speed.)
LEAST_SAVED = 2.0
#: The libraries that make products, and PyTorch's convolutions of images, are not equally good on every
#: vendor's processors, so that what was measured on another one has to show a gain beyond doubt.
ELSEWHERE_MARGIN = 1.15

SWITCHED_OFF = os.environ.get("POOLING_EXT_WINOGRAD") == "0"
_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
_most = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
#: Whether oneDNN multiplies bfloat16 matrices by instructions of their own.
HAS_AMX = bool(_amx is not None and _amx()) and (_most in ("", "ALL", "DEFAULT") or "AMX" in _most)


def _has_fast_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 faster than float32: by AMX, or by AMD's dot products.

    Intel's take as long for a product of bfloat16 as for two of float32.
    """
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if HAS_AMX or supported is None or not supported():
        return HAS_AMX
    try:
        with open("/proc/cpuinfo") as lines:  # long where there are many cores; its first lines have it
            return not any("GenuineIntel" in line for line in islice(lines, 8))
    except OSError:
        return True


HAS_FAST_BFLOAT16 = _has_fast_bfloat16()


#: The attribute of a class of ours that names the one of torch.nn whose place it takes.
STANDS_FOR = "_pooling_ext_stands_for"


def stands_for(module: Any) -> type:
    """The class of ``module``, or the one of torch.nn in whose place it is."""
    cls = type(module)
    return cls.__dict__.get(STANDS_FOR, cls)


def stands_for_conv2d(module: Any) -> bool:
    """Whether the class of ``module`` is torch.nn's Conv2d, or ours in its place."""
    return stands_for(module) is nn.Conv2d


def winograd_cannot(conv: Conv, phase: str = FORWARD) -> str | None:
    """Why Winograd's kernels cannot do a phase of a convolution here, fast or not; None if they can.

    Args:
        phase: of :data:`PHASES`.
    """
    # What mostly decides comes first.
    if not has_winograd_kernel(conv.kernel):
        return _because("the kernel is {}, not 3x3, 5x5 or a row of 3 or 7", _by(conv.kernel))
    strided = conv.stride[-2:] != (1, 1)
    if strided and conv.kernel[-2:] != (3, 3):
        return _because("the stride is {} and the kernel {}, not 3x3", _by(conv.stride), _by(conv.kernel))
    if strided:
        if conv.stride[-2:] != (2, 2):
            return _because("the stride is {}, not 1 or 2", _by(conv.stride))
        if conv.dilation[-2:] != (1, 1):
            return _because("the stride is {} and the dilation {}", _by(conv.stride), _by(conv.dilation))
    if phase == INPUT_GRAD:
        if strided and not all(before % 2 for before, _ in conv.sides[-2:]):
            return _because("the stride is 2 and the padding {}, which is not odd", conv.padding)
        if conv.rank == 3 and conv.stride[0] != 1:
            return _because("the stride of planes is {}, not 1", conv.stride[0])
    least = min(conv.channels, conv.features) // conv.groups
    if least < LEAST_CHANNELS:
        return _because("a group has {} channels, which fill no vector of {}", least, LEAST_CHANNELS)
    if cpu_library.module is None:
        return _because("there are no compiled kernels: {}", cpu_library.why_not)
    if SWITCHED_OFF:
        return "POOLING_EXT_WINOGRAD=0"
    if conv.dtype not in DTYPES:
        return _because("the dtype is {}", conv.dtype)
    if min(conv.padding) < 0:
        return "the padding is negative"
    if min(conv.output_size) < 1:
        return "the kernel does not fit the input"
    return None


def winograd_why_not(conv: Conv, phase: str = FORWARD) -> str | None:
    """Why Winograd's kernels should not do a phase of a convolution, or None if they should.

    That is, why they cannot, or are known to be slower than PyTorch's.

    Args:
        phase: of :data:`PHASES`.
    """
    reason = winograd_cannot(conv, phase)
    if reason is not None:
        return reason
    if conv.dtype == torch.bfloat16 and HAS_AMX:
        return "the processor has AMX, with which oneDNN's bfloat16 is faster"
    is_usual = conv.stride[-2:] == (1, 1) and conv.kernel[-2:] == (3, 3)
    saved = LEAST_SAVED if conv.dilation[-2:] != (1, 1) else 1.0
    if conv.work <= saved * conv.winograd_work:
        planes = _by(conv.output_size)
        return _because("planes of {} leave so much of a tile empty that it saves nothing", planes)
    if conv.tiles < FEWEST_TILES and conv.winograd_bytes > SMALL_WEIGHT:
        return _because(
            "its transformed weight of {} MiB would be read for {} tiles",
            conv.winograd_bytes >> 20,
            conv.tiles,
        )
    if is_compiling() and not _has_known_sizes(conv):
        return None if is_usual else "the sizes are symbols"
    return _why_slower(WINOGRAD, conv, phase) or (None if is_usual else _why_not_measured(conv, phase))


def call_why_not(kernels: str, conv: Conv, phases: Sequence[str]) -> str | None:
    """Why a call should do none of some phases by our kernels, or None.

    Args:
        kernels: of :data:`WHY_NOT`.
    """
    if kernels != DEPTHWISE and conv.work < LEAST_WORK:
        return _because("{} multiplications are fewer than {}", conv.work, LEAST_WORK)
    alone = tuple(phases) == (FORWARD,)
    reasons = [phase_why_not(kernels, conv, phase, alone) for phase in phases]
    return None if None in reasons else reasons[0]


def phase_why_not(kernels: str, conv: Conv, phase: str, alone: bool = False) -> str | None:
    """Why a phase of a call should not be done by our kernels, beside what that takes for the weight.

    In training it is transformed at each call; without gradients (``alone``) a transformed weight is kept,
    and a call reads the weight to see that it is the same.
    """
    reason = WHY_NOT[kernels](conv, phase)
    if reason is not None or kernels != WINOGRAD or not conv_speeds.weights_count:
        return reason
    if is_compiling() and not _has_known_sizes(conv):
        return None
    found = _speedup(WINOGRAD, conv, phase)
    if phase != FORWARD and found is not None and found[1]:
        return None  # which was measured with the transform
    if conv_speeds.saved(conv, found) > (conv_speeds.look(conv) if alone else conv_speeds.transform(conv)):
        return None
    return f"it would save no more time than {'a look at' if alone else 'the transform of'} its weight takes"


def depthwise_cannot(conv: Conv) -> str | None:
    """Why the depthwise kernels cannot do a convolution here, fast or not; None if they can."""
    if conv.groups != conv.channels:
        return "a group of it is more than one channel"
    if conv.features != conv.channels:
        return _because("it makes {} channels of {}", conv.features, conv.channels)
    if conv.rank != 2:
        return "it is 3-d"
    if conv.kernel[0] != conv.kernel[1] or conv.kernel[0] not in KERNEL_SIZES:
        return _because("its kernel is {}, not 3x3, 5x5 or 7x7", _by(conv.kernel))
    if not set(conv.stride) <= set(STRIDES):
        return _because("its stride is {}, not 1 or 2", _by(conv.stride))
    return _direct_cannot(conv)


def _direct_cannot(conv: Conv) -> str | None:
    """What the depthwise kernels and those for images refuse alike."""
    if conv.dilation != (1, 1):
        return _because("its dilation is {}, not 1", _by(conv.dilation))
    if not conv.is_symmetric or min(conv.padding) < 0:
        return _because("its padding is {}, not the same on opposite sides", conv.padding)
    if cpu_library.module is None:
        return _because("there are no compiled kernels: {}", cpu_library.why_not)
    if conv.dtype not in DTYPES:
        return _because("the dtype is {}", conv.dtype)
    if min(conv.output_size) < 1:
        return "its kernel does not fit the input"
    return None


def depthwise_why_not(conv: Conv, phase: str = FORWARD) -> str | None:
    """Why the depthwise kernels should not do a phase of a convolution, or None if they should.

    That is, why they cannot, or are known to be slower than PyTorch's.

    Args:
        phase: of :data:`PHASES`.
    """
    reason = depthwise_cannot(conv)
    if reason is not None:
        return reason
    if phase == FORWARD and conv.dtype == torch.float16:
        return "PyTorch's is faster in float16"
    if is_compiling() and not _has_known_sizes(conv):
        return "PyTorch's is mostly faster" if phase == FORWARD else None
    return _why_slower(DEPTHWISE, conv, phase)


def image_cannot(conv: Conv, phase: str = FORWARD) -> str | None:
    """Why the kernels for images cannot do a phase of a convolution here, fast or not; None if they can.

    Args:
        phase: of :data:`PHASES`.
    """
    if conv.channels > MOST_IMAGE_CHANNELS:
        return _because("the input has {} channels, more than {}", conv.channels, MOST_IMAGE_CHANNELS)
    if conv.rank != 2:
        return "it is 3-d"
    if phase == INPUT_GRAD:
        return "the gradient of images is PyTorch's"
    if conv.groups != 1:
        return _because("it has {} groups", conv.groups)
    return _direct_cannot(conv)


def image_why_not(conv: Conv, phase: str = FORWARD) -> str | None:
    """Why the kernels for images should not do a phase of a convolution, or None if they should.

    That is, why they cannot, or are not known to be faster than PyTorch's.

    Args:
        phase: of :data:`PHASES`.
    """
    reason = image_cannot(conv, phase)
    if reason is not None:
        return reason
    if conv.dtype == torch.bfloat16 and HAS_FAST_BFLOAT16 and not _is_measured_here():
        return "the processor multiplies bfloat16 faster than float32, and nothing was measured on it"
    if is_compiling() and not _has_known_sizes(conv):
        return "the sizes are symbols"
    if _speedup(IMAGE, conv, phase) is None:
        return _NOT_MEASURED
    return _why_slower(IMAGE, conv, phase, ELSEWHERE_MARGIN)


def pointwise_why_not(conv: Conv, phase: str = FORWARD) -> str | None:
    """Why a phase of a convolution should not be a matrix product, or None if it should.

    That is, why it is none, or is not known to be faster than PyTorch's convolution.

    Args:
        phase: of :data:`PHASES`.
    """
    if set(conv.kernel) != {1}:
        return _because("the kernel is {}, not 1x1", _by(conv.kernel))
    if set(conv.stride) != {1}:
        return _because("the stride is {}, not 1", _by(conv.stride))
    if conv.groups != 1 or any(conv.padding):
        return _because("it has {} groups and the padding {}", conv.groups, conv.padding)
    if conv.dtype != torch.float32:
        return _because("the dtype is {}", conv.dtype)
    if is_compiling() and not _has_known_sizes(conv):
        return "the sizes are symbols"
    if _speedup(POINTWISE, conv, phase) is None:
        return _NOT_MEASURED
    return _why_slower(POINTWISE, conv, phase, ELSEWHERE_MARGIN)


def _has_known_sizes(conv: Conv) -> bool:
    numbers = conv.batch, conv.channels, conv.features, conv.groups
    pairs = conv.size, conv.kernel, conv.stride, conv.padding, conv.dilation
    return are_known(number for each in (numbers, *pairs) for number in each)


def _speedup(kernels: str, conv: Conv, phase: str) -> tuple[float, bool] | None:
    if is_compiling():
        return _speedup_in_graphs(kernels, tuple(conv), phase)
    return conv_speeds.speedup(kernels, conv, PHASES.index(phase))


@constant_in_graphs
def _speedup_in_graphs(kernels: str, conv: tuple[Any, ...], phase: str) -> tuple[float, bool] | None:
    # A compiler gives no named tuples.
    return conv_speeds.speedup(kernels, Conv(*conv), PHASES.index(phase))


@constant_in_graphs
def _is_measured_here() -> bool:
    return conv_speeds.is_measured_here()  # which reads a file


def _why_slower(kernels: str, conv: Conv, phase: str, elsewhere: float = 0.0) -> str | None:
    """What measurements say against our kernels.

    Args:
        elsewhere: how much faster ours have to be where that was measured on another machine.
    """
    found = _speedup(kernels, conv, phase)
    if found is None:
        return None
    ratio, same = found
    least = 1.0 if same else conv_speeds.MARGIN
    if ratio >= (least if elsewhere <= least or _is_measured_here() else elsewhere):
        return None
    what = "it" if same else "a convolution like it"
    return f"PyTorch's {phase} of {what} was measured to be {1 / ratio:.2f} times as fast"


def _why_not_measured(conv: Conv, phase: str) -> str | None:
    """All but 3x3 kernels of stride 1 gain too little to be left to rules."""
    if _speedup(WINOGRAD, conv, phase) is not None:
        return None
    return _because(
        "its kernel is {} and its stride {}, and {}", *map(_by, (conv.kernel, conv.stride)), _NOT_MEASURED
    )


_NOT_MEASURED = "nothing like it was measured on such a processor (pooling-ext tune)"
#: By the names of our kernels.
WINOGRAD, DEPTHWISE, IMAGE, POINTWISE = "Winograd", "depthwise", "image", "pointwise"
WHY_NOT: dict[str, Callable[[Conv, str], str | None]] = {
    WINOGRAD: winograd_why_not,
    DEPTHWISE: depthwise_why_not,
    IMAGE: image_why_not,
    POINTWISE: pointwise_why_not,
}


def may_be_ours(
    channels: int,
    features: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    exact: bool = False,
) -> bool:
    """Whether there are inputs of which our kernels should do a convolution with such a weight.

    Args:
        exact: whether Winograd is left out.
    """
    if set(kernel) == set(stride) == {1} and groups == 1:
        return True
    if cpu_library.module is None:
        return False
    if groups == channels == features:
        square = len(kernel) == 2 and kernel[0] == kernel[1] and kernel[0] in KERNEL_SIZES
        if square and dilation == (1, 1) and set(stride) <= set(STRIDES):
            return True
    if channels <= MOST_IMAGE_CHANNELS and groups == 1:
        return len(kernel) == 2 and dilation == (1, 1)
    if min(channels, features) // groups < LEAST_CHANNELS or exact or SWITCHED_OFF:
        return False
    step, gap = stride[-2:], dilation[-2:]
    if set(step) == {1}:
        return has_winograd_kernel(kernel)
    return kernel[-2:] == (3, 3) and step == (2, 2) and gap == (1, 1)


def _because(form: str, *values: Any) -> str:
    """A reason with its numbers, which a compiler's trace, where they are symbols, does without."""
    return form if is_compiling() else form.format(*values)


def _by(pair: Sequence[int]) -> str:
    return "" if is_compiling() else "x".join(map(str, pair))
