"""What is predicted: from the declaration, or inferred from the cells and said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedfuse.batch import Target, TargetKind
from fedfuse.data.declaration import Declaration
from fedfuse.data.inline import number
from fedfuse.data.manifest import SPLITS, Manifest
from fedfuse.errors import DataError

__all__ = ["coded_labels", "find_target", "label_value", "target_column", "with_scale"]

_FEW = 20
_NO_LABEL = frozenset({"-", "none"})
"""How a record says that it has none of the labels; a blank cell says nothing."""


def target_column(manifest: Manifest) -> str:
    """The column that is predicted."""
    said, columns = manifest.declaration, manifest.columns
    if said and said.target_column in columns and said.target_column not in ("id", "split"):
        return said.target_column
    first = "target" if said and said.task is TargetKind.REGRESSION else "label"
    other = "label" if first == "target" else "target"
    return first if first in columns else other


def find_target(manifest: Manifest, column: str, notes: list[str]) -> Target:
    """The target, without centre and scale yet; every inference is a line in `notes`.

    Raises DataError where the cells cannot be what is declared.
    """
    said = manifest.declaration
    cells = [row.cells[column] for row in manifest.rows if row.cells[column]]
    if not cells:
        raise DataError(
            f"column {column} is blank in every record",
            where=str(manifest.path),
            hint="give each record a class or a number",
        )
    if "label" in manifest.columns and "target" in manifest.columns:
        notes.append(f"both label and target are there: {column} is predicted")
    task = said.task if said else None
    if task is None:
        task = _task(column, cells, said, notes)
    if task is TargetKind.REGRESSION:
        return Target(kind=task, span=said.span if said else ())
    if task is TargetKind.MULTILABEL:
        parts = {part for cell in cells for part in _labels(cell)}
        classes = _classes(manifest, sorted(parts) or cells, notes)
    else:
        classes = _classes(manifest, cells, notes)
    if task is TargetKind.ORDINAL and not (said and said.num_classes):
        notes.append("classes: taken to be in sorted order; declare them to state their order")
    return Target(kind=task, classes=classes, priors=said.priors if said else ())


def label_value(cell: str, target: Target) -> float | int | tuple[int, ...] | None:
    """The class index or the number in `cell`, or the indices of its labels; None where it is
    none of these.

    A class's name goes before an index, so that names such as "1", "2" mean what they say. Labels
    are parted by semicolons: "a;b"; "-" or "none" is no label at all.
    """
    if target.kind is TargetKind.MULTILABEL:
        if not cell:
            return None
        found = [_class_index(part, target) for part in _labels(cell, target)]
        return None if None in found else tuple(index for index in found if index is not None)
    if target.kind is TargetKind.REGRESSION:
        value = number(cell)
        # the store is float32
        return value if value is not None and math.isfinite(value) and abs(value) < 3e38 else None
    return _class_index(cell, target)


def coded_labels(values: NDArray[np.float64], target: Target) -> NDArray[np.generic]:
    """What decoding gave, (N,) or (N, C) float64, as a batch has it: see `TargetKind`."""
    match target.kind:
        case TargetKind.REGRESSION:
            return ((values - target.centre) / target.scale).astype(np.float32)
        case TargetKind.MULTILABEL:
            return values.astype(np.float32)
        case _:
            return values.astype(np.int64)


def _labels(cell: str, target: Target | None = None) -> list[str]:
    """The labels in a cell."""
    text = cell.strip()
    if text.lower() in _NO_LABEL and not (target and text in target.classes):
        return []
    return [part.strip() for part in text.split(";") if part.strip()]


def _class_index(cell: str, target: Target) -> int | None:
    if cell in target.classes:
        return target.classes.index(cell)
    whole = _whole(cell)
    if whole is None:
        return None
    if str(whole) in target.classes:
        return target.classes.index(str(whole))
    numeric = all(_whole(name) is not None for name in target.classes)
    return whole if not numeric and 0 <= whole < len(target.classes) else None


def with_scale(
    target: Target,
    said: Declaration | None,
    held: dict[str, Sequence[float]],
    notes: list[str],
) -> Target:
    """A regression target with its public centre and scale.

    From the declaration; else from the values of the valid or the test split in `held`, which the
    server holds. Never from the train split.
    """
    if target.kind is not TargetKind.REGRESSION:
        return target
    if said and said.centre is not None and said.scale is not None:
        return replace(target, centre=said.centre, scale=said.scale)
    for split in ("valid", "test"):
        values = held.get(split, ())
        if len(values) > 1:
            centre = math.fsum(values) / len(values)
            spread = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / len(values))
            notes.append(
                f"target: centre and scale are the mean and standard deviation of the {split} "
                "split, taken as public; declare its range to state them"
            )
            return replace(target, centre=centre, scale=spread if spread > 0 else 1.0)
    notes.append("target: no declared range and no public values, so used as it is")
    return target


def _task(column: str, cells: list[str], said: Declaration | None, notes: list[str]) -> TargetKind:
    if said and said.num_classes:
        return TargetKind.CLASSIFICATION
    values = [number(cell) for cell in cells]
    if column == "target" and all(value is not None for value in values):
        notes.append("task: regression, inferred from the column target")
        return TargetKind.REGRESSION
    fractions = {v for v in values if v is not None and not v.is_integer()}
    if None not in values and len(fractions) > _FEW:
        notes.append(f"task: regression, inferred from many different fractions in {column}")
        return TargetKind.REGRESSION
    notes.append(f"task: classification, inferred from the column {column}")
    return TargetKind.CLASSIFICATION


def _classes(manifest: Manifest, cells: list[str], notes: list[str]) -> tuple[str, ...]:
    said = manifest.declaration
    if said and said.classes:
        return said.classes
    whole = [_whole(cell) for cell in cells]
    found = {value for value in whole if value is not None}
    numeric = 2 * sum(value is not None for value in whole) > len(cells)
    if said and said.num_classes and numeric:
        return tuple(str(k) for k in range(said.num_classes))
    names = tuple(str(k) for k in sorted(found)) if numeric else tuple(sorted(set(cells)))
    if said and said.num_classes and len(names) != said.num_classes:
        raise DataError(
            f"num_classes = {said.num_classes}, but the labels name {len(names)} classes",
            where=str(said.path),
            hint="name the classes in order: classes = [...]",
        )
    if len(names) < 2:
        raise DataError(
            "every record has the same label",
            where=str(manifest.path),
            hint="declare the classes, or the target's task",
        )
    if len(names) > 1000 and 2 * len(names) > len(cells):
        raise DataError(
            f"{len(names)} different labels for {len(cells)} records",
            where=str(manifest.path),
            hint='declare the classes, or task = "regression"',
        )
    source = sorted({SPLITS.get(row.cells["split"].lower(), "") for row in manifest.rows} - {""})
    notes.append(f"classes: {len(names)}, inferred from the labels of {', '.join(source)}")
    return names


def _whole(cell: str) -> int | None:
    value = number(cell)
    if value is None or not math.isfinite(value) or not value.is_integer():
        return None
    return int(value)
