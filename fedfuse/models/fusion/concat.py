"""Concatenation: the tokens side by side, with flags that say which are there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["ConcatFusion"]


class ConcatFusion(nn.Module):
    """z (B, M, D), seen (B, M) -> (B, M D + M). Absent tokens are zeros (Baltrusaitis, Ahuja and
    Morency 2019, arXiv:1705.09406v2, section 6: early, model-agnostic fusion)."""

    def forward(self, z: Tensor, seen: Tensor) -> Tensor:
        """No parameters: the head learns what to do with each place."""
        return torch.cat([z.flatten(1), seen.to(z.dtype)], 1)
