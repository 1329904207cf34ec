"""Feature-wise modulation: what the other modalities say scales and shifts each token."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from fedfuse.models.fusion.operator import Place, TokenFusion, flags, hide

__all__ = ["FilmFusion"]


class FilmFusion(TokenFusion):
    """z (B, M, D), seen (B, M) -> (B, M D + M): FiLM (Perez et al. 2018, arXiv:1709.07871v2,
    equation 2), z_m' = (1 + gamma_m) z_m + beta_m, gamma_m and beta_m linear in all other tokens.

    Where no other modality is there a token stays as it is. As in the paper's
    own models gamma is the change from 1, so that what is modulated is not switched off at first.
    """

    def __init__(self, modalities: int, dim: int) -> None:
        super().__init__()
        self.width = modalities * (dim + 1)
        # Row m of the weights would see token m too; the mask below takes it out.
        self.generate = nn.ModuleList(
            nn.Linear(modalities * (dim + 1), 2 * dim) for _ in range(modalities)
        )

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim)

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """(B, M D + M)."""
        changed = []
        for m, layer in enumerate(self.generate):
            others = seen.clone()
            others[:, m] = False
            told = layer(torch.cat([hide(z, others).flatten(1), flags(others, z)], 1))
            gamma, beta = hide(told, others.any(1)).chunk(2, 1)
            changed.append(hide((1 + gamma) * z[:, m] + beta, seen[:, m]))
        return torch.cat([*changed, flags(seen, z)], 1)
