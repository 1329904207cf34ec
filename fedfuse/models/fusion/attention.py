"""Masked self-attention over modality tokens."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from fedfuse.models.blocks import TransformerBlock, masked_mean
from fedfuse.models.fusion.operator import Place, TokenFusion

__all__ = ["AttentionFusion"]


class AttentionFusion(TokenFusion):
    """z (B, M, D), seen (B, M) -> (B, D): tokens with a learned mark of their modality attend to
    those that are there; then the mean over those (Vaswani et al. 2017, arXiv:1706.03762v7)."""

    def __init__(self, modalities: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.width = dim
        # An Embedding and not a bare Parameter: per-record gradients are then exact.
        self.mark = nn.Embedding(modalities, dim)
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim, place.heads, place.layers)

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """A record with no modality at all gives zeros."""
        which = torch.arange(z.shape[1], device=z.device).expand(z.shape[0], -1)
        z = z + self.mark(which)
        for block in self.blocks:
            z = block(z, seen)
        return masked_mean(self.norm(z), seen)
