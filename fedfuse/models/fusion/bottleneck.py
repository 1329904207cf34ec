"""Attention bottlenecks: modalities exchange what they know through a few shared tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fedfuse.models.blocks import TransformerBlock
from fedfuse.models.fusion.operator import Place, SequenceFusion, flags, hide

__all__ = ["BottleneckFusion"]


class BottleneckFusion(SequenceFusion):
    """Sequences (B, 1 + T_m, D) -> (B, M D + M + D): multimodal bottleneck transformer (Nagrani et
    al. 2021, arXiv:2107.00135v3, fusion via attention bottlenecks).

    In each layer each modality attends to itself and to the bottleneck tokens; the new bottleneck
    is the mean of what the modalities that are there made of it. Read out are the first token of
    each (the paper averages a classifier over them) and the mean of the bottleneck.
    """

    def __init__(self, modalities: int, dim: int, heads: int, layers: int, tokens: int) -> None:
        super().__init__()
        self.width = modalities * (dim + 1) + dim
        self.start = nn.Embedding(tokens, dim)
        # Layer by layer, in each one for each modality.
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, heads) for _ in range(layers * modalities)
        )

    @classmethod
    def at(cls, place: Place) -> Self:
        tokens = place.config.fusion_tokens
        return cls(place.modalities, place.dim, place.heads, place.layers, tokens)

    def forward(self, tokens: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
        """(B, M D + M + D)."""
        rows, count = tokens[0].shape[0], self.start.num_embeddings
        which = torch.arange(count, device=tokens[0].device).expand(rows, -1)
        shared: Tensor = self.start(which)
        always = torch.ones_like(which, dtype=torch.bool)
        there = torch.stack([s[:, 0] for s in seen], 1)
        weight = flags(there, shared) / flags(there, shared).sum(1, keepdim=True).clamp(min=1.0)
        now, parts = list(tokens), []
        for place, block in enumerate(self.blocks):
            m = place % len(now)
            both = torch.cat([shared, now[m]], 1)
            both = block(both, torch.cat([always, seen[m]], 1))
            parts.append(both[:, :count])
            now[m] = both[:, count:]
            if m < len(now) - 1:
                continue
            mean = torch.einsum("bm,mbtd->btd", weight, torch.stack(parts))
            shared, parts = torch.where(there.any(1)[:, None, None], mean, shared), []
        first = [hide(x[:, 0], s[:, 0]) for x, s in zip(now, seen, strict=True)]
        return torch.cat([*first, flags(there, shared), shared.mean(1)], 1)
