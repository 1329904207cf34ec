"""What a trained model says of new records, each with a set or an interval of stated coverage."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse import conformal
from fedfuse.batch import Target, TargetKind
from fedfuse.data.dataset import Rows
from fedfuse.data.reading import Unlabelled, read_records
from fedfuse.errors import UsageError
from fedfuse.use.files import write_private
from fedfuse.use.trained import Array, Predictor

__all__ = ["FORMATS", "Predictions", "as_text", "decided", "predict", "write"]

FORMATS = (".csv", ".jsonl", ".parquet")
_BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """What was predicted, and how far it can be relied on."""

    target: Target
    records: tuple[dict[str, Any], ...]
    """A record each, as plain values: see `predict`."""
    coverage: float
    calibrated_on: int
    """How many valid records sets and intervals rest on; 0: there are none."""
    why_none: str
    """Why there are no sets or intervals; "" where there are."""
    statement: str
    notes: tuple[str, ...]
    skipped: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "target": self.target.kind.value,
            "training": self.statement,
            "coverage": None if self.why_none else self.coverage,
            "calibrated_on": self.calibrated_on,
            "no_interval": self.why_none or None,
            "notes": list(self.notes),
            "skipped": self.skipped,
            "records": list(self.records),
        }


def predict(
    model: Predictor, manifest: Path, *, coverage: float = 0.9, skip_bad: bool = False
) -> Predictions:
    """What `model` says of each record of `manifest`, in its order.

    Every record has "line", "id", "prediction" and "modalities" (those that were there), and by
    target: classes "probabilities" and "set"; labels "probabilities", "possible" and "certain";
    numbers "interval". Sets and intervals are None where there is nothing to calibrate them on.

    Raises DataError as `read_records` does, UsageError where `coverage` is not between 0 and 1.
    """
    if not 0 < coverage < 1:
        raise UsageError(f"a coverage of {coverage:g} is not between 0 and 1")
    records = read_records(model.reading, manifest, skip_bad=skip_bad)
    target = model.reading.target
    found = model.calibration
    threshold = None if found is None else found.threshold(coverage)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(records.dataset), _BATCH):
        places = np.arange(start, min(start + _BATCH, len(records.dataset)))
        _, told = model.tell(records.dataset.batch(places))
        rows += _rows(records, places, told, target, threshold)
    return Predictions(
        target=target,
        records=tuple(rows),
        coverage=coverage,
        calibrated_on=0 if found is None else len(found.scores),
        why_none=_why_none(found, threshold, coverage),
        statement=model.statement,
        notes=records.notes,
        skipped=records.skipped,
    )


def decided(told: Array, target: Target) -> Any:
    """The prediction that (C,) probabilities come to: the likeliest class, the median of ordered
    ones, the labels that hold with more than one half; or the number itself."""
    match target.kind:
        case TargetKind.CLASSIFICATION | TargetKind.ORDINAL:
            exact = told.astype(np.float64)[None]
            return target.classes[int(conformal.likeliest(target.kind, exact)[0])]
        case TargetKind.MULTILABEL:
            return [name for name, p in zip(target.classes, told, strict=True) if p > 0.5]
        case TargetKind.REGRESSION:
            return float(told[0])


def as_text(found: Predictions, suffix: str = ".csv") -> bytes:
    """The records as a file of one of FORMATS."""
    if suffix == ".jsonl":
        lines = (json.dumps(row, allow_nan=False) + "\n" for row in found.records)
        return "".join(lines).encode()
    rows = [_flat(row) for row in found.records]
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return bytes(sink.getvalue().to_pybytes())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["line", "id"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write(found: Predictions, path: Path) -> None:
    """The records as the file `path`, by its suffix, readable by its owner only.

    Raises UsageError on another suffix, and where it cannot be written.
    """
    check_format(path)
    write_private(path, as_text(found, path.suffix.lower()))


def check_format(path: Path) -> None:
    """Raises UsageError where `path` has none of FORMATS."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(
            f"{path.name} is none of {', '.join(FORMATS)}", hint="name the file predictions.csv"
        )


def _rows(
    records: Unlabelled, places: Rows, told: Array, target: Target, threshold: Any
) -> Iterator[dict[str, Any]]:
    names = records.dataset.schema.names
    there = np.stack([records.dataset.present(name)[places] for name in names], 1)
    beside = _beside(told, target, threshold)
    for place, p, seen, extra in zip(places, told, there, beside, strict=True):
        row = records.rows[int(place)]
        yield {
            "line": row.line,
            "id": row.cells["id"],
            "prediction": decided(p, target),
            **extra,
            "modalities": [name for name, one in zip(names, seen, strict=True) if one],
        }


def _beside(told: Array, target: Target, threshold: Any) -> Iterator[dict[str, Any]]:
    """What stands beside each prediction: probabilities, and its set or interval."""
    classes, kind = np.array(target.classes), target.kind
    exact = told.astype(np.float64)
    if kind is TargetKind.REGRESSION:
        ends = None if threshold is None else conformal.intervals(exact, threshold)
        for k in range(len(told)):
            yield {"interval": None if ends is None else ends[k].tolist()}
        return
    chosen = None if threshold is None else conformal.sets(kind, exact, threshold)
    for k, p in enumerate(told):
        row: dict[str, Any] = {
            "probabilities": {name: float(x) for name, x in zip(target.classes, p, strict=True)}
        }
        if kind is TargetKind.MULTILABEL:
            holds = None if chosen is None else chosen[k]
            row["possible"] = None if holds is None else classes[holds[:, 1]].tolist()
            row["certain"] = None if holds is None else classes[~holds[:, 0]].tolist()
        else:
            row["set"] = None if chosen is None else classes[chosen[k]].tolist()
        yield row


def _why_none(found: conformal.Calibration | None, threshold: Any, coverage: float) -> str:
    if found is None:
        return "the run had no valid records to calibrate on"
    if threshold is None:
        return (
            f"{len(found.scores)} valid records are too few for a coverage of {coverage:g}: it "
            f"takes {found.needed(coverage)}"
        )
    return ""


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A record as cells: lists are parted by ";", probabilities and ends get columns of their own.
    Where there is no set or interval the cell says so."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if name == "probabilities":
            cells |= {f"p({label})": p for label, p in value.items()}
        elif name == "interval":
            cells["low"], cells["high"] = value or (None, None)
        elif isinstance(value, list):
            cells[name] = ";".join(value)
        else:
            cells[name] = value
    return cells
