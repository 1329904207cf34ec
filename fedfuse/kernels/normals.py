"""Normal numbers out of random bits, by `normals.c`."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfuse.kernels.library import library

__all__ = ["add_normals"]


def add_normals(words: NDArray[np.uint64], eights: int, scale: float, values: NDArray[Any]) -> bool:
    """Adds normals to `values` (N,), float32 or float64, side by side; N <= 14 eights.

    words  (16 eights,): random bits
    scale  -2 times the variance of one of the eight that are added up

    Returns whether there is a kernel that could.
    """
    kernel = _call(values.dtype.name)
    if kernel is None:
        return False
    kernel(words.ctypes.data, eights, scale, values.ctypes.data, len(values))
    return True


@lru_cache(maxsize=8)
def _call(dtype: str) -> Any:
    found = library("normals")
    if found is None or dtype not in ("float32", "float64"):
        return None
    kernel = getattr(found, f"add_{dtype}")
    many, at = ctypes.c_int64, ctypes.c_void_p
    kernel.argtypes, kernel.restype = [at, many, ctypes.c_double, at, many], None
    return kernel
