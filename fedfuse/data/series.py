"""Sensor series: an array to (T, F) raw readings."""

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

__all__ = ["SeriesSpec", "fit_series"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesSpec(Decoder):
    """`steps` readings of `features` numbers each."""

    steps: int
    features: int

    measured: ClassVar = True

    @classmethod
    def plan(cls, source: Source, config: DataConfig, probe: Probe) -> Self:
        """The usual width, and the longest series."""
        steps, features = probe.shape(source, 2)
        return cls(steps=config.series_steps or steps, features=features)

    @property
    def shape(self) -> tuple[int, int]:
        """(T, F)."""
        return self.steps, self.features

    def read(self, root: Path, cells: tuple[str, ...], said: DeclaredModality) -> Read:
        """The readings. Raises DataError."""
        array = array_of(root, cells[0])
        series = fit_series(array, self)
        steps = said.shape[0] if len(said.shape) == 2 else len(array)
        what = f"{len(array)} time steps, but {steps} are declared: cut or padded"
        return Read(series, what if len(array) != steps else "")


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
