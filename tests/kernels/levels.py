"""The kernels that this processor can run: its own, and those of a lesser one."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from fedfuse.kernels import compiling, library

__all__ = ["LEVELS", "load"]

_MINE = torch.backends.cpu.get_cpu_capability()


LEVELS = [
    level
    for level in compiling.LEVELS
    if level in ("AVX2", _MINE)
    and _MINE in compiling.LEVELS
    and compiling.library_path(library.FOLDER, "products", level).exists()
]


@cache
def load(source: str, level: str) -> ctypes.CDLL:
    """Its kernels for `level`."""
    return ctypes.CDLL(str(compiling.library_path(library.FOLDER, source, level)))
