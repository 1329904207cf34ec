"""Products of small matrices for each record, by `products.c`; float32 on the CPU alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedfuse.kernels.library import Room, library, plain
from fedfuse.kernels.threads import shared

__all__ = [
    "LONG",
    "ONE",
    "Pairs",
    "Windows",
    "fits",
    "tiles",
]

LONG = 8
"""Places from which `Pairs.add_sum` is worth it; a library multiplies fewer as fast."""


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
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("g", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
    ]


def fits(*tensors: Tensor) -> bool:
    """Whether there are kernels, and for such tensors."""
    return plain(*tensors) and library("products") is not None


def tiles(p: int, d: int) -> int:
    """In how many blocks, of some 12 by 32 numbers, a product (p, d) is made."""
    return -(-p // 12) * -(-d // 32)


class Pairs:
    """Records' inputs and output gradients, of whose products each method makes something.

    A record's product is the gradient of a weight, (kernel height * kernel width * C, O). Each
    method raises MemoryError.
    """

    def __init__(
        self, x: Tensor, g: Tensor, windows: Windows = ONE, rows: Tensor | None = None
    ) -> None:
        """
        x     (B, C, H, W), the input, or (B, T, C), a sequence
        g     (B, O, H', W'), the gradient of the output, or (B, T, O)
        rows  (n,) int64: the records that are wanted; None: all B
        """
        self._held = (x, g, rows)
        self._shape = _shape(x.shape[1:], x.stride(), g.shape[1:], g.stride(), windows)
        self._at = (x.data_ptr(), g.data_ptr(), None if rows is None else rows.data_ptr())
        self._records = len(g if rows is None else rows)
        self._work = g.numel() * self._shape.channels * windows.kernel[0] * windows.kernel[1]

    def write(self, out: Room, to: Tensor | None = None) -> Tensor:
        """Writes the products; returns their squared norms (n,).

        out   (R, p O)
        to    (n,) int64: the rows of out that they take; None: the first n
        """
        squares = torch.empty(self._records)
        given = (out.at, None if to is None else to.data_ptr(), out.line, squares.data_ptr())
        call = _call("outer")
        self._share(lambda pairs: int(call(pairs, *given)))
        return squares

    def squares(self) -> Tensor:
        """(n,) squared norms of the products, rounded up, never down."""
        squares = torch.empty(self._records)
        found, call = squares.data_ptr(), _call("gram")
        self._share(lambda pairs: int(call(pairs, found)))
        return squares

    def add_sum(self, factors: Tensor, out: Tensor) -> None:
        """Adds to `out` the sum of factor times product.

        factors  (n,); a record with factor 0 adds nothing, whatever its numbers are
        out      (p O,), side by side
        """
        assert out.is_contiguous()
        factors = factors.contiguous()
        at, call = factors.data_ptr(), _call("weighted")
        sums = [out]

        def some(pairs: _Pairs) -> int:
            mine = out if pairs.start == 0 else torch.zeros_like(out)
            failed = int(call(pairs, at, mine.data_ptr()))
            if mine is not out:
                sums.append(mine)
            return failed

        self._share(some)
        for other in sums[1:]:
            out += other

    def _share(self, some: Callable[[_Pairs], int]) -> None:
        """Runs `some` for all records, by several threads where it pays."""
        shape, at = ctypes.pointer(self._shape), self._at
        shared(lambda a, b: some(_Pairs(shape, a, b, *at)), self._records, self._work)


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
