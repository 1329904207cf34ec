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
    "ONE",
    "Windows",
    "add_weighted",
    "fits",
    "gram_squares",
    "outer_products",
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


ONE = Windows()
"""Of a linear layer: each place sees itself."""

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

    x     (B, C, H, W), the input, or (B, T, C), a sequence
    g     (B, O, H', W'), the gradient of the output, or (B, T, O)
    out   (R, kernel height * kernel width * C * O), numbers of a row side by side
    rows  (n,) int64: the records that are wanted; None: all B
    to    (n,) int64: the rows of out that they take; None: the first n

    Raises MemoryError.
    """
    assert out.stride(1) == 1
    squares = torch.empty(len(g if rows is None else rows))
    found, call, line = squares.data_ptr(), _call("outer"), out.stride(0)

    def some(pairs: _Pairs, start: int) -> int:
        return int(call(pairs, *_from(start, out, to), line, found + 4 * start))

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
    at, call = factors.data_ptr(), _call("weighted")
    sums = [out]

    def some(pairs: _Pairs, start: int) -> int:
        mine = out if start == 0 else torch.zeros_like(out)
        failed = int(call(pairs, at + 4 * start, mine.data_ptr()))
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
    found, call = squares.data_ptr(), _call("gram")

    def some(pairs: _Pairs, start: int) -> int:
        return int(call(pairs, found + 4 * start))

    _shared(some, x, g, windows, rows)
    return squares


@lru_cache(maxsize=1024)
def _shape(
    x: tuple[int, ...], x_strides: tuple[int, ...], g: tuple[int, ...], g_strides: tuple[int, ...],
    windows: Windows,
) -> _Shape:  # fmt: skip
    """Of sizes without the number of records, and of strides with a record's."""
    if len(x) == 2:  # a sequence: a line of a picture
        x, x_strides = (x[1], 1, x[0]), (x_strides[0], x_strides[2], 0, x_strides[1])
        g, g_strides = (g[1], 1, g[0]), (g_strides[0], g_strides[2], 0, g_strides[1])
    (channels, height, width), (top, left) = x, windows.padding
    out_channels, *out_size = g
    return _Shape(
        height, width, channels, *(x_strides[i] for i in (0, 2, 3, 1)),
        top, left, height + 2 * top, width + 2 * left,
        *windows.kernel, *windows.dilation, *windows.stride, *out_size, out_channels,
        *(g_strides[i] for i in (0, 2, 3, 1)),
    )  # fmt: skip


def _from(start: int, data: Tensor, rows: Tensor | None) -> tuple[int, int | None]:
    """Addresses of the data and of the row numbers, from record `start` on."""
    at = data.data_ptr()
    if rows is None:
        return at + 4 * start * data.stride(0), None
    return at, rows.data_ptr() + 8 * start


@lru_cache(maxsize=4)
def _call(name: str) -> Any:
    kernel = getattr(library("products"), name)
    at: Any = ctypes.c_void_p
    many, pairs = ctypes.c_int64, ctypes.POINTER(_Pairs)
    kernel.argtypes = {
        "outer": [pairs, at, at, many, at],
        "weighted": [pairs, at, at],
        "gram": [pairs, at],
    }[name]
    return kernel


def _shared(
    some: Callable[[_Pairs, int], int], x: Tensor, g: Tensor, windows: Windows, rows: Tensor | None
) -> None:
    """Runs `some(records from start on, start)` for all, by several threads where it pays."""
    shape = _shape(x.shape[1:], x.stride(), g.shape[1:], g.stride(), windows)

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
