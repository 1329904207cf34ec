"""Feature vectors: an array to (F,) raw numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfuse.errors import DataError

__all__ = ["VectorSpec", "fit_vector"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorSpec:
    """`features` numbers."""

    features: int

    @property
    def shape(self) -> tuple[int]:
        """(F,)."""
        return (self.features,)


def fit_vector(array: NDArray[np.float32], spec: VectorSpec) -> NDArray[np.float32]:
    """`array` as (F,). Raises DataError where it has another length, or NaN or inf."""
    flat = array.reshape(-1) if array.size == max(array.shape, default=1) else array
    if flat.shape != spec.shape:
        raise DataError(
            f"shape {array.shape}, but ({spec.features},) is needed",
            hint="every record of a vector has the same length",
        )
    if not np.isfinite(flat).all():
        raise DataError(
            "holds NaN or inf",
            hint='fill such features, or declare the modality as "table": NaN is a missing value',
        )
    return flat
