"""Products of modalities: bilinear pairs, the whole outer product, and its low-rank form."""

from __future__ import annotations

from itertools import combinations
from typing import Self

import torch
from torch import Tensor, nn

from fedfuse.errors import ModelError
from fedfuse.models.fusion.operator import Place, TokenFusion, flags, hide

__all__ = ["LowRankFusion", "MultiplicativeFusion", "TensorFusion"]

_MOST = 65_536


class MultiplicativeFusion(TokenFusion):
    """z (B, M, D), seen (B, M) -> (B, width): multiplicative interactions (Jayakumar et al. 2020,
    "Multiplicative Interactions and Where to Find Them", ICLR, equation 1), one for each pair.

    x' W z + U z + V x + b, with x and z brought to `rank` numbers for the three-way tensor W. A
    pair of which one is absent has no product.
    """

    def __init__(self, modalities: int, dim: int, rank: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.pairs = tuple(combinations(range(modalities), 2))
        self.down = nn.ModuleList(nn.Linear(dim, rank) for _ in range(modalities))
        # A Linear of x to a matrix, which is then applied to z, is the three-way tensor.
        self.matrix = nn.ModuleList(nn.Linear(rank, rank * width, bias=False) for _ in self.pairs)
        self.linear = nn.Linear(modalities * (dim + 1), width)
        self.rank = rank

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim, place.rank, place.width)

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """(B, width)."""
        out: Tensor = self.linear(torch.cat([z.flatten(1), flags(seen, z)], 1))
        low = [hide(layer(z[:, m]), seen[:, m]) for m, layer in enumerate(self.down)]
        for (a, b), layer in zip(self.pairs, self.matrix, strict=True):
            matrix = layer(low[a]).view(z.shape[0], self.rank, self.width)
            out = out + torch.einsum("br,brw->bw", low[b], matrix)
        return out


class TensorFusion(TokenFusion):
    """z (B, M, D), seen (B, M) -> (B, (rank + 1)^M): the outer product of [z_m, 1] over all
    modalities (Zadeh et al. 2017, arXiv:1707.07250v1, "Tensor Fusion Layer"), each brought to
    `rank` numbers first. Of an absent modality only the 1 is left, so products of the others stay.

    Raises ModelError where the product would be larger than 65,536 numbers.
    """

    def __init__(self, modalities: int, dim: int, rank: int) -> None:
        super().__init__()
        self.width = (rank + 1) ** modalities
        if self.width > _MOST:
            raise ModelError(
                f"the outer product of {modalities} modalities at rank {rank} is {self.width} "
                "numbers wide",
                where="model.fusion",
                hint='lower model.fusion_rank, or take model.fusion = "low-rank"',
            )
        self.down = nn.ModuleList(nn.Linear(dim, rank) for _ in range(modalities))

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim, place.rank)

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """(B, (rank + 1)^M)."""
        product = z.new_ones(z.shape[0], 1)
        for m, layer in enumerate(self.down):
            own = hide(layer(z[:, m]), seen[:, m])
            own = torch.cat([own, own.new_ones(own.shape[0], 1)], 1)
            product = torch.einsum("bp,bq->bpq", product, own).flatten(1)
        return product


class LowRankFusion(TokenFusion):
    """z (B, M, D), seen (B, M) -> (B, width): low-rank multimodal fusion (Liu et al. 2018,
    arXiv:1806.00064v1, its parallel decomposition): the sum over `rank` terms of products over the
    modalities of W_m^(r) [z_m, 1], without making the outer product. An absent modality's factor
    is 1."""

    def __init__(self, modalities: int, dim: int, rank: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.rank = rank
        factors = [nn.Linear(dim, rank * width) for _ in range(modalities)]
        for layer in factors:  # products near 1, so that no factor starts by switching off all
            nn.init.ones_(layer.bias)
        self.factor = nn.ModuleList(factors)
        self.sum = nn.Linear(rank * width, width)

    @classmethod
    def at(cls, place: Place) -> Self:
        return cls(place.modalities, place.dim, place.rank, place.width)

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """(B, width)."""
        product = z.new_ones(z.shape[0], self.rank * self.width)
        for m, layer in enumerate(self.factor):
            own = layer(z[:, m])
            product = product * torch.where(seen[:, m, None], own, torch.ones_like(own))
        return self.sum(product)  # type: ignore[no-any-return]
