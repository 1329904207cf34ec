"""Normal numbers out of random bits, by `normals.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfuse.kernels.library import library

__all__ = ["adder"]


def adder(
    words: NDArray[np.uint64], scale: float, values: NDArray[Any]
) -> Callable[[int, int], None] | None:
    """A function of `start` and `eights`; None where there is no kernel for it.

    It adds 14 eights normals, made of the first 16 eights of `words`, to `values` (N,) from number
    `start` on, float32 or float64, side by side; those beyond N are left out.

    words  random bits; what they are when the function is called counts
    scale  the deviation of one of the eight that are added up
    """
    kernel = _call(values.dtype.name)
    if kernel is None:
        return None
    source, target, size, count = (
        words.ctypes.data,
        values.ctypes.data,
        values.itemsize,
        len(values),
    )

    def add(start: int, eights: int) -> None:
        kernel(source, eights, scale, target + size * start, count - start)

    return add


@lru_cache(maxsize=8)
def _call(dtype: str) -> Any:
    found = library("normals")
    names = {"float32": "add_float", "float64": "add_double"}
    if found is None or dtype not in names:
        return None
    kernel = getattr(found, names[dtype])
    many, at = ctypes.c_int64, ctypes.c_void_p
    kernel.argtypes, kernel.restype = [at, many, ctypes.c_double, at, many], None
    return kernel
