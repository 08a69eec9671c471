"""Counts of what CUDA kernels do that run on the CPU (tests/cuda_on_cpu), and the order of their threads."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ..backends import cuda_library


class KernelCounts(NamedTuple):
    """What the launches of one kernel did, in bytes: of all, estimated from the blocks that ran.

    Attributes:
        kernel: its name, with the values of its template parameters.
        asked: what threads read, and what they wrote.
        touched: what their warps touched at once, in whole sectors of 32 bytes.
        moved: what came from outside a cache of 48 KB that each block has to itself.
    """

    kernel: str
    launches: int
    blocks: int
    threads: int
    asked: tuple[int, int]
    touched: tuple[int, int]
    moved: tuple[int, int]


def _library() -> ctypes.CDLL:
    if not cuda_library.on_cpu():
        raise RuntimeError("the CUDA kernels do not run on the CPU: POOLING_EXT_CUDA_ON_CPU names no library")
    library = ctypes.CDLL(cuda_library.ON_CPU)
    library.cuda_on_cpu_set.argtypes = [ctypes.c_uint64, ctypes.c_int64, ctypes.c_bool]
    library.cuda_on_cpu_counts.restype = ctypes.c_char_p
    return library


@contextmanager
def thread_order(seed: int) -> Iterator[None]:
    """Let threads run in the order that ``seed`` draws, by default 0; a GPU has an order of its own."""
    if not cuda_library.on_cpu():
        yield
        return
    library = _library()
    library.cuda_on_cpu_set(seed, 0, False)
    try:
        yield
    finally:
        library.cuda_on_cpu_set(0, 0, False)


@contextmanager
def counted(blocks: int = 0) -> Iterator[list[KernelCounts]]:
    """Count the accesses of the kernels within the context; the list is filled when it ends.

    Args:
        blocks: run only about so many blocks of each launch, so that results are wrong and counts estimates.
    """
    library, counts = _library(), []
    library.cuda_on_cpu_counts()
    library.cuda_on_cpu_set(0, blocks, True)
    try:
        yield counts
    finally:
        library.cuda_on_cpu_set(0, 0, False)
        for line in library.cuda_on_cpu_counts().decode().splitlines():
            name, *numbers = line.split("\t")
            launches, blocks, threads, *pairs = map(int, numbers)
            name = name.partition("kKernel = ")[2].partition(";")[0] or name
            asked, touched, moved = zip(pairs[::2], pairs[1::2], strict=True)
            counts.append(KernelCounts(name, launches, blocks, threads, asked, touched, moved))
