"""Threads for compiled kernels and ciphers, which hold no lock of Python's while they work."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

__all__ = ["pool", "shared"]

_WORTH_SHARING = 1 << 22
"""Multiplications from which several threads are asked; handing over takes some 50 microseconds."""


@cache
def pool() -> ThreadPoolExecutor:
    """One for the process, which begins threads as they are needed; a forked one has its own."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fedfuse")


os.register_at_fork(after_in_child=pool.cache_clear)


def shared(run: Callable[[int, int], int], records: int, work: int) -> None:
    """Calls `run(start, stop)` for all records, by torch's number of threads where it pays.

    `run` gives 0, or something else where memory was missing; then MemoryError is raised.
    """
    threads = min(torch.get_num_threads(), records)
    if threads < 2 or work < _WORTH_SHARING:
        failed = run(0, records)
    else:
        ends = [records * i // threads for i in range(threads + 1)]
        failed = max(pool().map(run, ends[:-1], ends[1:]))
    if failed:
        raise MemoryError("no memory for the arithmetic of a layer's gradients")
