"""Weighted sums of tokens: by learned weights, or by gates that look at the record."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from fedfuse.models.fusion.operator import Place, TokenFusion, flags, hide

__all__ = ["GatedFusion", "SumFusion"]


class SumFusion(TokenFusion):
    """z (B, M, D), seen (B, M) -> (B, D): in each coordinate a learned weighted mean of the tokens
    that are there, by a softmax over those. CentralNet (Vielzeuf et al. 2018, arXiv:1808.07275v1)
    adds up hidden layers with learned scalar weights, at each depth; here it is done once, with a
    weight for each coordinate, and the weights add up to 1 also where a modality is absent."""

    def __init__(self, modalities: int, dim: int) -> None:
        super().__init__()
        self.width = dim
        self.logit = nn.Embedding(modalities, dim)
        nn.init.zeros_(self.logit.weight)  # the plain mean

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim)

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """A record with no modality at all gives zeros."""
        which = torch.arange(z.shape[1], device=z.device).expand(z.shape[0], -1)
        logit = self.logit(which).masked_fill(~seen.unsqueeze(-1), -1e4)
        return hide(logit.softmax(1) * z, seen).sum(1)


class GatedFusion(TokenFusion):
    """z (B, M, D), seen (B, M) -> (B, D): gated multimodal units (Arevalo et al. 2017,
    arXiv:1702.01992v1, the form for more than two modalities).

    h_m = tanh(W_m z_m), g_m = sigmoid(U_m [z_1 .. z_M, seen]), and the sum of g_m h_m over the
    modalities that are there.
    """

    def __init__(self, modalities: int, dim: int) -> None:
        super().__init__()
        self.width = dim
        self.own = nn.ModuleList(nn.Linear(dim, dim) for _ in range(modalities))
        self.gate = nn.Linear(modalities * (dim + 1), modalities * dim)

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim)

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """A record with no modality at all gives zeros."""
        h = torch.stack([layer(z[:, m]) for m, layer in enumerate(self.own)], 1).tanh()
        gate = self.gate(torch.cat([z.flatten(1), flags(seen, z)], 1)).view_as(h).sigmoid()
        return hide(gate * h, seen).sum(1)
