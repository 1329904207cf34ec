"""How long a record's gradient is: never too short by more than clipping leaves room for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["lengths"]

_RUN = 1024


def lengths(x: Tensor) -> Tensor:
    """(..., n) -> (...): Euclidean norms, to some 2e-7 in float32, however long.

    torch adds squares up one after the other: of a million numbers the norm comes out 1e-5 too
    small, of twenty million 1e-3, and a record clipped by it would move the sum by so much more
    than C. So runs of numbers are added up first, and then their norms.
    """
    while x.shape[-1] > _RUN:
        whole = x.shape[-1] // _RUN * _RUN
        runs = torch.linalg.vector_norm(x[..., :whole].unflatten(-1, (-1, _RUN)), dim=-1)
        x = runs if whole == x.shape[-1] else torch.cat([runs, x[..., whole:]], -1)
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norms
