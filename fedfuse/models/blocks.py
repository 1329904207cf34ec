"""Layers that several encoders and fusions share. No operation mixes rows of the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["TransformerBlock", "groups_for", "masked_mean"]


def groups_for(channels: int) -> int:
    """The number of GroupNorm groups: the largest of 4, 2, 1 that divides `channels`."""
    return next(groups for groups in (4, 2, 1) if channels % groups == 0)


def masked_mean(x: Tensor, seen: Tensor) -> Tensor:
    """(B, T, D), (B, T) bool -> (B, D): the mean over what is seen; zero where nothing is."""
    weight = seen.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1.0)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and a feed-forward layer (Vaswani et al. 2017, arXiv:1706.03762v7;
    pre-norm by Xiong et al. 2020, arXiv:2002.04745v2).

    All weights sit in Linear and LayerNorm, whose per-record gradients are exact.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """(B, T, D), (B, T) bool -> (B, T, D). Positions not seen are attended to by none."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).unbind(2)
        score = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(d // self.heads)
        # A finite bias keeps rows in which nothing is seen free of NaN.
        score = score.masked_fill(~seen[:, None, None, :], -1e4)
        mixed = torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v).reshape(b, t, d)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]
