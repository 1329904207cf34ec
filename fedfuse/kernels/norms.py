"""Group norm with channels last, layer norm backwards, sums over places, by `norms.c`; float32 on
the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedfuse.kernels.library import Room, library, plain
from fedfuse.kernels.threads import shared

__all__ = [
    "can_add_up",
    "fits",
    "group_backward",
    "group_forward",
    "layer_backward",
    "place_sums",
]

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
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, out: Sequence[Room], *,
    back: bool,
) -> Tensor | None:  # fmt: skip
    """The gradient of x, or None, from g, that of y; those of each record's weight and bias go to
    the two of `out`, (B, C), with as many floats from row to row.

    g, x  (B, C, H, W), channels last
    back  whether the gradient of x is wanted

    Raises MemoryError.
    """
    _, channels, height, width = x.shape
    sizes = (height * width, channels, mean.shape[1])
    return _backward("group_backward", g, x, mean, rstd, weight, sizes, out, back=back)


def layer_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, out: Sequence[Room], *,
    back: bool,
) -> Tensor | None:  # fmt: skip
    """As `group_backward`, of a layer norm over the last dimension of x (B, ..., C)."""
    channels = x.shape[-1]
    sizes = (x.numel() // max(1, len(x) * channels), channels, 1)
    return _backward("layer_backward", g, x, mean, rstd, weight, sizes, out, back=back)


def can_add_up(g: Tensor) -> bool:
    """Whether `place_sums` takes g."""
    if g.dim() == 4:
        return g.is_contiguous(memory_format=torch.channels_last) and fits(g)
    return g.dim() == 3 and g.is_contiguous() and fits(g)


def place_sums(g: Tensor, out: Room) -> Tensor:
    """Writes the sums of g over its places to `out`, (B, C); returns which records (n,), in their
    order, are not zero throughout.

    g  (B, T, C), or pictures (B, C, H, W) with their channels last

    Raises MemoryError.
    """
    channels = g.shape[2 if g.dim() == 3 else 1]
    places = g.numel() // max(1, len(g) * channels)
    heard = torch.empty(len(g), dtype=torch.int64)
    (at, step), numbers, call = _lines(g), heard.data_ptr(), _call("place_sums")
    parts = []

    def run(start: int, stop: int) -> int:
        shape, count = _Shape(stop - start, places, channels, 1), ctypes.c_int64()
        sums, mine = out.at + 4 * out.line * start, numbers + 8 * start
        failed = int(call(shape, at + step * start, sums, out.line, start, mine, count))
        parts.append((start, start + count.value))
        return failed

    shared(run, len(g), g.numel())
    if len(parts) == 1:
        return heard[: parts[0][1]]
    return torch.cat([heard[start:stop] for start, stop in sorted(parts)])


def _backward(
    name: str, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
    sizes: tuple[int, int, int], out: Sequence[Room], *, back: bool,
) -> Tensor | None:  # fmt: skip
    by_x = torch.empty_like(x) if back else None
    by_weight, by_bias = out
    assert by_weight.line == by_bias.line
    line, step = by_weight.line, 4 * by_weight.line
    weight = weight.contiguous()
    at, call = weight.data_ptr(), _call(name)
    before = tuple(map(_lines, (g, x, mean, rstd)))
    after = ((None, 0) if by_x is None else _lines(by_x), (by_weight.at, step), (by_bias.at, step))

    def run(start: int, stop: int) -> int:
        shape = _Shape(stop - start, *sizes)
        return int(call(shape, *_from(start, before), at, *_from(start, after), line))

    shared(run, len(x), x.numel() * _WORK)
    return by_x


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
    "place_sums": [*[_POINTER] * 2, *[_NUMBER] * 2, _POINTER, ctypes.POINTER(_NUMBER)],
}


@lru_cache(maxsize=4)
def _call(name: str) -> Any:
    kernel = getattr(library("norms"), name)
    kernel.argtypes = [ctypes.POINTER(_Shape), *_ARGUMENTS[name]]
    return kernel
