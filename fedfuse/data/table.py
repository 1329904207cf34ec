"""Tables: columns of numbers and categories to F values, NaN where one is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedfuse.data.decoder import Decoder, Read
from fedfuse.data.inline import BLANKS, number
from fedfuse.data.media import array_of
from fedfuse.errors import DataError

if TYPE_CHECKING:
    from fedfuse.data.columns import Source
    from fedfuse.data.declaration import DeclaredModality
    from fedfuse.data.probe import Probe
    from fedfuse.data.spec import DataConfig

__all__ = [
    "TableColumn", "TableSpec", "fit_table", "read_cells", "scale_of", "unknown_in", "with_flags",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TableColumn:
    """A column of numbers, or of `categories` (two: -1 and 1; more: one value each, 0 or 1).

    A category that is none of them is 0 throughout, and not flagged as missing: it has a code of
    its own, and one that no weight is trained for.
    """

    name: str
    categories: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 0.0
    """The declared centre and spread of numbers; a spread of 0: not declared."""

    @property
    def width(self) -> int:
        """How many values it becomes."""
        return len(self.categories) if len(self.categories) > 2 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpec(Decoder):
    """Either `columns` of the manifest, or `features` numbers in one array."""

    columns: tuple[TableColumn, ...] = ()
    features: int = 0

    measured: ClassVar = True

    @classmethod
    def plan(cls, source: Source, config: DataConfig, probe: Probe) -> Self:
        """The columns, or the width of the array."""
        if source.table:
            return cls(columns=source.table)
        return cls(features=probe.shape(source, 1)[0])

    @property
    def width(self) -> int:
        """F."""
        return sum(column.width for column in self.columns) if self.columns else self.features

    @property
    def shape(self) -> tuple[int]:
        """(2F,): values, then flags."""
        return (2 * self.width,)

    def read(self, root: Path, cells: tuple[str, ...], said: DeclaredModality) -> Read:
        """The values, NaN where one is missing. Raises DataError."""
        if self.columns:
            return Read(read_cells(cells, self), unknown_in(cells, self))
        return Read(fit_table(array_of(root, cells[0]), self))

    def stack(self, values: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
        """(U, F): flags come with the scale."""
        return np.array(values, dtype=self.stored).reshape(len(values), self.width)

    @property
    def coded(self) -> NDArray[np.bool_]:
        """(F,): where a value codes a category, and so is not to be normalised."""
        if not self.columns:
            return np.zeros(self.features, dtype=bool)
        return np.repeat(
            [bool(column.categories) for column in self.columns],
            [column.width for column in self.columns],
        )


def read_cells(cells: tuple[str, ...], spec: TableSpec) -> NDArray[np.float32]:
    """The (F,) values in the cells of one row; NaN where a cell is blank.

    Raises DataError naming the column of a cell that is no number, or infinite. A category that is
    not known is no error; `unknown_in` tells of it.
    """
    values: list[float] = []
    for cell, column in zip(cells, spec.columns, strict=True):
        values += _values(cell, column)
    return _as_float32(np.array(values, dtype=np.float64))


def unknown_in(cells: tuple[str, ...], spec: TableSpec) -> str:
    """What to say of categories in the cells of one row that are not known; "" where all are."""
    found = [
        f"column {column.name} holds a category that is none of the {len(column.categories)} known"
        for cell, column in zip(cells, spec.columns, strict=True)
        if column.categories
        and cell.lower() not in BLANKS
        and _place(cell, column.categories) is None
    ]
    return "; ".join(found)


def scale_of(columns: Sequence[TableColumn]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(means, spreads) as declared of each value that `columns` become, a spread of 0 where it is
    not declared; () and () where none is."""
    if not any(column.std for column in columns):
        return (), ()
    parts = [
        (0.0, 1.0) if column.categories else (column.mean, column.std)
        for column in columns
        for _ in range(column.width)
    ]
    return tuple(mean for mean, _ in parts), tuple(std for _, std in parts)


def fit_table(array: NDArray[np.float32], spec: TableSpec) -> NDArray[np.float32]:
    """An array as (F,) values, where NaN is a missing one. Raises DataError."""
    flat = array.reshape(-1) if array.size == max(array.shape, default=1) else array
    if flat.shape != (spec.width,):
        raise DataError(
            f"shape {array.shape}, but ({spec.width},) is needed",
            hint="every record of a table has the same columns; NaN is a missing value",
        )
    return _as_float32(flat)


def with_flags(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, F) with NaN to (N, 2F): values, 0 where missing, then flags, 1 where missing."""
    missing = np.isnan(values)
    return np.concatenate([np.where(missing, 0, values), missing], axis=1, dtype=np.float32)


def _values(cell: str, column: TableColumn) -> list[float]:
    if column.categories:
        if cell.lower() in BLANKS:
            return [math.nan] * column.width
        place = _place(cell, column.categories)
        if column.width == 1:
            return [0.0 if place is None else 2.0 * place - 1]
        return [float(i == place) for i in range(column.width)]
    value = number(cell)
    if value is None:
        raise DataError(
            f"column {column.name} holds something that is no number",
            hint="leave the cell blank where the value is missing",
        )
    return [value]


def _place(cell: str, categories: tuple[str, ...]) -> int | None:
    """The category's place; "2.0" is "2" where that is one."""
    if cell not in categories:
        value = number(cell)
        cell = str(int(value)) if value is not None and value.is_integer() else cell
    return categories.index(cell) if cell in categories else None


def _as_float32(values: NDArray[np.float64] | NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        small = values.astype(np.float32)
    if np.isinf(small).any():
        raise DataError("holds an infinite number", hint="leave it blank where it is missing")
    return small
