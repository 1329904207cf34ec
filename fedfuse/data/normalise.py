"""Numbers on a public scale: declared, or measured on what the server holds; never on train."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedfuse.data.declaration import DeclaredModality

__all__ = ["LIMIT", "normalise"]

LIMIT = 10.0
"""Normalised values are clipped to [-LIMIT, LIMIT]."""


def normalise(
    values: NDArray[np.float32],
    said: DeclaredModality,
    public: NDArray[np.float32] | None,
    coded: NDArray[np.bool_] | None,
    notes: list[str],
) -> NDArray[np.float32]:
    """`values`, (N, ..., F) raw with NaN where missing, on a public scale; NaN stays NaN.

    The scale, one for each feature F, is the declared mean and std (or range); else the mean and
    std of `public`, the valid split's values; else the fixed map asinh(x). Features that are
    `coded` categories stay as they are.
    """
    width = values.shape[-1]
    if said.mean and len(said.mean) in (1, width):
        mean, std = np.array(said.mean), np.array(said.std)
        scaled = (values - mean) / std
    elif public is not None and len(public):
        mean, std = _moments(public.reshape(-1, width))
        scaled = (values - mean) / std
        notes.append(
            f"{said.name}: normalised by mean and standard deviation of the valid split, "
            "taken as public; declare mean and std to state them"
        )
    else:
        scaled = np.arcsinh(values)
        notes.append(f"{said.name}: no declared scale and no valid split, so mapped by asinh(x)")
    scaled = np.clip(scaled, -LIMIT, LIMIT).astype(np.float32)
    return scaled if coded is None else np.where(coded, values, scaled)


def _moments(public: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean, std) of each feature, missing values left out; 0 and 1 where there is nothing."""
    seen = ~np.isnan(public)
    count = np.maximum(seen.sum(axis=0), 1)
    values = np.where(seen, public, 0).astype(np.float64)
    mean = values.sum(axis=0) / count
    variance = (np.where(seen, values - mean, 0) ** 2).sum(axis=0) / count
    std = np.sqrt(variance)
    return mean, np.where(std > 1e-6 * np.maximum(1, np.abs(mean)), std, 1.0)
