"""Linear layers: (B, p), or a sequence (B, ..., p), which also a layer in a loop amounts to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfuse.kernels import products
from fedfuse.privacy.clipping.book import Book, Owners
from fedfuse.privacy.clipping.costs import gram_is_cheaper
from fedfuse.privacy.clipping.layer import Layer, compute_dtype

__all__ = ["LinearEntry", "LinearLayer", "gram_squares", "product"]


_COPIED = 64
"""Multiplications in the time in which a number of a row that is left is copied out."""


class LinearLayer(Layer):
    """``nn.Linear``, and Opacus's ``RNNLinear``."""

    def emit(self, book: Book, kept: list[tuple[Tensor, ...]]) -> None:
        """Each call is (a (B, ..., p), g (B, ..., d)); T goes over all calls."""
        if len(kept) > 1:
            a, g = (torch.cat([_sequence(call[i]) for call in kept], 1) for i in (0, 1))
        else:
            a, g = _sequence(kept[0][0]), _sequence(kept[0][1])
        dtype = self.module.weight.dtype
        a, g = a.to(dtype), g.to(dtype)
        T, d, p = a.shape[1], g.shape[2], a.shape[2]
        live = self.give_bias(g)
        place = self.places.get("weight")
        small = place is not None and book.is_small(place)
        compiled = self.alone and (T > 1 or small) and products.fits(a, g)
        # Without kernels, rows that count are copied out, which must cost less than the others do.
        if live is not None and not compiled:
            worth_it = T > 1 and d * p > _COPIED * (d + p)
            a, g, live = (a[live], g[live], live) if worth_it else (a, g, None)
        if place is None:
            return
        if self.alone and gram_is_cheaper(T, d, p, T * (d + p), book.rows if small else 0):
            rows = live if compiled else None
            book.enter(LinearEntry(place, a, g, rows, compiled and T > 1), live)
            return
        if compiled:
            # What stands last goes into registers, many numbers at once.
            swap = products.tiles(d, p) <= products.tiles(p, d)
            first, last = (g, a) if swap else (a, g)
            pairs = products.Pairs(first, last, rows=live)
            book.write(place, live, None if swap else (1, 0), pairs.write)
            return
        # The longer side goes last: the product is then up to twice as fast.
        left, right, order = (a, g, (1, 0)) if p < d else (g, a, None)
        out = None
        if book.fresh(place) and not small:
            out = book.room(place)[: len(a)].view(len(a), left.shape[2], right.shape[2])
        book.instantiate(place, product(left, right, out), live, order)


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """(B, T, m), (B, T, n) -> (B, m, n), the sum over T."""
    left = left.transpose(1, 2)
    return torch.bmm(left, right) if out is None else torch.bmm(left, right, out=out)


def _sequence(x: Tensor) -> Tensor:
    """(B, ..., n) -> (B, T, n)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


class LinearEntry:
    """Gradients g^T a with a (B, T, p) and g (B, T, d), of the records that `rows` numbers."""

    def __init__(
        self, place: int, a: Tensor, g: Tensor, rows: Tensor | None = None, compiled: bool = False
    ) -> None:
        self.place, self.a, self.g, self.rows = place, a, g, rows
        self.pairs = products.Pairs(g, a, rows=rows) if compiled else None

    def squares(self, owners: Owners | None) -> Tensor:
        if owners is None and self.pairs is not None:
            return self.pairs.squares()
        a, g = self._counting()
        if owners is not None:
            a, g = owners.side_by_side(a), owners.side_by_side(g)
        return gram_squares(a, g)

    def _counting(self) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            return self.a, self.g
        return self.a[self.rows], self.g[self.rows]

    def add_sum(self, factors: Tensor, broken: Tensor | None, out: Tensor) -> None:
        if self.pairs is not None and self.a.shape[1] >= products.LONG:
            self.pairs.add_sum(factors, out)
            return
        a, g = self._counting()
        if broken is not None:
            a = a.masked_fill(broken[:, None, None], 0)
            g = g.masked_fill(broken[:, None, None], 0)
        if a.shape[2] < g.shape[2]:
            a = a * factors[:, None, None]
        else:
            g = g * factors[:, None, None]
        g, a = g.flatten(0, 1), a.flatten(0, 1)
        out.view(g.shape[1], a.shape[1]).addmm_(g.t(), a)


def gram_squares(a: Tensor, g: Tensor) -> Tensor:
    """(U,) squared norms of g^T a, for a (U, T, p) and g (U, T, d).

    <a a^T, g g^T> (Goodfellow 2015, arXiv:1510.01799v2, for T = 1; Li et al. 2022,
    arXiv:2110.05679v6, section 4, for sequences). Where its terms cancel, rounding could make the
    sum too small, and a record would be clipped too little: it is raised by what rounding can do.
    """
    if a.shape[1] > 1 and products.fits(a, g):
        return products.Pairs(g, a).squares()
    if a.shape[1] == 1:
        return a.square().sum((1, 2)).mul_(g.square().sum((1, 2)))
    aa = torch.bmm(a, a.transpose(1, 2))
    gg = torch.bmm(g, g.transpose(1, 2))
    reach = (aa.diagonal(dim1=1, dim2=2) * gg.diagonal(dim1=1, dim2=2)).clamp_(min=0).sqrt_()
    total = aa.mul_(gg).sum((1, 2))
    slack = reach.sum(1).square_().mul_(torch.finfo(a.dtype).eps / 2)
    return total.add_(slack).clamp_(min=0)


class _Linear(torch.autograd.Function):
    """x W^T + b with W and b constant; (x, g) goes to the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, layer: LinearLayer) -> Tensor:
        module = layer.module
        ctx.layer, ctx.dtype = layer, x.dtype
        x = x.to(compute_dtype(x))
        ctx.save_for_backward(x)
        return F.linear(x, module.weight, module.bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        layer = ctx.layer
        back = None
        if ctx.needs_input_grad[0]:
            back = g.matmul(layer.module.weight.to(g.dtype)).to(ctx.dtype)
        layer.keep(x, g)
        return back, None, None


LinearLayer.node = _Linear
