"""Layers that several encoders and fusions share. No operation mixes rows of the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CrossBlock", "TransformerBlock", "groups_for", "masked_mean", "sinusoids"]


def groups_for(channels: int) -> int:
    """The number of GroupNorm groups: the largest of 4, 2, 1 that divides `channels`."""
    return next(groups for groups in (4, 2, 1) if channels % groups == 0)


def masked_mean(x: Tensor, seen: Tensor) -> Tensor:
    """(B, T, D), (B, T) bool -> (B, D): the mean over what is seen; zero where nothing is."""
    weight = seen.unsqueeze(-1).to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1.0)


def sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    """(L, width) fixed positions (Vaswani et al. 2017, arXiv:1706.03762v7, section 3.5)."""
    half = (width + 1) // 2
    rates = torch.exp(
        torch.arange(half, device=like.device, dtype=like.dtype) * (-math.log(1e4) / half)
    )
    angle = torch.arange(length, device=like.device, dtype=like.dtype)[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width]


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


class CrossBlock(nn.Module):
    """Pre-norm attention of one sequence to another, and a feed-forward layer: the cross-modal
    block of Tsai et al. 2019 (arXiv:1906.00295v1, sections 3.1 and 3.2)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.norm_other = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, other: Tensor, seen: Tensor) -> Tensor:
        """x (B, T, D) asks other (B, S, D), of which seen (B, S) bool is there -> (B, T, D).

        Where nothing of `other` is there, `x` learns nothing of it.
        """
        b, t, d = x.shape
        size = d // self.heads
        q = self.query(self.norm(x)).view(b, t, self.heads, size)
        kv = self.key_value(self.norm_other(other)).view(b, other.shape[1], 2, self.heads, size)
        k, v = kv.unbind(2)
        score = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size)
        score = score.masked_fill(~seen[:, None, None, :], -1e4)
        mixed = torch.einsum("bhqk,bkhd->bqhd", score.softmax(-1), v).reshape(b, t, d)
        told = self.out(mixed)
        x = x + torch.where(seen.any(1)[:, None, None], told, torch.zeros_like(told))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]
