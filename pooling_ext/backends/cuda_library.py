"""Loads the CUDA kernels, or says why they are not there.

They register themselves with PyTorch's dispatcher when their library is loaded. With
``POOLING_EXT_CUDA_ON_CPU`` naming the library that ``python setup.py cuda_on_cpu`` builds, the same sources
run on the CPU instead, for tests; ``use_backend("cuda")`` then puts them in the CPU kernels' place.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

#: The compute capabilities, first to last, that the convolutions' kernels are for. Their matrix instruction
#: is Ampere's; of Hopper's tensor cores it reaches half at best.
CONV_CAPABILITIES = ((8, 0), (8, 9))
#: How to have the kernels where a build left them out.
ASK = "where there is nvcc, POOLING_EXT_CUDA=1 builds them, TORCH_CUDA_ARCH_LIST=9.0 for one architecture"
#: The library that stands in for a GPU's, if one was asked for.
ON_CPU = os.environ.get("POOLING_EXT_CUDA_ON_CPU") or None
_library: ctypes.CDLL | None = None
_why_not: str | None = None


def _load() -> None:
    global _library, _why_not
    if os.environ.get("POOLING_EXT_NO_NATIVE", "0") not in ("", "0"):
        _why_not = "POOLING_EXT_NO_NATIVE is set"
        return
    path = ON_CPU
    if path is None:
        spec = find_spec("pooling_ext._cuda")
        if spec is None or spec.origin is None:
            _why_not = f"pooling_ext was built without CUDA kernels ({ASK})"
            return
        if torch.version.cuda is None:
            _why_not = "PyTorch was built without CUDA"
            return
        path = spec.origin
    try:
        _library = ctypes.CDLL(path)
    except OSError as error:
        _why_not = f"the CUDA kernels could not be loaded ({error})"


_load()


def why_not() -> str | None:
    """Why the CUDA kernels cannot run in this process, or None if they can."""
    return _why_not


def on_cpu() -> bool:
    """Whether the kernels are to run on the CPU, which takes CPU tensors."""
    return _library is not None and ON_CPU is not None


@cache
def architectures() -> tuple[str, ...]:
    """What the kernels were compiled for, in the terms of ``TORCH_CUDA_ARCH_LIST``."""
    if _library is None:
        return ()
    function = _library.pooling_ext_cuda_architectures
    function.restype = ctypes.c_char_p
    return tuple(filter(None, function().decode().split(";")))


class ConvTile(NamedTuple):
    """What a block of the convolutions' kernels computes, pixels by channels; stages are in shared memory."""

    pixels: int
    channels: int
    stages: int


@cache
def conv_tiles() -> tuple[ConvTile, ...]:
    """The tiles that the convolutions' kernels were compiled for; the last takes any channels."""
    if _library is None:
        return ()
    function = _library.pooling_ext_cuda_conv_tiles
    function.restype = ctypes.c_char_p
    return tuple(ConvTile(*map(int, tile.split())) for tile in function().decode().split(";"))


@cache
def convolves_on(device: torch.device) -> bool:
    """Whether the convolutions' kernels are worth trying on ``device``; those on the CPU always are."""
    if device.type != "cuda" or on_cpu():
        return True
    first, last = CONV_CAPABILITIES
    return first <= torch.cuda.get_device_capability(device) <= last


def runs_on(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether code for ``architectures`` runs on a GPU of compute capability ``capability``."""
    for name in architectures:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if found is None:
            continue
        built, variant, ptx = (int(found[1]), int(found[2])), found[3], found[4]
        # Code for "9.0a" runs nowhere else, for "10.0f" on 10.x.
        on_later = (built[0] == capability[0] and variant != "a") or (ptx and not variant)
        if built == capability or (built < capability and on_later):
            return True
    return False


def gpus_why_not() -> str | None:
    """Why the kernels cannot run on every GPU there is, or None if they can; this initializes CUDA."""
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not runs_on((major, minor), architectures()):
            built = ", ".join(architectures())
            own = f"TORCH_CUDA_ARCH_LIST={major}.{minor}"
            return f"the CUDA kernels are for {built}, and GPU {index} has {major}.{minor} (build with {own})"
    return None


@dataclass(frozen=True)
class StandIn:
    """The kernel of ``operator``, for CPU tensors."""

    operator: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        overload = getattr(torch.ops.pooling_ext, self.operator).default
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
        return overload.redispatch(keys, *args, **kwargs)
