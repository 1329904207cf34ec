"""Convolutions in one, two and three dimensions: a sequence of patches through a linear layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.privacy.clipping.book import Book, Owners
from fedfuse.privacy.clipping.costs import SMALL, gram_is_cheaper
from fedfuse.privacy.clipping.layer import Layer, compute_dtype
from fedfuse.privacy.clipping.linear import gram_squares

__all__ = ["ConvEntry", "ConvLayer", "patches"]

_CHUNK = 1 << 17
"""Numbers of patches made at once, so that they are used while in a core's cache."""


class ConvLayer(Layer):
    """``nn.Conv1d``, ``Conv2d`` and ``Conv3d``, with stride, dilation, groups and any padding."""

    def __init__(self, name: str, module: nn.Module, places: Any) -> None:
        super().__init__(name, module, places)
        m: Any = module
        around = m._reversed_padding_repeated_twice  # last dimension first, before and after
        before, after = around[::2], around[1::2]
        self.outside = m.padding_mode != "zeros" or before != after
        """Whether the input is padded by itself, and the convolution then pads nothing."""
        self.padding = [0] * len(before) if self.outside else list(reversed(before))

    def run(self, x: Tensor) -> Tensor:
        m: Any = self.module
        if self.outside:
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=mode)
        return _Conv.apply(x, self.now.anchor, self)  # type: ignore[no-any-return]

    def emit(self, book: Book, kept: list[tuple[Tensor, ...]]) -> None:
        """Each call is (x (B, C, ...), g (B, O, ...))."""
        for _, g in kept:
            self.emit_bias(book, g.flatten(2).transpose(1, 2))
        place = self.places.get("weight")
        if place is None:
            return
        m: Any = self.module
        weight = book.parameters[place]
        groups, out = m.groups, m.out_channels // m.groups
        area = weight[0].numel()
        for x, g in kept:
            x, g = x.to(weight.dtype), g.to(weight.dtype)
            length = math.prod(g.shape[2:])
            if (
                self.alone
                and len(kept) == 1
                and weight.numel() > SMALL
                and groups * 2 * length * length < weight.numel()
                and gram_is_cheaper(length, out, area, unfold=True)
            ):
                book.entries.append(ConvEntry(place, self, x, g))
            else:
                self._instantiate(book, place, x, g)

    def _instantiate(self, book: Book, place: int, x: Tensor, g: Tensor) -> None:
        m: Any = self.module
        weight = book.parameters[place]
        fresh = book.fresh(place)
        room = book.room(place) if fresh else x.new_empty((len(x), weight.numel()))
        direct = room.is_contiguous()
        for rows, a in self.chunks(x, math.prod(g.shape[2:])):
            gg = g[rows].reshape(len(a) * m.groups, m.out_channels // m.groups, -1)
            part = room[rows]
            shape = (*gg.shape[:2], a.shape[2])
            if direct:
                torch.bmm(gg, a.flatten(0, 1).transpose(1, 2), out=part.view(shape))
            else:
                part.copy_(torch.bmm(gg, a.flatten(0, 1).transpose(1, 2)).view(len(a), -1))
        book.instantiate(place, room)

    def chunks(self, x: Tensor, length: int) -> Any:
        """(rows, patches (b, G, p, L)) over the batch, some records at a time."""
        m: Any = self.module
        each = max(1, x.shape[1] * math.prod(m.kernel_size) * length)
        step = max(1, _CHUNK // each) if x.device.type == "cpu" else max(1, (1 << 28) // each)
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            yield rows, patches(x[rows], m, self.padding)


class ConvEntry:
    """Gradients g^T a, where a are the patches of x."""

    def __init__(self, place: int, layer: ConvLayer, x: Tensor, g: Tensor) -> None:
        self.place, self.layer, self.x, self.g = place, layer, x, g

    def squares(self, owners: Owners | None) -> Tensor:
        m: Any = self.layer.module
        g = self.g.flatten(2)
        rows, length = len(g), g.shape[2]
        if owners is not None:
            a = patches(self.x, m, self.layer.padding)
            a = owners.side_by_side(a.permute(0, 3, 1, 2).flatten(2))
            g = owners.side_by_side(g.transpose(1, 2))
            a, g = (
                v.unflatten(2, (m.groups, -1)).transpose(1, 2).flatten(0, 1) for v in (a, g)
            )
            return gram_squares(a, g).view(owners.units, m.groups).sum(1)
        found = []
        for part, a in self.layer.chunks(self.x, length):
            a = a.flatten(0, 1).transpose(1, 2)
            gg = g[part].reshape(len(a), -1, length).transpose(1, 2)
            found.append(gram_squares(a, gg))
        return torch.cat(found).view(rows, m.groups).sum(1)

    def add_sum(self, factors: Tensor, broken: Tensor | None, out: Tensor) -> None:
        x, g = self.x, self.g
        extra = (1,) * (x.dim() - 1)
        if broken is not None:
            x = x.masked_fill(broken.view(-1, *extra), 0)
            g = g.masked_fill(broken.view(-1, *extra), 0)
        g = g * factors.view(-1, *extra)
        out.add_(_backward(g, x, self.layer, (False, True))[1])


def patches(x: Tensor, m: Any, padding: list[int]) -> Tensor:
    """(B, C, ...) -> (B, G, p, L): what each output of the convolution `m` sees, p numbers of it.

    p goes over the group's channels and the kernel, as `m.weight` does.
    """
    if any(padding):
        x = F.pad(x, [n for n in reversed(padding) for _ in (0, 1)])
    rows, channels = x.shape[:2]
    strides = x.stride()
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], m.kernel_size, m.stride, m.dilation, strict=True)
    ]
    view = x.as_strided(
        (rows, channels, *m.kernel_size, *counts),
        (
            *strides[:2],
            *(d * n for d, n in zip(m.dilation, strides[2:], strict=True)),
            *(s * n for s, n in zip(m.stride, strides[2:], strict=True)),
        ),
        x.storage_offset(),
    )
    return view.reshape(rows, m.groups, -1, math.prod(counts))


def _backward(g: Tensor, x: Tensor, layer: ConvLayer, which: tuple[bool, bool]) -> Any:
    """(gradient of x, gradient of the weight), those of them that `which` asks for."""
    m: Any = layer.module
    return torch.ops.aten.convolution_backward(
        g,
        x,
        m.weight.to(g.dtype),
        None,
        m.stride,
        layer.padding,
        m.dilation,
        False,
        [0] * len(layer.padding),
        m.groups,
        [*which, False],
    )


class _Conv(torch.autograd.Function):
    """A convolution with constant weights; (x, g) goes to the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: ConvLayer) -> Tensor:
        m: Any = layer.module
        ctx.layer, ctx.dtype = layer, x.dtype
        x = x.to(compute_dtype(x))
        ctx.save_for_backward(x)
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[len(layer.padding) - 1]
        return conv(x, m.weight, m.bias, m.stride, layer.padding, m.dilation, m.groups)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        back = None
        if ctx.needs_input_grad[0]:
            back = _backward(g, x, ctx.layer, (True, False))[0].to(ctx.dtype)
        ctx.layer.keep(x, g)
        return back, None, None
