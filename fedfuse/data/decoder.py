"""What every kind of modality gives: the public facts of its records, and how cells become arrays.

A kind is one file with a subclass of `Decoder`, and its line in `kinds.KINDS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fedfuse.data.columns import Source
    from fedfuse.data.declaration import DeclaredModality
    from fedfuse.data.probe import Probe
    from fedfuse.data.spec import DataConfig

__all__ = ["AT_ONCE", "Decoder", "Read"]

AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Read:
    """One record's content, and what to warn of."""

    value: NDArray[np.generic]
    warning: str = ""


class Decoder:
    """How the records of one modality are read. Its fields are public, and all that it knows."""

    __slots__ = ()

    suffixes: ClassVar[frozenset[str]] = frozenset()
    """Of files that are of this kind by their name."""
    stored: ClassVar[str] = "f4"
    """The type in which values are kept: "u1" are pixels, which become numbers from 0 to 1; "i4"
    numbers of words; "f4" anything else."""
    measured: ClassVar[bool] = False
    """Whether values are measurements in units of their own, to be brought to a public scale; NaN
    is then what is missing, until that is done."""

    @classmethod
    def plan(cls, source: Source, config: DataConfig, probe: Probe) -> Self:
        """The facts of `source`: from the settings, else declared, else inferred from what `probe`
        shows, which is said. Raises DataError where they cannot be settled."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one record, as the model gets it."""
        raise NotImplementedError

    @property
    def at_once(self) -> int:
        """How many records are read before they are stacked."""
        return AT_ONCE

    def read(self, root: Path, cells: tuple[str, ...], said: DeclaredModality) -> Read:
        """The content of a record's cells; files are below `root`. Raises DataError."""
        raise NotImplementedError

    def stack(self, values: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
        """What `read` gave of some records, U of them, as one array (U, ...)."""
        return np.array(values, dtype=self.stored).reshape(len(values), *self.shape)
