"""Late: each modality makes up its mind alone; opinions or beliefs are put together."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.models.fusion.operator import Place, TokenFusion, hide

__all__ = ["ExpertsFusion", "LateFusion"]


class LateFusion(TokenFusion):
    """z (B, M, D), seen (B, M) -> outputs (B, C): the sum of what a head for each modality says
    (Kittler et al. 1998, doi:10.1109/34.667881, the product rule, in logarithms: where modalities
    are independent given the class, the sum of logits is Bayes' rule). One that is absent says
    nothing; a record with no modality gives zeros."""

    width = 0

    def __init__(self, modalities: int, dim: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, outputs))
            if hidden
            else nn.Linear(dim, outputs)
            for _ in range(modalities)
        )

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim, place.config.head_width, place.outputs)

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """(B, C)."""
        return hide(self.said(z), seen).sum(1)

    def said(self, z: Tensor) -> Tensor:
        """(B, M, C): what each modality's head says, also of one that is absent."""
        return torch.stack([head(z[:, m]) for m, head in enumerate(self.heads)], 1)


class ExpertsFusion(TokenFusion):
    """z (B, M, D), seen (B, M) -> (B, D): the mean of a product of Gaussian experts (Wu and
    Goodman 2018, arXiv:1802.05335v3, as MVAE infers its joint posterior).

    Each modality gives a mean mu_m and a precision T_m in each coordinate, a standard normal prior
    is one more expert, and the product has the mean sum_m T_m mu_m / (1 + sum_m T_m). An absent
    modality has no expert. Nothing is sampled: the mean goes on to the head.
    """

    def __init__(self, modalities: int, dim: int) -> None:
        super().__init__()
        self.width = dim
        self.experts = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(modalities))

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim)

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """A record with no modality at all gives the prior's mean, zero."""
        both = torch.stack([layer(z[:, m]) for m, layer in enumerate(self.experts)], 1)
        mean, precision = both.chunk(2, 2)
        precision = hide(F.softplus(precision), seen)
        return (precision * mean).sum(1) / (1.0 + precision.sum(1))
