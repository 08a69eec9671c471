"""Let the C allocator keep large CPU buffers instead of mapping each one afresh."""

from __future__ import annotations

import ctypes
import platform
from typing import NamedTuple

# <malloc.h>: mallopt's parameters.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER_TRIM = 2**31 - 1


class MemoryReuse(NamedTuple):
    """Whether memory is reused from now on, and if not, why. Its truth value is ``enabled``."""

    enabled: bool
    reason: str

    def __bool__(self) -> bool:
        return self.enabled


def reuse_cpu_memory() -> MemoryReuse:
    """Stop glibc's malloc from mapping every large tensor afresh, for the rest of the process.

    By default a large CPU tensor is mapped from the kernel when made and unmapped when freed, so each
    operator pays for the page faults of its output, which can cost more than the operator. After this
    call freed memory stays with the process and is used again; its peak does not fall in between.

    Returns:
        A :class:`MemoryReuse`, true if it took effect. Outside glibc it is false and says why.
    """
    name, _ = platform.libc_ver()
    if name != "glibc":
        return MemoryReuse(False, f"needs glibc's mallopt, but the C library is {name or 'not glibc'}")
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(_M_MMAP_MAX, 0) != 1 or mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM) != 1:
        return MemoryReuse(False, "glibc's mallopt refused the settings")
    return MemoryReuse(True, "large tensors reuse freed memory")
