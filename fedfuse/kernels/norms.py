"""Group norm with channels last, and layer norm backwards, by `norms.c`; float32 on the CPU."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedfuse.kernels.library import library, plain
from fedfuse.kernels.threads import shared

__all__ = ["fits", "group_backward", "group_forward", "layer_backward"]

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
    call = _call("group_forward", 4, 3)

    def run(start: int, stop: int) -> int:
        shape = _Shape(stop - start, height * width, channels, groups)
        return int(
            call(
                shape, x[start:].data_ptr(), weight.data_ptr(), bias.data_ptr(), eps,
                y[start:].data_ptr(), mean[start:].data_ptr(), rstd[start:].data_ptr(),
            )
        )  # fmt: skip

    shared(run, records, x.numel() * _WORK)
    return y, mean, rstd


def group_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *, back: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(gradient of x, or None, and of each record's weight and bias, (B, C)), from g, that of y.

    g, x  (B, C, H, W), channels last
    back  whether the gradient of x is wanted

    Raises MemoryError.
    """
    _, channels, height, width = x.shape
    sizes = (height * width, channels, mean.shape[1])
    return _backward("group_backward", g, x, mean, rstd, weight, sizes, back=back)


def layer_backward(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *, back: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """As `group_backward`, of a layer norm over the last dimension of x (B, ..., C)."""
    channels = x.shape[-1]
    sizes = (x[0].numel() // channels if len(x) else 0, channels, 1)
    return _backward("layer_backward", g, x, mean, rstd, weight, sizes, back=back)


def _backward(
    name: str, g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
    sizes: tuple[int, int, int], *, back: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    out = torch.empty_like(x) if back else None
    by_weight, by_bias = x.new_empty((2, len(x), sizes[1]))
    weight = weight.contiguous()
    call = _call(name, 9, 0)

    def run(start: int, stop: int) -> int:
        return int(
            call(
                _Shape(stop - start, *sizes), g[start:].data_ptr(), x[start:].data_ptr(),
                mean[start:].data_ptr(), rstd[start:].data_ptr(), weight.data_ptr(),
                None if out is None else out[start:].data_ptr(),
                by_weight[start:].data_ptr(), by_bias[start:].data_ptr(),
            )
        )  # fmt: skip

    shared(run, len(x), x.numel() * _WORK)
    return out, by_weight, by_bias


@lru_cache(maxsize=3)
def _call(name: str, before: int, after: int) -> Any:
    """A kernel with so many pointers before and after the number that it takes, if any."""
    kernel = getattr(library("norms"), name)
    at = ctypes.c_void_p
    number = [ctypes.c_double, *[at] * after] if after else []
    kernel.argtypes = [ctypes.POINTER(_Shape), *[at] * (before - 1), *number]
    return kernel
