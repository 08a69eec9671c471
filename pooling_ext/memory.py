"""Let the C allocator keep large CPU buffers instead of mapping each one afresh."""

from __future__ import annotations

import ctypes
import platform
from typing import NamedTuple

# <malloc.h>: mallopt's parameters.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_NEVER_TRIM = 2**31 - 1
# glibc's defaults: the most mappings, and the size from which it maps. It raises the latter up to here.
_MMAP_MAX = 65536
_MMAP_THRESHOLD = 32 * 2**20

_reused = False


class MemoryReuse(NamedTuple):
    """Whether memory is reused from now on, and if not, why. Its truth value is ``enabled``."""

    enabled: bool
    reason: str

    def __bool__(self) -> bool:
        return self.enabled


def reuse_cpu_memory() -> MemoryReuse:
    """Stop glibc's malloc from mapping every large tensor afresh, until the process ends.

    By default a large CPU tensor is mapped from the kernel when made and unmapped when freed, so each
    operator pays for the page faults of its output, which can cost more than the operator. After this
    call freed memory stays with the process and is used again; its peak does not fall in between.

    Returns:
        A :class:`~pooling_ext.memory.MemoryReuse`, true if it took effect. Outside glibc it is false and
        says why.

    Example:
        >>> reuse = pooling_ext.reuse_cpu_memory()
        >>> bool(reuse) or "glibc" in reuse.reason
        True
    """
    name, _ = platform.libc_ver()
    if name != "glibc":
        return MemoryReuse(False, f"needs glibc's mallopt, but the C library is {name or 'not glibc'}")
    global _reused
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(_M_MMAP_MAX, 0) != 1 or mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM) != 1:
        return MemoryReuse(False, "glibc's mallopt refused the settings")
    _reused = True
    return MemoryReuse(True, "large tensors reuse freed memory")


def is_cpu_memory_reused() -> bool:
    """Whether :func:`reuse_cpu_memory` is in effect."""
    return _reused


def stop_reusing_cpu_memory() -> None:
    """Undo :func:`reuse_cpu_memory` and give freed memory back to the system.

    From then on glibc maps tensors of 32 MiB or more for which the heap has no room, as it does by default
    once one of that size has been freed.
    """
    global _reused
    if not _reused:
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, _MMAP_MAX)
    libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * _MMAP_THRESHOLD)
    libc.malloc_trim(ctypes.c_size_t(0))
    _reused = False
