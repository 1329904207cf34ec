"""Sensor series: an array to (T, F) raw readings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfuse.errors import DataError

__all__ = ["SeriesSpec", "fit_series"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesSpec:
    """`steps` readings of `features` numbers each."""

    steps: int
    features: int

    @property
    def shape(self) -> tuple[int, int]:
        """(T, F)."""
        return self.steps, self.features


def fit_series(array: NDArray[np.float32], spec: SeriesSpec) -> NDArray[np.float32]:
    """`array`, (t, F), cut to (T, F) or padded with NaN, which normalising makes 0.

    Raises DataError where it has another number of features, no readings, or NaN or inf.
    """
    if array.ndim == 1 and spec.features == 1:
        array = array[:, None]
    if array.ndim != 2 or array.shape[1] != spec.features or not len(array):
        raise DataError(
            f"shape {array.shape}, but (time, {spec.features}) is needed",
            hint="save each record as (time, features)",
        )
    if not np.isfinite(array).all():
        raise DataError("holds NaN or inf", hint="fill or leave out such readings")
    series = np.full(spec.shape, np.nan, dtype=np.float32)
    kept = array[: spec.steps]
    series[: len(kept)] = kept
    return series
