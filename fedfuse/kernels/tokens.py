"""Norms of an embedding's gradients, by `tokens.c`; float32 on the CPU."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedfuse.kernels.library import library, plain
from fedfuse.kernels.threads import shared

__all__ = ["fits", "token_squares"]


def fits(ids: Tensor, g: Tensor) -> bool:
    """Whether there is a kernel, and for such tensors."""
    dense = ids.is_contiguous() and g.is_contiguous()
    return dense and ids.dtype == torch.int64 and plain(g) and library("tokens") is not None


def token_squares(ids: Tensor, g: Tensor) -> Tensor:
    """(B,) squared norms of the sums of g (B, T, D) by token, of ids (B, T).

    Raises MemoryError.
    """
    records, places, width = g.shape
    squares = torch.empty(records)
    given = (places, width, ids.data_ptr(), g.data_ptr(), squares.data_ptr())
    call = _call()
    shared(lambda start, stop: int(call(start, stop, *given)), records, g.numel())
    return squares


@lru_cache(maxsize=1)
def _call() -> Any:
    kernel = getattr(library("tokens"), "token_squares")  # noqa: B009 - the library is untyped
    kernel.argtypes = [*[ctypes.c_int64] * 4, *[ctypes.c_void_p] * 3]
    return kernel
