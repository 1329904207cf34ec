"""Group norm with channels last, layer norm backwards, sums over places, by `norms.c`; float32 on
the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedfuse.kernels.library import library, plain
from fedfuse.kernels.threads import shared

__all__ = ["fits", "group_backward", "group_forward", "layer_backward", "place_sums"]

_WORK = 8
"""Operations a number."""


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("records", "places", "channels", "groups")]


def fits(*tensors: Tensor) -> bool:
    """Whether there are kernels, and for such tensors."""
    return plain(*tensors) and library("norms") is not None


def group_forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean (B, G), 1 / deviation (B, G)) of pictures x (B, C, H, W), channels last.

    weight, bias  (C,)

    Raises MemoryError.
    """
    y = torch.empty_like(x)
    mean, rstd = x.new_empty((2, len(x), groups))
    weight, bias = weight.contiguous(), bias.contiguous()
    records, channels, height, width = x.shape
    call, whole = _call("group_forward"), (weight.data_ptr(), bias.data_ptr(), eps)
    seen, made = _lines(x), tuple(map(_lines, (y, mean, rstd)))

    def run(start: int, stop: int) -> int:
        shape = _Shape(stop - start, height * width, channels, groups)
        return int(call(shape, *_from(start, [seen]), *whole, *_from(start, made)))

    shared(run, records, x.numel() * _WORK)
    return y, mean, rstd


def group_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *, back: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """(gradient of x, or None, and of each record's weight and bias, (B, C)), from g, that of y.

    g, x  (B, C, H, W), channels last
    back  whether the gradient of x is wanted
    out   where those of weight and bias go: two parts of one matrix's rows

    Raises MemoryError.
    """
    _, channels, height, width = x.shape
    sizes = (height * width, channels, mean.shape[1])
    return _backward("group_backward", g, x, mean, rstd, weight, sizes, back, out)


def layer_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *, back: bool,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """As `group_backward`, of a layer norm over the last dimension of x (B, ..., C)."""
    channels = x.shape[-1]
    sizes = (x[0].numel() // channels if len(x) else 0, channels, 1)
    return _backward("layer_backward", g, x, mean, rstd, weight, sizes, back, out)


def place_sums(g: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
    """(sums (B, C) over the places of g, (B,) bool: whether a record is zero throughout).

    g    (B, T, C), or pictures (B, C, H, W) with their channels last; for others, None is returned
    out  where the sums go: a part of a matrix's rows

    Raises MemoryError.
    """
    if g.dim() == 3 and g.is_contiguous():
        records, places, channels = g.shape
    elif g.dim() == 4 and g.is_contiguous(memory_format=torch.channels_last):
        records, channels, places = g.shape[0], g.shape[1], g.shape[2] * g.shape[3]
    else:
        return None
    if not fits(g):
        return None
    sums = g.new_empty((records, channels)) if out is None else out
    silent = torch.empty(records, dtype=torch.bool)
    line, call = sums.stride(0), _call("place_sums")
    lines = (_lines(g), _lines(sums))
    at = silent.data_ptr()

    def run(start: int, stop: int) -> int:
        shape = _Shape(stop - start, places, channels, 1)
        return int(call(shape, *_from(start, lines), line, at + start))

    shared(run, records, g.numel())
    return sums, silent


def _backward(
    name: str, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
    sizes: tuple[int, int, int], back: bool, out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    by_x = torch.empty_like(x) if back else None
    by_weight, by_bias = x.new_empty((2, len(x), sizes[1])) if out is None else out
    line = by_weight.stride(0)
    assert by_bias.stride(0) == line
    weight = weight.contiguous()
    at, call = weight.data_ptr(), _call(name)
    before = tuple(map(_lines, (g, x, mean, rstd)))
    after = ((None, 0) if by_x is None else _lines(by_x), _lines(by_weight), _lines(by_bias))

    def run(start: int, stop: int) -> int:
        shape = _Shape(stop - start, *sizes)
        return int(call(shape, *_from(start, before), at, *_from(start, after), line))

    shared(run, len(x), x.numel() * _WORK)
    return by_x, by_weight, by_bias


def _lines(x: Tensor) -> tuple[int, int]:
    """Where x is, and how many bytes from record to record."""
    return x.data_ptr(), 4 * x.stride(0)


def _from(start: int, lines: Iterable[tuple[int | None, int]]) -> list[int | None]:
    """Where each begins from record `start` on."""
    return [None if at is None else at + start * step for at, step in lines]


_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: dict[str, list[Any]] = {
    "group_forward": [*[_POINTER] * 3, ctypes.c_double, *[_POINTER] * 3],
    "group_backward": [*[_POINTER] * 8, _NUMBER],
    "layer_backward": [*[_POINTER] * 8, _NUMBER],
    "place_sums": [_POINTER, _POINTER, _NUMBER, _POINTER],
}


@lru_cache(maxsize=4)
def _call(name: str) -> Any:
    kernel = getattr(library("norms"), name)
    kernel.argtypes = [ctypes.POINTER(_Shape), *_ARGUMENTS[name]]
    return kernel
