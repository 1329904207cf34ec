"""Group norm with channels last, layer norm backwards, sums over places, by `norms.c`; float32 on
the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
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
    _fields_ = [(name, ctypes.c_int64) for name in ("places", "channels", "groups")]


def fits(*tensors: Tensor) -> bool:
    """Whether there are kernels, and for such tensors."""
    return plain(*tensors) and library("norms") is not None


def group_forward(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(y, (2, B, G): mean and 1 / deviation) of pictures x (B, C, H, W), channels last.

    weight, bias  (C,)

    Raises MemoryError.
    """
    records, channels, height, width = x.shape
    y, moments = torch.empty_like(x), x.new_empty((2, records, groups))
    weight, bias = weight.contiguous(), bias.contiguous()
    given = (
        _Shape(height * width, channels, groups), x.data_ptr(), weight.data_ptr(),
        bias.data_ptr(), eps, y.data_ptr(), *_both(moments),
    )  # fmt: skip
    _share("group_forward", given, records, x.numel() * _WORK)
    return y, moments


def group_backward(
    g: Tensor, x: Tensor, moments: Tensor, weight: Tensor, out: Sequence[Room], *, back: bool
) -> Tensor | None:
    """The gradient of x, or None, from g, that of y; those of each record's weight and bias go to
    the two of `out`, (B, C), with as many floats from row to row.

    g, x     (B, C, H, W), channels last
    moments  as `group_forward` gives them
    back     whether the gradient of x is wanted

    Raises MemoryError.
    """
    _, channels, height, width = x.shape
    shape = _Shape(height * width, channels, moments.shape[2])
    return _backward("group_backward", shape, g, x, _both(moments), weight, out, back=back)


def layer_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, out: Sequence[Room], *,
    back: bool,
) -> Tensor | None:  # fmt: skip
    """As `group_backward`, of a layer norm over the last dimension of x (B, ..., C); mean and rstd
    (B, ..., 1) are as torch gives them."""
    channels = x.shape[-1]
    shape = _Shape(x.numel() // max(1, len(x) * channels), channels, 1)
    moments = (mean.data_ptr(), rstd.data_ptr())
    return _backward("layer_backward", shape, g, x, moments, weight, out, back=back)


def can_add_up(g: Tensor) -> bool:
    """Whether `place_sums` takes g."""
    if g.dim() == 4:
        return g.is_contiguous(memory_format=torch.channels_last) and fits(g)
    return g.dim() == 3 and g.is_contiguous() and fits(g)


def place_sums(g: Tensor, out: Room, *, listen: bool = True) -> Tensor | None:
    """Writes the sums of g over its places to `out`, (B, C); returns which records (n,), in their
    order, are not zero throughout, or None where `listen` says that nobody wants to know.

    g  (B, T, C), or pictures (B, C, H, W) with their channels last

    Raises MemoryError.
    """
    records, channels = len(g), g.shape[2 if g.dim() == 3 else 1]
    loud = torch.empty(records, dtype=torch.int64) if listen else None
    shape = _Shape(g.numel() // max(1, records * channels), channels, 1)
    numbers = None if loud is None else loud.data_ptr()
    given = (shape, g.data_ptr(), out.at, out.line, numbers)
    parts: list[tuple[int, int]] = []
    call = _call("place_sums")

    def run(start: int, stop: int) -> int:
        found = ctypes.c_int64()
        failed = int(call(start, stop, *given, found))
        parts.append((start, start + found.value))
        return failed

    shared(run, records, g.numel())
    if loud is None or len(parts) == 1:
        return loud if loud is None else loud[: parts[0][1]]
    return torch.cat([loud[start:stop] for start, stop in sorted(parts)])


def _backward(
    name: str, shape: _Shape, g: Tensor, x: Tensor, moments: tuple[int, int], weight: Tensor,
    out: Sequence[Room], *, back: bool,
) -> Tensor | None:  # fmt: skip
    by_x = torch.empty_like(x) if back else None
    weight, (by_weight, by_bias) = weight.contiguous(), out
    assert by_weight.line == by_bias.line
    given = (
        shape, g.data_ptr(), x.data_ptr(), *moments, weight.data_ptr(),
        None if by_x is None else by_x.data_ptr(), by_weight.at, by_bias.at, by_weight.line,
    )  # fmt: skip
    _share(name, given, len(x), x.numel() * _WORK)
    return by_x


def _both(moments: Tensor) -> tuple[int, int]:
    at = moments.data_ptr()
    return at, at + 2 * moments.numel()  # half of them, of four bytes each


def _share(name: str, given: tuple[Any, ...], records: int, work: int) -> None:
    call = _call(name)
    shared(lambda start, stop: int(call(start, stop, *given)), records, work)


_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS: dict[str, list[Any]] = {
    "group_forward": [*[_POINTER] * 3, ctypes.c_double, *[_POINTER] * 3],
    "group_backward": [*[_POINTER] * 8, _NUMBER],
    "layer_backward": [*[_POINTER] * 8, _NUMBER],
    "place_sums": [*[_POINTER] * 2, _NUMBER, _POINTER, ctypes.POINTER(_NUMBER)],
}


@lru_cache(maxsize=4)
def _call(name: str) -> Any:
    kernel = getattr(library("norms"), name)
    kernel.argtypes = [_NUMBER, _NUMBER, ctypes.POINTER(_Shape), *_ARGUMENTS[name]]
    return kernel
