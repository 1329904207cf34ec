"""Attention of one modality's sequence to another's: in pairs, or to all others at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fedfuse.models.blocks import CrossBlock, TransformerBlock
from fedfuse.models.fusion.operator import Place, SequenceFusion, flags, hide

__all__ = ["CoAttentionFusion", "CrossAttentionFusion"]


class CrossAttentionFusion(SequenceFusion):
    """Sequences (B, 1 + T_m, D) -> (B, M D + M): the multimodal transformer (Tsai et al. 2019,
    arXiv:1906.00295v1, section 3.2).

    Each modality's sequence attends to each other one's, in a stack of its own for each ordered
    pair (low-level tokens of the other are asked in each layer); what it learned of all is put
    together by a layer and a self-attention block. In place of the paper's last step the first
    token is read out, which is the record as a whole.
    """

    def __init__(self, modalities: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.width = modalities * (dim + 1)
        self.layers = layers
        # For each ordered pair, in order, its stack of `layers` blocks.
        self.pairs = nn.ModuleList(
            CrossBlock(dim, heads) for _ in range(modalities * (modalities - 1) * layers)
        )
        self.join = nn.ModuleList(
            nn.Linear(max(1, modalities - 1) * dim, dim) for _ in range(modalities)
        )
        self.own = nn.ModuleList(TransformerBlock(dim, heads) for _ in range(modalities))

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim, place.heads, place.layers)

    def forward(self, tokens: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
        """(B, M D + M)."""
        out, blocks = [], iter(self.pairs)
        for m, (own, join) in enumerate(zip(tokens, self.join, strict=True)):
            told = []
            for k, other in enumerate(tokens):
                if k != m:
                    x = own
                    for _ in range(self.layers):
                        x = next(blocks)(x, other, seen[k])
                    told.append(x)
            joined = own + join(torch.cat(told or [own], 2))
            out.append(hide(self.own[m](joined, seen[m])[:, 0], seen[m][:, 0]))
        there = torch.stack([s[:, 0] for s in seen], 1)
        return torch.cat([*out, flags(there, out[0])], 1)


class CoAttentionFusion(SequenceFusion):
    """Sequences (B, 1 + T_m, D) -> (B, M D + M): co-attention layers (Lu et al. 2019, ViLBERT,
    arXiv:1908.02265v1, section 2.2): in each layer every modality asks all others at once, then
    itself. One stack for each modality, where cross-attention has one for each pair."""

    def __init__(self, modalities: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.width = modalities * (dim + 1)
        count = layers * modalities  # layer by layer
        self.ask = nn.ModuleList(CrossBlock(dim, heads) for _ in range(count))
        self.own = nn.ModuleList(TransformerBlock(dim, heads) for _ in range(count))

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim, place.heads, place.layers)

    def forward(self, tokens: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
        """(B, M D + M)."""
        now = list(tokens)
        before = now
        for place, (ask, own) in enumerate(zip(self.ask, self.own, strict=True)):
            m = place % len(now)
            if m == 0:  # a new layer
                before = list(now)
            others = [k for k in range(len(now)) if k != m]
            # Where there is one modality only, it asks itself, none of which counts as seen.
            pool = torch.cat([before[k] for k in others] or [before[m]], 1)
            told = [seen[k] for k in others] or [torch.zeros_like(seen[m])]
            now[m] = own(ask(before[m], pool, torch.cat(told, 1)), seen[m])
        out = [hide(x[:, 0], s[:, 0]) for x, s in zip(now, seen, strict=True)]
        there = torch.stack([s[:, 0] for s in seen], 1)
        return torch.cat([*out, flags(there, out[0])], 1)
