"""Feature vectors: an array to (F,) raw numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedfuse.data.decoder import Decoder, Read
from fedfuse.data.media import array_of
from fedfuse.errors import DataError

if TYPE_CHECKING:
    from fedfuse.data.columns import Source
    from fedfuse.data.declaration import DeclaredModality
    from fedfuse.data.probe import Probe
    from fedfuse.data.spec import DataConfig

__all__ = ["VectorSpec", "fit_vector"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorSpec(Decoder):
    """`features` numbers."""

    features: int

    measured: ClassVar = True

    @classmethod
    def plan(cls, source: Source, config: DataConfig, probe: Probe) -> Self:
        """The usual length."""
        return cls(features=probe.shape(source, 1)[0])

    @property
    def shape(self) -> tuple[int]:
        """(F,)."""
        return (self.features,)

    def read(self, root: Path, cells: tuple[str, ...], said: DeclaredModality) -> Read:
        """The numbers. Raises DataError."""
        return Read(fit_vector(array_of(root, cells[0]), self))


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
