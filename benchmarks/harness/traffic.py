"""Counts the bytes that Triton kernels read and write, from their memory accesses in the interpreter.

A program is taken to have a small cache of its own: what it touches again while it is there is counted
once, and what two programs touch is counted twice, as if nothing else were cached.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pooling_ext.triton.launching import Launch, watched

_WRITTEN = "written"

#: Of a program's cache; an SM has some 200 KB for the few programs that it runs at a time.
CACHE_BYTES = 48 * 1024

#: What a GPU moves at once.
SECTOR = 32


#: Programs of a launch that are run and counted, where it has more.
SAMPLE = 4
#: The bytes that a program stores at least where it makes an output, not a few numbers for each channel.
OUTPUT = 2048


@dataclass
class Traffic:
    """Bytes moved, and the same in whole sectors of 32 bytes."""

    nbytes: float = 0.0
    sector_bytes: float = 0.0


class _Cache:
    """What one program read, or wrote, of elements of one size; it knows again what it touched of late."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.new: list[np.ndarray] = []
        self.old = np.empty(0, np.uint64)
        self.pending = 0
        self.nbytes = self.sector_bytes = 0

    def touch(self, addresses: np.ndarray) -> None:
        self.new.append(addresses)
        self.pending += addresses.size * self.size
        if self.pending > CACHE_BYTES // 2:  # it may be less: the same elements again
            self.new = [np.unique(np.concatenate(self.new))]
            self.pending = self.new[0].size * self.size
            if self.pending > CACHE_BYTES // 4:
                self._age()

    def _age(self) -> None:
        """Count what is new; from now on it is old, and what was old is forgotten."""
        unique = np.unique(np.concatenate(self.new))
        self.nbytes += np.setdiff1d(unique, self.old, assume_unique=True).size * self.size
        sectors = (np.unique(elements // np.uint64(SECTOR)) for elements in (unique, self.old))
        self.sector_bytes += np.setdiff1d(*sectors, assume_unique=True).size * SECTOR
        self.old, self.new, self.pending = unique, [], 0

    def flush(self) -> None:
        if self.new:
            self._age()
        self.old = self.old[:0]


class _Stored:
    """Which of a launch's tensors its programs store to."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.tensors = [x for x in arguments.values() if isinstance(x, Tensor) and x.numel()]
        self.touched: set[int] = set()

    def touch(self, address: int) -> None:
        for position, tensor in enumerate(self.tensors):
            if tensor.data_ptr() <= address < tensor.data_ptr() + tensor.nbytes:
                self.touched.add(position)

    @property
    def nbytes(self) -> int:
        return sum(self.tensors[position].nbytes for position in self.touched)


# What stands in for Triton's functions shares all that is counted.
@contextmanager
def counted() -> Iterator[Traffic]:  # noqa: PLR0915
    """Count what kernels move while the context lasts; they must run in Triton's interpreter.

    Of a launch of many programs a random few are run, and counted for all: results are not to be used. They
    stand for as many as what they store fits in the outputs, each of which is stored to once: programs
    at a tensor's edge have less to do. Where next to nothing is stored each stands for as many as any other.
    """
    from triton.runtime import interpreter

    builder: Any = interpreter.interpreter_builder
    function: Any = interpreter.InterpretedFunction
    traffic = Traffic()
    caches: dict[tuple[str, int], _Cache] = {}  # for reading and for writing, by the elements' size
    stored = _Stored({})
    called: set[int] = set()  # the modules whose functions were called in this launch
    random = np.random.default_rng(0)

    def touch(kind: str, pointers: Any, mask: Any) -> np.ndarray:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        addresses, wanted = np.broadcast_arrays(pointers.data, mask.data)
        cache = caches.setdefault((kind, size), _Cache(size))
        found = addresses[wanted.astype(bool)].astype(np.uint64)
        cache.touch(found)
        return found

    def load(pointers: Any, mask: Any, *rest: Any) -> Any:
        touch("read", pointers, mask)
        return masked_load(pointers, mask, *rest)

    def store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for address in touch(_WRITTEN, pointers, mask)[:1]:
            stored.touch(int(address))
        return masked_store(pointers, value, mask, *rest)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A function's call in a kernel. Triton's own searches its language each time, not once a launch."""
        module = id(self.fn.__globals__)
        if module in called:
            return self.rewrite()(*args, **kwargs)
        called.add(module)
        return plain_call(self, *args, **kwargs)

    def sample(launch: Launch) -> bool:
        nonlocal stored
        stored = _Stored(launch.arguments)
        called.clear()
        grid = (*launch.grid, 1, 1)[:3]
        programs = math.prod(grid)
        chosen = np.arange(programs)
        if programs > SAMPLE:
            chosen = random.choice(programs, SAMPLE, replace=False)
        positions = np.stack(np.unravel_index(chosen, grid), 1).tolist()

        def next_program(index: int, *_: int) -> None:
            for cache in caches.values():
                cache.flush()
            set_grid_idx(*positions[index])

        builder.set_grid_dim = lambda *_: set_grid_dim(*grid)
        builder.set_grid_idx = next_program
        try:
            launch.kernel[(len(positions),)](**launch.arguments, **launch.options)
        finally:
            del builder.set_grid_dim, builder.set_grid_idx
        for cache in caches.values():
            cache.flush()
        scale = programs / len(positions)
        written = sum(cache.nbytes for (kind, _), cache in caches.items() if kind == _WRITTEN)
        if scale > 1 and written >= OUTPUT * len(positions):
            scale = stored.nbytes / written
        for cache in caches.values():
            traffic.nbytes += cache.nbytes * scale
            traffic.sector_bytes += cache.sector_bytes * scale
        caches.clear()
        return True

    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    builder.create_masked_load, builder.create_masked_store = load, store
    plain_call, function.__call__ = function.__call__, call
    try:
        with watched(sample):
            yield traffic
    finally:
        del builder.create_masked_load, builder.create_masked_store
        function.__call__ = plain_call
