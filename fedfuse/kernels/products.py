"""Products of small matrices for each record, by `products.c`; float32 on the CPU alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedfuse.kernels.library import library, plain
from fedfuse.kernels.threads import shared

__all__ = [
    "LONG",
    "Windows",
    "add_weighted",
    "fits",
    "gram_squares",
    "outer_products",
    "silent_records",
    "tiles",
]

LONG = 8
"""Places from which `add_weighted` is worth it: it fetches and stores its sum for each record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """What each place of an output sees of its input, in height and width (1 high: a sequence)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)


_SIZES = (
    "height", "width", "channels", "x_record", "x_height", "x_width", "x_channel",
    "top", "left", "padded_height", "padded_width",
    "kernel_height", "kernel_width", "dilation_height", "dilation_width",
    "stride_height", "stride_width", "out_height", "out_width", "out_channels",
    "g_record", "g_height", "g_width", "g_channel",
)  # fmt: skip


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in _SIZES]


class _Pairs(ctypes.Structure):
    _fields_ = [
        ("shape", ctypes.POINTER(_Shape)),
        ("records", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
    ]


def fits(*tensors: Tensor) -> bool:
    """Whether there are kernels, and for such tensors."""
    return plain(*tensors) and library("products") is not None


def silent_records(g: Tensor) -> Tensor | None:
    """(B,) bool: which records of g (B, ...) are zero throughout; None where it can't be seen."""
    dense = g.is_contiguous() or (
        g.dim() == 4 and g.is_contiguous(memory_format=torch.channels_last)
    )
    if not dense or not fits(g):
        return None
    found = torch.empty(len(g), dtype=torch.bool)
    numbers = g.numel() // max(1, len(g))
    _call("silent")(g.data_ptr(), len(g), numbers, found.data_ptr())
    return found


def tiles(p: int, d: int) -> int:
    """How many blocks a product (p, d) is made in; those at the edges are made whole."""
    return -(-p // 12) * -(-d // 32)


def outer_products(
    x: Tensor,
    g: Tensor,
    windows: Windows,
    *,
    out: Tensor,
    rows: Tensor | None = None,
    to: Tensor | None = None,
) -> Tensor:
    """Writes each record's gradient of a weight, input by output; returns its squared norm (n,).

    x     (B, C, H, W), the input
    g     (B, O, H', W'), the gradient of the output
    out   (R, kernel height * kernel width * C * O), numbers of a row side by side
    rows  (n,) int64: the records that are wanted; None: all B
    to    (n,) int64: the rows of out that they take; None: the first n

    Raises MemoryError.
    """
    assert out.stride(1) == 1
    squares = torch.empty(len(g if rows is None else rows))

    def some(pairs: _Pairs, start: int) -> int:
        base, numbers = _from(start, out, to)
        return int(_call("outer")(pairs, base, numbers, out.stride(0), squares[start:].data_ptr()))

    _shared(some, x, g, windows, rows)
    return squares


def add_weighted(
    x: Tensor,
    g: Tensor,
    windows: Windows,
    *,
    factors: Tensor,
    out: Tensor,
    rows: Tensor | None = None,
) -> None:
    """Adds to `out` the sum of factor times gradient, as `outer_products` would write those.

    factors  (n,); a record with factor 0 adds nothing, whatever its numbers are
    out      (kernel height * kernel width * C * O,), side by side

    Raises MemoryError.
    """
    assert out.is_contiguous()
    factors = factors.contiguous()
    sums = [out]

    def some(pairs: _Pairs, start: int) -> int:
        mine = out if start == 0 else torch.zeros_like(out)
        failed = int(_call("weighted")(pairs, factors[start:].data_ptr(), mine.data_ptr()))
        if start:
            sums.append(mine)
        return failed

    _shared(some, x, g, windows, rows)
    for other in sums[1:]:
        out += other


def gram_squares(x: Tensor, g: Tensor, windows: Windows, *, rows: Tensor | None = None) -> Tensor:
    """(n,) squared norms of what `outer_products` would write, rounded up, never down.

    Raises MemoryError.
    """
    squares = torch.empty(len(g if rows is None else rows))

    def some(pairs: _Pairs, start: int) -> int:
        return int(_call("gram")(pairs, squares[start:].data_ptr()))

    _shared(some, x, g, windows, rows)
    return squares


def _shape(x: Tensor, g: Tensor, windows: Windows) -> _Shape:
    (top, left), (height, width) = windows.padding, x.shape[2:]
    return _Shape(
        height, width, x.shape[1], x.stride(0), x.stride(2), x.stride(3), x.stride(1),
        top, left, height + 2 * top, width + 2 * left,
        *windows.kernel, *windows.dilation, *windows.stride, *g.shape[2:], g.shape[1],
        g.stride(0), g.stride(2), g.stride(3), g.stride(1),
    )  # fmt: skip


def _from(start: int, data: Tensor, rows: Tensor | None) -> tuple[int, int | None]:
    """Addresses of the data and of the row numbers, from record `start` on."""
    if rows is None:
        return data[start:].data_ptr(), None
    return data.data_ptr(), rows[start:].data_ptr()


@lru_cache(maxsize=4)
def _call(name: str) -> Any:
    kernel = getattr(library("products"), name)
    at: Any = ctypes.c_void_p
    many, pairs = ctypes.c_int64, ctypes.POINTER(_Pairs)
    kernel.argtypes = {
        "outer": [pairs, at, at, many, at],
        "weighted": [pairs, at, at],
        "gram": [pairs, at],
        "silent": [at, many, many, at],
    }[name]
    return kernel


def _shared(
    some: Callable[[_Pairs, int], int], x: Tensor, g: Tensor, windows: Windows, rows: Tensor | None
) -> None:
    """Runs `some(records from start on, start)` for all, by several threads where it pays."""
    shape = _shape(x, g, windows)

    def run(start: int, stop: int) -> int:
        base, numbers = _from(start, x, rows)
        slopes, _ = _from(start, g, rows)
        pairs = _Pairs(ctypes.pointer(shape), stop - start, base, slopes, numbers)
        return some(pairs, start)

    shared(
        run,
        len(g if rows is None else rows),
        g.numel() * shape.channels * windows.kernel[0] * windows.kernel[1],
    )
