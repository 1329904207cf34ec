"""Side by side: tokens concatenated, as they are or through layers; raw records likewise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from fedfuse.models.fusion.operator import EarlyFusion, Place, TokenFusion, flags

__all__ = ["ConcatFusion", "MlpFusion", "RawFusion"]


class ConcatFusion(TokenFusion):
    """z (B, M, D), seen (B, M) -> (B, M D + M): the tokens side by side, with flags that say which
    are there (Baltrusaitis, Ahuja and Morency 2019, arXiv:1705.09406v2, section 6)."""

    def __init__(self, modalities: int, dim: int) -> None:
        super().__init__()
        self.width = modalities * (dim + 1)

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim)

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """No parameters: the head learns what to do with each place."""
        return torch.cat([z.flatten(1), flags(seen, z)], 1)


class MlpFusion(TokenFusion):
    """z (B, M, D), seen (B, M) -> (B, width): hidden layers over the concatenation (Ngiam et al.
    2011, "Multimodal Deep Learning", ICML: shared layers over all modalities)."""

    def __init__(self, modalities: int, dim: int, width: int, layers: int) -> None:
        super().__init__()
        self.width = width
        self.layers = _hidden(modalities * (dim + 1), width, layers)

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim, place.width, place.layers)

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """(B, width)."""
        return self.layers(torch.cat([z.flatten(1), flags(seen, z)], 1))  # type: ignore[no-any-return]


class RawFusion(EarlyFusion):
    """features (B, F_m) of each modality, seen (B, M) -> (B, width): early fusion, hidden layers
    over the records as they are (Baltrusaitis, Ahuja and Morency 2019, arXiv:1705.09406v2,
    section 6.1)."""

    def __init__(self, features: Sequence[int], width: int, layers: int) -> None:
        super().__init__()
        self.width = width
        self.layers = _hidden(sum(features) + len(features), width, layers)

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.raw, place.width, place.layers)

    def forward(self, features: Sequence[Tensor], seen: Tensor) -> Tensor:
        """(B, width)."""
        return self.layers(torch.cat([*features, flags(seen, features[0])], 1))  # type: ignore[no-any-return]


def _hidden(inputs: int, width: int, layers: int) -> nn.Sequential:
    made: list[nn.Module] = []
    for layer in range(layers):
        made += [nn.Linear(width if layer else inputs, width), nn.LayerNorm(width), nn.GELU()]
    return nn.Sequential(*made)
