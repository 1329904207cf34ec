"""Memory that a step has freed stays with the process, for the next step.

glibc gives large blocks back to the system as soon as they are freed, and the system hands them out
again one zeroed page at a time: a tenth to a sixth of a step on a large batch went there.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST, _KEPT = 32 << 20, 512 << 20
"""Bytes: of the largest block that comes from the heap, and of what a heap keeps at its end."""


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Sets glibc's thresholds for this process, once; does nothing elsewhere, nor where the
    environment (MALLOC_*, GLIBC_TUNABLES) sets them."""
    said = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if said or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _KEPT)
