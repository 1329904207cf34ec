"""All records of a manifest, decoded; and everything that is wrong with them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedfuse.batch import TargetKind
from fedfuse.data.columns import Source, undeclared
from fedfuse.data.decoder import Decoder, Read
from fedfuse.data.layout import Layout
from fedfuse.data.manifest import SPLITS, Row
from fedfuse.data.media import quiet
from fedfuse.data.problem import Problem
from fedfuse.data.target import label_value
from fedfuse.errors import DataError

__all__ = ["Decoded", "decode", "decode_column"]

_Key = tuple[str, ...]

_FEW = 4
_LONG_S = 1e-3
"""From so many seconds a file on, threads are worth it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """The good rows, in the manifest's order, and the problems of all.

    Of each modality `values[m]` (U, ...) holds every different content once, raw, and `index[m]`
    (N,) says which is record i's, -1 where it is absent. `target` is (N,), or (N, C) of labels.
    """

    rows: tuple[Row, ...]
    splits: tuple[str, ...]
    target: NDArray[np.float64]
    values: dict[str, NDArray[np.generic]]
    index: dict[str, NDArray[np.int64]]
    problems: tuple[Problem, ...]
    bad_rows: int


def decode(layout: Layout, *, need_client: bool) -> Decoded:
    """Every record that `layout` describes, each different file or text decoded once."""
    problems = list(layout.manifest.problems)
    unreadable_lines = len(problems)
    problems += _about_columns(layout)
    bad: set[int] = set()
    target, splits = _check_rows(layout, need_client, problems, bad)
    values, index = {}, {}
    rows = layout.manifest.rows
    for source, spec in zip(layout.sources, layout.specs, strict=True):
        values[source.name], index[source.name] = decode_column(layout, source, spec, problems, bad)
    good = [i for i in range(len(rows)) if i not in bad]
    return Decoded(
        rows=tuple(rows[i] for i in good),
        splits=tuple(splits[i] for i in good),
        target=target[good],
        values=values,
        index={name: places[good] for name, places in index.items()},
        problems=tuple(sorted(problems, key=lambda problem: problem.line)),
        bad_rows=len(bad) + unreadable_lines,
    )


def _about_columns(layout: Layout) -> list[Problem]:
    return [
        Problem(
            line=0, id="", column=name, warning=True,
            what="the column is not declared, so not used",
            hint="add it to the declaration's modalities, or remove it",
        )
        for name in undeclared(layout.manifest)
    ]  # fmt: skip


def _check_rows(
    layout: Layout, need_client: bool, problems: list[Problem], bad: set[int]
) -> tuple[NDArray[np.float64], list[str]]:
    """Targets and splits of all rows; what is wrong with ids, splits, labels, clients."""
    rows = layout.manifest.rows
    several = layout.target.kind is TargetKind.MULTILABEL
    shape = (len(rows), len(layout.target.classes)) if several else (len(rows),)
    target = np.zeros(shape, dtype=np.float64)
    splits: list[str] = []
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        name = row.cells["id"]
        found: list[tuple[str, str, str]] = []
        if not name:
            found.append(("id", "the id is blank", "give each record its own id"))
        elif first.setdefault(name, row.line) != row.line:
            what = f"the id is that of line {first[name]} too"
            found.append(("id", what, "give each record its own id"))
        split = SPLITS.get(row.cells["split"].lower(), "")
        splits.append(split)
        if not split:
            found.append(("split", "its split is unknown", "use train, valid or test"))
        value = label_value(row.cells[layout.target_column], layout.target)
        if value is None:
            found.append((layout.target_column, *_bad_label(layout)))
        else:
            target[(i, list(value)) if isinstance(value, tuple) else i] = 1 if several else value
        if need_client and split == "train" and not row.cells.get("client", ""):
            found.append(("client", "the client is blank", "say whose record it is"))
        if not any(s.present(tuple(row.cells[c] for c in s.columns)) for s in layout.all_sources):
            # Kept: its label still counts towards how often each class occurs.
            what = "all modalities are blank: the record has nothing but its label"
            problems.append(Problem(line=row.line, id=name, column="", what=what, warning=True))
        for column, what, hint in found:
            problems.append(Problem(line=row.line, id=name, column=column, what=what, hint=hint))
            bad.add(i)
    return target, splits


def _bad_label(layout: Layout) -> tuple[str, str]:
    classes = layout.target.classes
    if layout.target.kind is TargetKind.MULTILABEL:
        shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
        what = f"its labels are not all among the {len(classes)} declared"
        return what, f'labels are parted by ";", "-" is none of them; they are {shown}'
    if not classes:
        return "its target is not a finite number", "give each record a number"
    shown = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    return f"its label is none of the {len(classes)} classes", f"the classes are {shown}"


def decode_column(
    layout: Layout, source: Source, spec: Decoder, problems: list[Problem], bad: set[int]
) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """One modality: every different content once, raw, and each row's place among them, -1 where
    it is absent. What is wrong is added to `problems`, and the row's number to `bad`."""
    users: dict[_Key, list[int]] = {}
    for i, row in enumerate(layout.manifest.rows):
        key = tuple(row.cells[column] for column in source.columns)
        if source.present(key):
            users.setdefault(key, []).append(i)
    keys = list(users)
    index = np.full(len(layout.manifest.rows), -1, dtype=np.int64)
    arrays: list[NDArray[np.generic]] = []
    read = _reader(layout.root, source, spec)
    with quiet(), ThreadPoolExecutor(max_workers=2) as pool:
        for start in range(0, len(keys), spec.at_once):
            chunk = keys[start : start + spec.at_once]
            results = _read_all(read, chunk, pool)
            kept = [result for result in results if not isinstance(result, DataError)]
            place = sum(len(array) for array in arrays)
            for key, result in zip(chunk, results, strict=True):
                if isinstance(result, DataError):
                    _report(layout, source, users[key], result, problems, bad)
                    continue
                index[users[key]] = place
                place += 1
                if result.warning:
                    warning = DataError(result.warning)
                    _report(layout, source, users[key], warning, problems, None)
            arrays.append(spec.stack([result.value for result in kept]))
    return np.concatenate([spec.stack([]), *arrays]), index


def _read_all(
    read: Callable[[_Key], Read | DataError], keys: list[_Key], pool: ThreadPoolExecutor
) -> list[Read | DataError]:
    """What each of `keys` holds. Large files by several threads, as most decoders release the GIL;
    with small ones threads only wait for each other."""
    results, shortest = [], math.inf  # the first of all may load a library
    for key in keys[:_FEW]:
        began = time.perf_counter()
        results.append(read(key))
        shortest = min(shortest, time.perf_counter() - began)
    if shortest > _LONG_S:
        return results + list(pool.map(read, keys[_FEW:]))
    return results + [read(key) for key in keys[_FEW:]]


def _reader(root: Path, source: Source, spec: Decoder) -> Callable[[_Key], Read | DataError]:
    def read(key: _Key) -> Read | DataError:
        try:
            return spec.read(root, key, source.declared)
        except DataError as error:
            return error

    return read


def _report(
    layout: Layout,
    source: Source,
    users: list[int],
    error: DataError,
    problems: list[Problem],
    bad: set[int] | None,
) -> None:
    """A problem for every row that uses the content; `bad` None: a warning."""
    for i in users:
        row = layout.manifest.rows[i]
        problems.append(
            Problem(
                line=row.line, id=row.cells["id"], column=source.name, what=error.what,
                hint=error.hint, warning=bad is None,
            )
        )  # fmt: skip
        if bad is not None:
            bad.add(i)
