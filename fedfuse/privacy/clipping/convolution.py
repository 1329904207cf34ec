"""Convolutions in one, two and three dimensions: a sequence of patches through a linear layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.kernels import products
from fedfuse.privacy.clipping.book import Book, Owners, stored
from fedfuse.privacy.clipping.costs import gram_is_cheaper
from fedfuse.privacy.clipping.layer import Layer, compute_dtype
from fedfuse.privacy.clipping.linear import gram_squares, product

__all__ = ["ConvEntry", "ConvLayer", "patches"]

_CHUNK = 1 << 19
"""Numbers of patches made at once: about what a core's caches hold, in as few calls."""
_CHUNK_GPU = 1 << 26


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

    def run(self, x: Tensor) -> Any:
        m: Any = self.module
        if self.outside:
            mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
            x = F.pad(x, m._reversed_padding_repeated_twice, mode=mode)
        if x.dim() == 4 and m.groups == 1 and x.device.type == "cpu":
            x = _channels_last(x)
        return super().run(x)

    def emit(self, book: Book, kept: list[tuple[Tensor, ...]]) -> None:
        """Each call is (x (B, C, ...), g (B, O, ...), live (n,) or nothing)."""
        m: Any = self.module
        place = self.places.get("weight")
        if place is None:
            return
        for x, g, *rest in kept:
            live = rest[0] if rest else None
            x, g = x.to(m.weight.dtype), g.to(m.weight.dtype)
            length = math.prod(g.shape[2:])
            once = self.alone and len(kept) == 1
            gram = once and m.groups == 1 and not book.is_small(place)
            pairs = self.pairs(x, g, live) if once else None
            held = (x.numel() + g.numel()) // max(1, len(x))
            if gram and gram_is_cheaper(length, m.out_channels, m.weight[0].numel(), held):
                book.enter(ConvEntry(place, self, x, g, live, pairs), live)
            elif pairs is not None:
                book.write(place, live, _order(g.dim() - 2), pairs.write)
            else:
                if live is not None:
                    x, g = _rows(x, live), _rows(g, live)
                book.instantiate(place, *self._instantiated(book, place, x, g, live))

    def pairs(self, x: Tensor, g: Tensor, live: Tensor | None) -> products.Pairs | None:
        """The convolution as the kernels have it; None where they don't."""
        m: Any = self.module
        if x.dim() > 4 or m.groups > 1 or not products.fits(x, g):
            return None
        windows = products.Windows(
            kernel=_two(m.kernel_size, 1), stride=_two(m.stride, 1),
            dilation=_two(m.dilation, 1), padding=_two(self.padding, 0),
        )  # fmt: skip
        return products.Pairs(_picture(x), _picture(g), windows, live)

    def _instantiated(
        self, book: Book, place: int, x: Tensor, g: Tensor, live: Tensor | None
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...] | None]:
        """What `Book.instantiate` takes: gradients, whose they are, the order of their numbers."""
        m: Any = self.module
        shape, groups = m.weight.shape, m.groups
        if book.fresh(place) and not book.is_small(place):
            out = book.room(place)[: len(x)]
        else:
            out = x.new_empty((len(x), m.weight.numel()))
        # The longer side goes last: the product is then up to six times as fast.
        swap = groups == 1 and m.weight[0].numel() < shape[0]
        for rows, a in self.chunks(x, math.prod(g.shape[2:])):
            gg = _by_place(g[rows])
            if groups > 1:
                gg = gg.unflatten(2, (groups, -1)).transpose(1, 2).flatten(0, 1)
            left, right = (a, gg) if swap else (gg, a)
            product(left, right, out[rows].view(len(a), left.shape[2], right.shape[2]))
        dims = list(range(len(shape)))
        if _last(x, groups):
            dims = [0, *dims[2:], 1]  # (O, kernel, C)
        if swap:
            dims = [*dims[1:], 0]
        order = tuple(dims.index(i) for i in range(len(shape)))
        grads = out.view(len(x), *(shape[i] for i in dims))
        return grads, live, None if order == tuple(sorted(order)) else order

    def chunks(self, x: Tensor, length: int) -> Iterator[tuple[slice, Tensor]]:
        """(rows, patches (b G, L, p)) over the batch, some records at a time."""
        m: Any = self.module
        each = max(1, x.shape[1] * math.prod(m.kernel_size) * length)
        step = max(1, (_CHUNK if x.device.type == "cpu" else _CHUNK_GPU) // each)
        for start in range(0, len(x), step):
            rows = slice(start, start + step)
            yield rows, patches(x[rows], m, self.padding)


class ConvEntry:
    """Gradients g^T a, where a are the patches of x, of a convolution without groups."""

    def __init__(
        self, place: int, layer: ConvLayer, x: Tensor, g: Tensor, live: Tensor | None,
        pairs: products.Pairs | None,
    ) -> None:  # fmt: skip
        """x and g of all records, of which those count that `live` numbers."""
        self.place, self.layer, self.x, self.g, self.live = place, layer, x, g, live
        self.pairs = pairs

    def _counting(self) -> tuple[Tensor, Tensor]:
        if self.live is None:
            return self.x, self.g
        return _rows(self.x, self.live), _rows(self.g, self.live)

    def squares(self, owners: Owners | None) -> Tensor:
        if self.pairs is not None and owners is None:
            return self.pairs.squares()
        m: Any = self.layer.module
        x, g = self._counting()
        g = _by_place(g)
        if owners is not None:
            a = patches(x, m, self.layer.padding)
            return gram_squares(owners.side_by_side(a), owners.side_by_side(g))
        found = [gram_squares(a, g[rows]) for rows, a in self.layer.chunks(x, g.shape[1])]
        return torch.cat(found) if found else g.new_zeros(0)

    def add_sum(self, factors: Tensor, broken: Tensor | None, out: Tensor) -> None:
        shape = self.layer.module.weight.shape
        if self.pairs is not None and self.g[0].numel() >= products.LONG * self.g.shape[1]:
            total = torch.zeros_like(out)
            self.pairs.add_sum(factors, total)
            order = _order(self.x.dim() - 2)
            out.view(shape).add_(total.view(stored(shape, order)).permute(order))
            return
        x, g = self._counting()
        extra = (1,) * (x.dim() - 1)
        if broken is not None:
            x = x.masked_fill(broken.view(-1, *extra), 0)
            g = g.masked_fill(broken.view(-1, *extra), 0)
        g = g * factors.view(-1, *extra)
        out.view(shape).add_(_backward(g, x, self.layer, (False, True))[1])


def _channels_last(x: Tensor) -> Tensor:
    """`x` with its channels side by side in memory: convolutions and pooling on a CPU are faster
    so, and a patch is then a few runs of memory. The numbers are the same."""
    if x.shape[1] > 1:
        return x.contiguous(memory_format=torch.channels_last)
    height, width = x.shape[2:]
    return x.contiguous().as_strided(x.shape, (height * width, 1, width, 1))


def _last(x: Tensor, groups: int) -> bool:
    """Whether `patches` takes channels last."""
    return groups == 1 and _is_channels_last(x)


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.shape[1] > 1 and x.stride(1) == 1


def _two(sizes: Any, one: int) -> tuple[int, int]:
    """Height and width; of a convolution over time, which is `one` high, time is the width."""
    height, width = (one, *sizes) if len(sizes) == 1 else sizes
    return int(height), int(width)


def _order(dims: int) -> tuple[int, ...]:
    """How (kernel, C, O), as the kernels write it, is permuted to (O, C, kernel)."""
    return (dims + 1, dims, *range(dims))


def _picture(x: Tensor) -> Tensor:
    """(B, C, T) -> (B, C, 1, T)."""
    return x.unsqueeze(2) if x.dim() == 3 else x


def _by_place(g: Tensor) -> Tensor:
    """(B, O, ...) -> (B, L, O)."""
    return g.movedim(1, -1).flatten(1, -2)


def _rows(x: Tensor, live: Tensor) -> Tensor:
    """x[live] in the memory format of `x`."""
    if _is_channels_last(x):
        return x.permute(0, 2, 3, 1)[live].permute(0, 3, 1, 2)
    return x[live]


def patches(x: Tensor, m: Any, padding: list[int]) -> Tensor:
    """(B, C, ...) -> (B G, L, p): what each output of the convolution `m` sees, p numbers of it.

    p goes over the group's channels and the kernel, as `m.weight` does; over the kernel and the
    channels where x is channels-last.
    """
    last = _last(x, m.groups)
    if last:
        top, left = padding
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top)).permute(0, 3, 1, 2)
    elif any(padding):
        x = F.pad(x, [n for n in reversed(padding) for _ in (0, 1)])
    rows, channels = x.shape[:2]
    near = [d * n for d, n in zip(m.dilation, x.stride()[2:], strict=True)]
    far = [s * n for s, n in zip(m.stride, x.stride()[2:], strict=True)]
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], m.kernel_size, m.stride, m.dilation, strict=True)
    ]
    by_row, by_channel = x.stride()[:2]
    if last:
        view = x.as_strided(
            (rows, *counts, *m.kernel_size, channels), (by_row, *far, *near, 1), x.storage_offset()
        )
        return view.reshape(rows, math.prod(counts), -1)
    view = x.as_strided(
        (rows, channels, *m.kernel_size, *counts),
        (by_row, by_channel, *near, *far),
        x.storage_offset(),
    )
    return view.reshape(rows * m.groups, -1, math.prod(counts)).transpose(1, 2)


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


def _spread(x: Tensor, live: Tensor, rows: int) -> Tensor:
    """(n, ...) -> (rows, ...), zero but for the `live` ones, in the memory format of `x`."""
    if _is_channels_last(x):
        x = x.permute(0, 2, 3, 1)
        return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, live, x).permute(0, 3, 1, 2)
    return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, live, x)


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
        if _is_channels_last(x):
            g = g.contiguous(memory_format=torch.channels_last)
        live = ctx.layer.give_bias(g if g.dim() == 4 else _by_place(g))
        back = None
        if ctx.needs_input_grad[0]:
            # A copy of the rows that count is worth it where they are few.
            few = live if live is not None and len(live) * 2 < len(g) else None
            some = g if few is None else _rows(g, few)
            # Of x the shape counts alone.
            back = _backward(some, x[: len(some)], ctx.layer, (True, False))[0].to(ctx.dtype)
            if few is not None:
                back = _spread(back, few, len(g))
        ctx.layer.keep(x, g, *([] if live is None else [live]))
        return back, None, None


ConvLayer.node = _Conv
