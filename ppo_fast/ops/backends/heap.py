"""Memory that the C library keeps when tensors on the CPU are freed."""

from __future__ import annotations

import ctypes
import os
import platform

# Of malloc.h: the size from which a block gets pages of its own, which are returned as it is freed,
# and the free memory at the heap's end beyond which it is returned.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
_MOST = 2**25  # glibc takes no larger threshold
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Let this process keep freed blocks below 32 MiB for later tensors; return whether it does.

    Gradients, activations and copies in half precision are freed and made again in every optimizer
    step. glibc returns their memory to the system, which then fills each of its pages with zeros
    again. The process's largest size stays the same; between updates it does not shrink. Where the
    environment sets glibc's thresholds, and with other C libraries, nothing is changed.
    """
    chosen = any(name in os.environ for name in _VARIABLES)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _MOST) and mallopt(_M_TRIM_THRESHOLD, -1))
