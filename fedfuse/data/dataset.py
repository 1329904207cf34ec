"""Records in memory or memory-mapped, gathered into batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedfuse.batch import Batch, Modality, Schema
from fedfuse.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Column", "Dataset", "Rows"]

Rows = NDArray[np.int64]
_SCHEMA = "schema.json"


@dataclass(frozen=True, slots=True)
class Column:
    """One modality: `values` (U, ...) each different content once; `index` (N,), -1 is absent."""

    values: NDArray[np.generic]
    index: NDArray[np.int64]


class Dataset:
    """Records with a schema. A view of some rows costs only its row numbers.

    >>> dataset = Dataset.open(folder)                                      # doctest: +SKIP
    >>> batch = dataset.take(np.array([3, 1, 4])).batch(np.arange(3))       # doctest: +SKIP
    """

    def __init__(
        self,
        schema: Schema,
        columns: Mapping[str, Column],
        target: NDArray[np.generic],
        ids: NDArray[np.str_],
        clients: NDArray[np.str_],
        subjects: NDArray[np.str_],
        *,
        rows: Rows | None = None,
        absent: Iterable[str] = (),
        folder: Path | None = None,
    ) -> None:
        self.schema = schema
        self._columns = dict(columns)
        self._target = target
        self._ids = ids
        self._clients = clients
        self._subjects = subjects
        self._rows = np.arange(len(target), dtype=np.int64) if rows is None else rows
        self.absent = frozenset(absent)
        self._folder = folder

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def folder(self) -> Path | None:
        """Where the records lie, if they are memory-mapped."""
        return self._folder

    @property
    def ids(self) -> NDArray[np.str_]:
        """(N,) the records' ids."""
        return self._ids[self._rows]

    @property
    def clients(self) -> NDArray[np.str_]:
        """(N,) whose each record is; "" where the manifest does not say."""
        return self._clients[self._rows]

    @property
    def subjects(self) -> NDArray[np.str_]:
        """(N,) the subject of each record; "" where the manifest has no such column."""
        return self._subjects[self._rows]

    def subject_numbers(self) -> Rows:
        """(N,) int64: the number of each record's subject, 0 to S - 1.

        The subject is the column "subject"; where that is blank in every record, the client is
        the subject; else a record whose cell is blank is a subject of its own.
        """
        names = self.subjects
        if not (names != "").any():
            names = self.clients
        alone = np.flatnonzero(names == "")
        _, numbers = np.unique(names, return_inverse=True)
        numbers = numbers.astype(np.int64)
        numbers[alone] = len(names) + np.arange(len(alone))
        return np.unique(numbers, return_inverse=True)[1].astype(np.int64)

    @property
    def labels(self) -> NDArray[np.generic]:
        """(N,) class indices int64, scaled targets float32, or (N, C) labels float32."""
        return self._target[self._rows]

    def present(self, name: str) -> NDArray[np.bool_]:
        """(N,) whether each record has the modality `name`."""
        if name in self.absent:
            return np.zeros(len(self), dtype=np.bool_)
        return self._columns[name].index[self._rows] >= 0

    def take(self, rows: Rows, *, absent: Iterable[str] = ()) -> Dataset:
        """A view of `rows`, whose modalities in `absent` are absent from every record."""
        return Dataset(
            self.schema, self._columns, self._target, self._ids, self._clients, self._subjects,
            rows=self._rows[np.asarray(rows, dtype=np.int64)],
            absent=self.absent | frozenset(absent),
            folder=self._folder,
        )  # fmt: skip

    def different(self, name: str) -> int:
        """How many different contents of the modality `name` are stored, for any row."""
        return len(self._columns[name].values)

    def contents(self, name: str, places: slice) -> Tensor:
        """Stored contents of a modality, as batches have them: (n, *shape)."""
        return _tensor(self._columns[name].values[places])

    def with_features(self, features: Mapping[str, NDArray[np.float32]]) -> Dataset:
        """The same records, with features (U, ...) in place of a modality's `different` contents;
        rows of absent ones are zero as before."""
        columns = {
            name: Column(features.get(name, column.values), column.index)
            for name, column in self._columns.items()
        }
        return Dataset(
            self.schema, columns, self._target, self._ids, self._clients, self._subjects,
            rows=self._rows, absent=self.absent,
        )  # fmt: skip

    def batch(self, rows: Rows) -> Batch:
        """The records `rows` (B,) of this view; B may be 0, and a row may come twice."""
        own = self._rows[np.asarray(rows, dtype=np.int64)]
        inputs, present = {}, {}
        for modality in self.schema.modalities:
            values, seen = self._gather(modality, own)
            inputs[modality.name], present[modality.name] = values, seen
        return Batch(inputs, present, _as_is(np.ascontiguousarray(self._target[own])))

    def save(self, folder: Path) -> None:
        """Writes the view's records into `folder` as .npy columns and the schema."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, modality in enumerate(self.schema.modalities):
            column = self._columns[modality.name]
            index = np.where(self.present(modality.name), column.index[self._rows], -1)
            used, places = np.unique(index[index >= 0], return_inverse=True)
            index[index >= 0] = places
            _save(folder / f"{number}.values.npy", column.values[used])
            _save(folder / f"{number}.index.npy", index)
        _save(folder / "target.npy", self.labels)
        _save(folder / "ids.npy", self.ids)
        _save(folder / "clients.npy", self.clients)
        _save(folder / "subjects.npy", self.subjects)
        text = json.dumps(asdict(self.schema), indent=1)
        (folder / _SCHEMA).write_text(text, encoding="utf-8")

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """The dataset that `save` wrote, memory-mapped. Raises DataError."""
        try:
            schema = Schema.from_dict(json.loads((folder / _SCHEMA).read_text(encoding="utf-8")))
            columns = {
                modality.name: Column(
                    _load(folder / f"{number}.values.npy"), _load(folder / f"{number}.index.npy")
                )
                for number, modality in enumerate(schema.modalities)
            }
            parts = [_load(folder / f"{n}.npy") for n in ("target", "ids", "clients", "subjects")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"no prepared data here ({type(error).__name__})",
                where=str(folder),
                hint="prepare the data again",
            ) from None
        return cls(schema, columns, *parts, folder=folder)

    def __reduce__(self) -> tuple[Callable[..., Dataset], tuple[Any, ...]]:
        """Memory-mapped data travels as its folder and rows, other data as its arrays."""
        if self._folder is not None:
            return _reopen, (self._folder, self._rows, self.absent)
        parts = (self._target, self._ids, self._clients, self._subjects)
        return _rebuild, (self.schema, self._columns, parts, self._rows, self.absent)

    def _gather(self, modality: Modality, own: Rows) -> tuple[Tensor, Tensor]:
        column = self._columns[modality.name]
        index = column.index[own]
        seen = index >= 0
        if modality.name in self.absent:
            seen[:] = False
        values = np.zeros((len(own), *column.values.shape[1:]), dtype=column.values.dtype)
        if seen.any():
            values[seen] = column.values[index[seen]]
        return _tensor(values), _as_is(seen)


def _tensor(values: NDArray[np.generic]) -> Tensor:
    """Stored values as the model takes them."""
    if values.dtype.kind == "i":
        return _as_is(values.astype(np.int64))
    if values.dtype == np.uint8:
        return _as_is(values.astype(np.float32)).div_(255)  # stored as bytes
    return _as_is(values.astype(np.float32))


def _as_is(values: NDArray[Any]) -> Tensor:
    """The same memory. Torch is loaded here: records are decoded and stored without it."""
    import torch

    return torch.from_numpy(values)


def _reopen(folder: Path, rows: Rows, absent: frozenset[str]) -> Dataset:
    return Dataset.open(folder).take(rows, absent=absent)


def _rebuild(
    schema: Schema,
    columns: dict[str, Column],
    parts: tuple[Any, Any, Any, Any],
    rows: Rows,
    absent: frozenset[str],
) -> Dataset:
    return Dataset(schema, columns, *parts, rows=rows, absent=absent)


def _save(path: Path, array: NDArray[Any]) -> None:
    np.save(path, np.ascontiguousarray(array), allow_pickle=False)


def _load(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # an empty array cannot be mapped
        array = np.load(path, allow_pickle=False)
    return np.asarray(array)
