"""Memory that is freed stays with the process: the next batch needs just as much again.

glibc gives large blocks back to the kernel as soon as they are freed, and every batch then pays for its pages again:
5 to 20 % of the processor time of four workers of MobileNetV3-small. What is kept is bounded by what was once in use.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
KEPT = 1 << 29  # bytes that may lie free at the top of a heap
SHARED = 1 << 25  # larger blocks come from the kernel each time; the most that glibc takes


def keep_freed() -> bool:
    """Tells the allocator of this process; False where it is not glibc's. For processes that only serve."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM, KEPT)) and bool(mallopt(_MMAP, SHARED))
