"""Tables: columns of numbers and categories to F values, NaN where one is missing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedfuse.data.inline import BLANKS, number
from fedfuse.errors import DataError

__all__ = ["TableColumn", "TableSpec", "fit_table", "read_cells", "with_flags"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableColumn:
    """A column of numbers, or of the `categories` in sorted order (two: 0/1; more: one-hot)."""

    name: str
    categories: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """How many values it becomes."""
        return len(self.categories) if len(self.categories) > 2 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSpec:
    """Either `columns` of the manifest, or `features` numbers in one array."""

    columns: tuple[TableColumn, ...] = ()
    features: int = 0

    @property
    def width(self) -> int:
        """F."""
        return sum(column.width for column in self.columns) if self.columns else self.features

    @property
    def shape(self) -> tuple[int]:
        """(2F,): values, then flags."""
        return (2 * self.width,)

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

    Raises DataError naming the column of a cell that is no number, or infinite.
    """
    values: list[float] = []
    for cell, column in zip(cells, spec.columns, strict=True):
        values += _values(cell, column)
    return _as_float32(np.array(values, dtype=np.float64))


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
        if cell not in column.categories:
            raise DataError(f"column {column.name} holds an unknown category")
        place = column.categories.index(cell)
        if column.width == 1:
            return [float(place)]
        return [float(i == place) for i in range(column.width)]
    value = number(cell)
    if value is None:
        raise DataError(
            f"column {column.name} holds something that is no number",
            hint="leave the cell blank where the value is missing",
        )
    return [value]


def _as_float32(values: NDArray[np.float64] | NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        small = values.astype(np.float32)
    if np.isinf(small).any():
        raise DataError("holds an infinite number", hint="leave it blank where it is missing")
    return small
