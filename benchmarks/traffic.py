"""Counts the bytes that Triton kernels read and write, from their memory accesses in the interpreter.

A program is taken to have a small cache of its own, emptied when full: what it touches again while it is
there is counted once, and what two programs touch is counted twice, as if nothing else were cached.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Of a program's cache; an SM has some 200 KB for the few programs that it runs at a time.
CACHE_BYTES = 48 * 1024

#: What a GPU moves at once.
SECTOR = 32


@dataclass
class Traffic:
    """Bytes moved, and the same in whole sectors of 32 bytes."""

    read: int = 0
    written: int = 0
    sectors_read: int = 0
    sectors_written: int = 0

    @property
    def nbytes(self) -> int:
        return self.read + self.written

    @property
    def sector_bytes(self) -> int:
        return SECTOR * (self.sectors_read + self.sectors_written)


class _Cache:
    """The addresses that one program read, or wrote, of late."""

    def __init__(self) -> None:
        self.elements: list[np.ndarray] = []
        self.size = 1
        self.pending = 0
        self.nbytes = self.sectors = 0

    def touch(self, addresses: np.ndarray, size: int) -> None:
        if size != self.size:
            self.flush()
            self.size = size
        self.elements.append(addresses)
        self.pending += addresses.size * size
        if self.pending > CACHE_BYTES:  # it may be less: the same elements again
            unique = np.unique(np.concatenate(self.elements))
            self.elements, self.pending = [unique], unique.size * size
            if self.pending > CACHE_BYTES:
                self.flush()

    def flush(self) -> None:
        if self.elements:
            unique = np.unique(np.concatenate(self.elements))
            self.nbytes += unique.size * self.size
            self.sectors += np.unique(unique // np.uint64(SECTOR)).size
        self.elements, self.pending = [], 0


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what kernels move while the context lasts; they must run in Triton's interpreter."""
    from triton.runtime import interpreter

    builder: Any = interpreter.interpreter_builder
    traffic = Traffic()
    # Tensors of several dtypes take turns, each with a share of the cache.
    reads: dict[int, _Cache] = {}
    writes: dict[int, _Cache] = {}

    def touch(caches: dict[int, _Cache], pointers: Any, mask: Any) -> None:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        addresses, wanted = np.broadcast_arrays(pointers.data, mask.data)
        caches.setdefault(size, _Cache()).touch(addresses[wanted.astype(bool)].astype(np.uint64), size)

    def load(pointers: Any, mask: Any, *rest: Any) -> Any:
        touch(reads, pointers, mask)
        return masked_load(pointers, mask, *rest)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        touch(writes, pointers, mask)
        return masked_store(pointers, value, mask, *rest)

    def next_program(*index: int) -> None:
        finish()
        set_grid_idx(*index)

    def finish() -> None:
        for cache in (*reads.values(), *writes.values()):
            cache.flush()

    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store
    set_grid_idx = builder.set_grid_idx
    builder.create_masked_load, builder.create_masked_store = load, store
    builder.set_grid_idx = next_program
    try:
        yield traffic
    finally:
        del builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
        finish()
        traffic.read = sum(cache.nbytes for cache in reads.values())
        traffic.sectors_read = sum(cache.sectors for cache in reads.values())
        traffic.written = sum(cache.nbytes for cache in writes.values())
        traffic.sectors_written = sum(cache.sectors for cache in writes.values())
