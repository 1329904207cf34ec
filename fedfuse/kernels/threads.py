"""Kernels on several threads: each takes some of the records."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch

__all__ = ["shared"]

_WORTH_SHARING = 1 << 22
"""Multiplications from which several threads are asked; handing over takes some 50 microseconds."""


def shared(run: Callable[[int, int], int], records: int, work: int) -> None:
    """Calls `run(start, stop)` for all records, by torch's number of threads where it pays.

    `run` gives 0, or something else where memory was missing; then MemoryError is raised.
    """
    threads = min(torch.get_num_threads(), records)
    if threads < 2 or work < _WORTH_SHARING:
        failed = run(0, records)
    else:
        ends = [records * i // threads for i in range(threads + 1)]
        pool = _pool(os.getpid(), torch.get_num_threads())
        failed = max(pool.map(run, ends[:-1], ends[1:]))
    if failed:
        raise MemoryError("no memory for the arithmetic of a layer's gradients")


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Made anew in a forked process, which has none of the threads."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")
