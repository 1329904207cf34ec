"""What every encoder gives: a record as one token; where a fusion asks for it, also its parts.

Every row is encoded, also absent (zero) ones: leaving rows out would break the pairing of
gradient rows and records on which clipping rests. The model masks absent tokens afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Encoder", "Features"]


class Features(NamedTuple):
    """What an encoder knows before its last layer."""

    whole: Tensor
    """(B, W): the record as one vector."""
    parts: Tensor | None = None
    """(B, T, P): its places, steps or words; None where it has none."""
    seen: Tensor | None = None
    """(B, T) bool: which parts are no padding; None where all are there."""


class Encoder(nn.Module):
    """A record's tensor (B, *shape) -> one token (B, D), and with `sequence` 1 + T of them.

    The first token of a sequence is the whole record, as `forward` gives it. The layer for parts
    exists only where a fusion asks for sequences, so nothing else pays for it.
    """

    project: nn.Linear
    place: nn.Linear | None

    def features(self, x: Tensor) -> Features:
        """(B, *shape) -> what the last layer projects."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B, D)."""
        return self.project(self.features(x).whole)  # type: ignore[no-any-return]

    def sequence(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, *shape) -> tokens (B, 1 + T, D), and which of them are no padding (B, 1 + T)."""
        whole, parts, seen = self.features(x)
        token = self.project(whole).unsqueeze(1)
        always = torch.ones(token.shape[:2], dtype=torch.bool, device=token.device)
        if parts is None or self.place is None:
            return token, always
        if seen is None:
            seen = always.expand(-1, parts.shape[1])
        return torch.cat([token, self.place(parts)], 1), torch.cat([always, seen], 1)

    def _ends(self, whole: int, parts: int, dim: int, *, sequence: bool) -> None:
        """Makes the last layers: (B, whole) -> (B, dim), (B, T, parts) -> (B, T, dim)."""
        self.project = nn.Linear(whole, dim)
        self.place = nn.Linear(parts, dim) if sequence else None
