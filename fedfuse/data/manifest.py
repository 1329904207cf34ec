"""The manifest: one row a record, read from CSV, JSONL or Parquet.

Columns: id, split, client, label or target, optional subject, and one for each modality. Cells are
text from here on, whatever the file's format: a blank is "", a list is JSON.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfuse.data.declaration import Declaration, find_declaration, read_declaration
from fedfuse.data.problem import Problem
from fedfuse.errors import DataError

__all__ = ["RESERVED", "SPLITS", "Manifest", "Row", "read_manifest"]

RESERVED = ("id", "split", "client", "label", "target", "subject")
SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}
"""The names of a split that are understood, and what each means."""


@dataclass(frozen=True, slots=True)
class Row:
    """One record's cells, and the manifest's line that it begins on."""

    line: int
    cells: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A manifest as read: nothing but its form has been checked. `problems`: unreadable lines."""

    path: Path
    root: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    declaration: Declaration | None
    problems: tuple[Problem, ...] = ()


def read_manifest(path: Path, *, labelled: bool = True) -> Manifest:
    """The manifest at `path` and the declaration beside it.

    Where it is not `labelled` it needs no column but one of a modality, and no declaration is read.

    Raises DataError where there is no such file, it cannot be read at all, it has no rows, or a
    column that every manifest needs is absent.
    """
    try:
        if not path.is_file():
            raise DataError("no such file", where=str(path), hint="give the path of a manifest")
        data = path.read_bytes()
    except (OSError, ValueError):
        raise DataError("cannot be opened", where=str(path), hint="check its rights") from None
    if not data.strip():
        raise DataError(
            "the manifest is empty",
            where=str(path),
            hint="it needs a header (id,split,client,label,...) and a row for each record",
        )
    try:
        columns, rows, problems = _READERS.get(path.suffix.lower(), _read_csv)(data)
    except UnicodeDecodeError:
        raise DataError("is not UTF-8 text", where=str(path), hint="save it as UTF-8") from None
    except (csv.Error, ValueError, RecursionError) as error:
        raise DataError(
            f"cannot be read as {path.suffix.lstrip('.') or 'csv'} ({type(error).__name__})",
            where=str(path),
            hint="a manifest is a .csv, .jsonl or .parquet file",
        ) from None
    _check_columns(columns, path, labelled=labelled)
    if not rows and not problems:
        raise DataError(
            "the manifest has a header, but no rows", where=str(path), hint="one row a record"
        )
    found = find_declaration(path.parent) if labelled else None
    return Manifest(
        path=path,
        root=path.parent,
        columns=columns,
        rows=tuple(rows),
        declaration=read_declaration(found) if found else None,
        problems=tuple(problems),
    )


_Table = tuple[tuple[str, ...], list[Row], list[Problem]]


def _read_csv(data: bytes) -> _Table:
    text = data.decode("utf-8-sig")
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = tuple(_column(name) for name in next(reader))
    rows, problems, line = [], [], reader.line_num + 1
    for cells in reader:
        if len(cells) == len(columns):
            stripped = (cell.strip() for cell in cells)
            rows.append(Row(line, dict(zip(columns, stripped, strict=True))))
        elif any(cell.strip() for cell in cells):
            what = f"{len(cells)} cells, but the header has {len(columns)}"
            hint = 'put cells with a comma in double quotes: "a, b"'
            problems.append(Problem(line=line, id="", column="", what=what, hint=hint))
        line = reader.line_num + 1
    return columns, rows, problems


def _read_jsonl(data: bytes) -> _Table:
    found: list[tuple[int, Mapping[str, Any]]] = []
    problems = []
    for line, text in enumerate(data.decode("utf-8-sig").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            record = None
        if isinstance(record, dict):
            found.append((line, {_column(key): value for key, value in record.items()}))
        else:
            what = "is not a JSON object"
            problems.append(Problem(line=line, id="", column="", what=what, hint="one a line"))
    if not found:
        raise ValueError("no JSON object")
    return *_from_records(found), problems


def _read_parquet(data: bytes) -> _Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
        records = table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError("not a Parquet file") from error
    columns, rows = _from_records(
        (line, {_column(key): value for key, value in record.items()})
        for line, record in enumerate(records, start=1)
    )
    return columns or tuple(_column(name) for name in table.column_names), rows, []


_READERS = {".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".parquet": _read_parquet}


def _from_records(
    records: Iterable[tuple[int, Mapping[str, Any]]],
) -> tuple[tuple[str, ...], list[Row]]:
    found = list(records)
    columns = tuple(dict.fromkeys(key for _, record in found for key in record))
    rows = [
        Row(line, {column: _cell(record.get(column)) for column in columns})
        for line, record in found
    ]
    return columns, rows


def _column(name: str) -> str:
    name = name.strip()
    return name.lower() if name.lower() in RESERVED else name


def _cell(value: Any) -> str:
    """A cell as the text that a CSV would hold."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int | float):
        return repr(value)
    try:
        return json.dumps(value)
    except (TypeError, ValueError):
        return str(value)


def _check_columns(columns: tuple[str, ...], path: Path, *, labelled: bool) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(f"two columns are named {twice[0]!r}", where=str(path), hint="rename one")
    absent = [name for name in ("id", "split") if name not in columns]
    if "label" not in columns and "target" not in columns:
        absent.append("label or target")
    if absent and labelled:
        raise DataError(
            f"no column {', '.join(absent)}",
            where=str(path),
            hint="the header needs id, split, client, label (or target) and the modalities",
        )
    if not set(columns) - set(RESERVED):
        raise DataError(
            "no modality column", where=str(path), hint="add a column for each modality"
        )
