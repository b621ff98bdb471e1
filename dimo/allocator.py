"""What this process does with memory that it frees."""

__all__ = ["keep_freed_memory"]

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of <malloc.h>
_LARGEST_KEPT, _KEPT = 32 << 20, 1 << 30  # bytes; glibc takes no larger first one


def keep_freed_memory() -> None:
    """Lets the C library keep up to 1 GiB of freed memory, in blocks of up to 32 MiB.

    glibc would return a tensor's memory to the system as soon as it is freed and get the next
    one's page by page, which takes a tenth of a training step or a sampler's time on a CPU. With
    another C library nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
