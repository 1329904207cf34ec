"""Numbers on a public scale: declared, or measured on what the server holds; never on train."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfuse.data.declaration import DeclaredModality

__all__ = ["LIMIT", "Scale", "find_scale"]

LIMIT = 10.0
"""Normalised values are clipped to [-LIMIT, LIMIT]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The public centre and spread of each feature, or of all; () is the fixed map asinh(x), and so
    is a spread of 0 for its feature."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def apply(
        self, values: NDArray[np.float32], coded: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float32]:
        """`values`, (N, ..., F) raw with NaN where missing, on this scale; NaN stays NaN.

        Features that are `coded` categories, (F,), stay as they are.
        """
        scaled = np.arcsinh(values)
        if self.mean:
            mean, std = np.array(self.mean), np.array(self.std)
            scaled = np.where(std > 0, (values - mean) / np.where(std > 0, std, 1), scaled)
        scaled = np.clip(scaled, -LIMIT, LIMIT).astype(np.float32)
        return scaled if coded is None else np.where(coded, values, scaled)


def find_scale(
    width: int, said: DeclaredModality, public: NDArray[np.float32], notes: list[str]
) -> Scale:
    """The scale of `width` features: the declared mean and std (or range); else, also for single
    ones of which nothing is declared, the mean and std of `public`, the valid split's values
    (N, ..., width); else asinh."""
    declared = Scale(mean=said.mean, std=said.std) if len(said.mean) in (1, width) else Scale()
    if declared.std and all(declared.std):
        return declared
    if len(public):
        mean, std = _moments(public.reshape(-1, width))
        if declared.std:
            open_ = np.array(declared.std) == 0
            mean = np.where(open_, mean, declared.mean)
            std = np.where(open_, std, declared.std)
        notes.append(
            f"{said.name}: normalised by mean and standard deviation of the valid split, "
            "taken as public; declare mean and std to state them"
        )
        return Scale(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    notes.append(f"{said.name}: no declared scale and no valid split, so mapped by asinh(x)")
    return declared


def _moments(public: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(mean, std) of each feature, missing values left out; 0 and 1 where there is nothing."""
    seen = ~np.isnan(public)
    count = np.maximum(seen.sum(axis=0), 1)
    values = np.where(seen, public, 0).astype(np.float64)
    mean = values.sum(axis=0) / count
    variance = (np.where(seen, values - mean, 0) ** 2).sum(axis=0) / count
    std = np.sqrt(variance)
    return mean, np.where(std > 1e-6 * np.maximum(1, np.abs(mean)), std, 1.0)
