"""Embeddings: a record's gradient has one row for each token, and equal tokens share theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfuse.kernels import tokens
from fedfuse.privacy.clipping.book import Book, Owners
from fedfuse.privacy.clipping.layer import Layer
from fedfuse.privacy.lengths import lengths

__all__ = ["EmbeddingLayer"]


class EmbeddingLayer(Layer):
    """``nn.Embedding`` without max_norm and scale_grad_by_freq, also with padding_idx."""

    def emit(self, book: Book, kept: list[tuple[Tensor, ...]]) -> None:
        """Each call is (ids (B, ...), g (B, ..., D)); T goes over all calls."""
        place = self.places["weight"]
        rows, dtype = book.rows, book.parameters[place].dtype
        ids = torch.cat([call[0].reshape(rows, -1) for call in kept], 1)
        width = kept[0][1].shape[-1]
        g = torch.cat([call[1].reshape(rows, -1, width) for call in kept], 1).to(dtype)
        padding = self.module.padding_idx
        if padding is not None:
            g = g.masked_fill(torch.eq(ids, padding).unsqueeze(-1), 0)
        if self.alone and not book.is_small(place):
            book.enter(EmbeddingEntry(place, ids, g))
            return
        vocabulary = self.module.num_embeddings
        whole = g.new_zeros((rows, vocabulary, width))
        whole.scatter_add_(1, ids.unsqueeze(-1).expand_as(g), g)
        book.instantiate(place, whole)


class EmbeddingEntry:
    """Gradients with row v = the sum of g (B, T, D) over the places where ids (B, T) is v."""

    def __init__(self, place: int, ids: Tensor, g: Tensor) -> None:
        self.place, self.ids, self.g = place, ids, g

    def squares(self, owners: Owners | None) -> Tensor:
        """<[id_t = id_u], g g^T> (Bu et al. 2022, arXiv:2210.00038v2, appendix on embeddings) as a
        sum of squares: the rows of equal tokens are added up first, so that nothing cancels."""
        ids, g = self.ids, self.g
        if owners is not None:
            ids = owners.side_by_side(ids.unsqueeze(-1)).squeeze(-1)
            g = owners.side_by_side(g)  # zero where there is no record
        if ids.shape[1] == 1:
            return g.square().sum((1, 2))
        if tokens.fits(ids, g):
            return tokens.token_squares(ids, g)
        ordered, order = ids.sort(1)
        rank = torch.zeros_like(ids)
        torch.cumsum(ordered[:, 1:] != ordered[:, :-1], 1, out=rank[:, 1:])
        row = torch.empty_like(ids).scatter_(1, order, rank)
        # One index for units and tokens together: unit u has its rows from u T on.
        row += torch.arange(len(ids), device=ids.device)[:, None] * ids.shape[1]
        sums = torch.zeros_like(g).view(-1, g.shape[2])
        sums.index_add_(0, row.view(-1), g.reshape(-1, g.shape[2]))
        return lengths(sums.view(len(ids), -1)).square_()

    def add_sum(self, factors: Tensor, broken: Tensor | None, out: Tensor) -> None:
        g = self.g if broken is None else self.g.masked_fill(broken[:, None, None], 0)
        weighted = (g * factors[:, None, None]).flatten(0, 1)
        out.view(-1, g.shape[2]).index_add_(0, self.ids.reshape(-1), weighted)


class _Embedding(torch.autograd.Function):
    """Rows of a constant table; (ids, g) goes to the layer."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, anchor: Tensor, layer: EmbeddingLayer) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(ids)
        return F.embedding(ids, layer.module.weight)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        ctx.layer.keep(ids, g)
        return None, None, None


EmbeddingLayer.node = _Embedding
