"""What a fusion operator is: three levels, by what reaches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from fedfuse.errors import ModelError
from fedfuse.models.knowledge import Graph
from fedfuse.models.spec import ModelConfig

__all__ = ["EarlyFusion", "Fusion", "Place", "SequenceFusion", "TokenFusion", "flags", "hide"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an operator stands in a model."""

    modalities: int
    outputs: int
    """Of the whole model, for an operator that needs no head."""
    config: ModelConfig
    raw: Sequence[int] = ()
    """The widths of the raw features, for early fusion."""
    graph: Graph | None = None

    @property
    def dim(self) -> int:
        """D, the width of a token."""
        return self.config.dim

    @property
    def width(self) -> int:
        """What the operators give that can choose."""
        return self.config.fusion_width or self.config.dim

    @property
    def layers(self) -> int:
        """Layers of the operators that have layers."""
        return self.config.fusion_layers

    @property
    def heads(self) -> int:
        """Attention heads. Raises ModelError where they do not divide the width of a token."""
        heads = self.config.fusion_heads
        if self.dim % heads:
            raise ModelError(
                f"model.dim = {self.dim}, but it must be a multiple of its {heads} heads",
                where="model",
                hint="change model.dim or model.fusion_heads",
            )
        return heads

    @property
    def rank(self) -> int:
        """Of products between modalities."""
        return self.config.fusion_rank


class Fusion(nn.Module):
    """Some modalities -> one vector. No operation mixes rows, and all weights sit in layers whose
    per-record gradients are exact: Linear, LayerNorm, Embedding; never a bare Parameter."""

    width: int
    """Of the vector; 0 where the operator gives the outputs themselves, without a head."""

    @classmethod
    def at(cls, place: Place) -> Self:
        """The operator as it is built in a model. Raises ModelError where it cannot be."""
        raise NotImplementedError

    @property
    def level(self) -> str:
        """ "early", "intermediate" or "late"."""
        if isinstance(self, EarlyFusion):
            return "early"
        return "intermediate" if self.width else "late"


class TokenFusion(Fusion):
    """One token a modality."""

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """z (B, M, D), zero where absent, and seen (B, M) bool -> (B, width)."""
        raise NotImplementedError


class SequenceFusion(Fusion):
    """A sequence of tokens a modality; the first one is the whole record of it."""

    def forward(self, tokens: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensor:
        """M tokens (B, 1 + T_m, D), zero where absent; seen (B, 1 + T_m) bool -> (B, width)."""
        raise NotImplementedError


class EarlyFusion(Fusion):
    """Records as they are, before anything is learned of one alone."""

    def forward(self, features: Sequence[Tensor], seen: Tensor) -> Tensor:
        """M features (B, F_m), zero where absent, and seen (B, M) bool -> (B, width)."""
        raise NotImplementedError


def hide(x: Tensor, seen: Tensor) -> Tensor:
    """x (B, ...), seen (B,) or more leading axes of x: x, and zero where not seen.

    where and not a product: what is not seen gets a gradient of exactly zero.
    """
    return torch.where(seen.view(*seen.shape, *[1] * (x.dim() - seen.dim())), x, x.new_zeros(()))


def flags(seen: Tensor, like: Tensor) -> Tensor:
    """Booleans as numbers of the type of `like`."""
    return seen.to(like.dtype)
