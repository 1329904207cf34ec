"""How a run reads a record, kept with its model: so records come to the model as in training.

All of it is public: names, kinds, sizes, categories, and scales that were declared or measured on
the server's valid split.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from fedfuse.batch import Modality, Schema, Target, TargetKind
from fedfuse.data.columns import Source
from fedfuse.data.dataset import Column, Dataset
from fedfuse.data.decode import decode_column
from fedfuse.data.decoder import Decoder
from fedfuse.data.kinds import KINDS
from fedfuse.data.layout import Layout
from fedfuse.data.manifest import RESERVED, Manifest, Row, read_manifest
from fedfuse.data.normalise import Scale
from fedfuse.data.problem import Problem, refuse
from fedfuse.data.table import TableSpec, with_flags
from fedfuse.errors import DataError

__all__ = ["Channel", "Reading", "Unlabelled", "on_scale", "open_reading", "read_records"]

_FILE = "reading.json"
_DECODERS: dict[str, type[Any]] = {kind.__name__: kind for kind in KINDS.values()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """One modality: where it is in a manifest, what it becomes, and on which scale."""

    source: Source
    spec: Decoder
    scale: Scale | None
    """None: its values have none, as pixels or words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How every record of a run is read, and what is predicted of it."""

    channels: tuple[Channel, ...]
    target: Target

    @property
    def schema(self) -> Schema:
        """What a record looks like after reading."""
        return Schema(
            modalities=tuple(
                Modality(name=one.source.name, kind=one.source.kind, shape=one.spec.shape)
                for one in self.channels
            ),
            target=self.target,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "channels": [
                {
                    "source": asdict(one.source),
                    "spec": {"type": type(one.spec).__name__, **asdict(cast(Any, one.spec))},
                    "scale": None if one.scale is None else asdict(one.scale),
                }
                for one in self.channels
            ],
            "target": asdict(self.target),
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], *, where: str = "") -> Reading:
        """What `as_dict` gave, also after JSON. Raises DataError, which tells of `where`."""
        try:
            channels = []
            for one in tree["channels"]:
                spec = dict(one["spec"])
                kind = _DECODERS[spec.pop("type")]
                scale = one["scale"]
                channels.append(
                    Channel(
                        source=_rebuilt(Source, one["source"]),
                        spec=_rebuilt(kind, spec),
                        scale=None if scale is None else _rebuilt(Scale, scale),
                    )
                )
            return cls(channels=tuple(channels), target=_rebuilt(Target, tree["target"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{_FILE} cannot be understood ({type(error).__name__})",
                where=where,
                hint="it is written at the end of a run, by the same version of fedfuse",
            ) from None

    def write(self, folder: Path) -> None:
        """Stores it in the folder of prepared data, for `open_reading`."""
        (folder / _FILE).write_text(json.dumps(self.as_dict()) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlabelled:
    """Records to predict, in the manifest's order. The target of `dataset` is all zeros."""

    dataset: Dataset
    rows: tuple[Row, ...]
    root: Path
    notes: tuple[str, ...]
    skipped: int
    """Records left out as bad."""


def open_reading(folder: Path) -> Reading | None:
    """What `Reading.write` stored in a folder of prepared data, or None where there is none.

    Raises DataError where it is damaged.
    """
    path = folder / _FILE
    if not path.exists():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tree = {}
    return Reading.from_dict(tree, where=str(path))


def on_scale(values: NDArray[np.generic], spec: Decoder, scale: Scale) -> NDArray[np.float32]:
    """Raw numbers (U, ..., F), NaN where missing, as the model gets them."""
    raw = values.astype(np.float32, copy=False)
    if isinstance(spec, TableSpec):
        return with_flags(scale.apply(raw, spec.coded))
    return np.nan_to_num(scale.apply(raw))


def read_records(reading: Reading, path: Path, *, skip_bad: bool = False) -> Unlabelled:
    """The records of the manifest at `path`, read as those of the run were.

    Columns id, split, client and label may be missing, and so may a modality: it is then absent
    from every record. A declaration beside the manifest is not looked at.

    Raises DataError where no column is one of the run's modalities, and where records are bad:
    with `skip_bad` these are left out and counted, and it is raised only where none is left.
    """
    manifest = read_manifest(path, labelled=False)
    notes = _about_columns(reading, manifest)
    layout = _layout(reading, manifest)
    problems, bad = list(manifest.problems), set[int]()
    columns = {}
    for channel in reading.channels:
        values, index = decode_column(layout, channel.source, channel.spec, problems, bad)
        if channel.scale is not None:
            values = on_scale(values, channel.spec, channel.scale)
        columns[channel.source.name] = Column(values, index)
    errors = [problem for problem in problems if not problem.warning]
    good = np.array([i for i in range(len(layout.manifest.rows)) if i not in bad], dtype=np.int64)
    if errors and (not skip_bad or not len(good)):
        raise refuse(
            sorted(errors, key=lambda problem: problem.line), str(path),
            hint="mend them, or leave such records out: --skip-bad",
        )  # fmt: skip
    whole = _dataset(reading, columns, layout.manifest.rows)
    dataset = whole.take(good)
    nothing = ~np.any([dataset.present(name) for name in dataset.schema.names], axis=0)
    if nothing.any():
        notes.append(f"{int(nothing.sum())} records have none of the modalities")
    return Unlabelled(
        dataset=dataset,
        rows=tuple(layout.manifest.rows[i] for i in good),
        root=layout.root,
        notes=(*notes, *_warnings(problems)),
        skipped=len(bad) + len(manifest.problems),
    )


def _about_columns(reading: Reading, manifest: Manifest) -> list[str]:
    """What is missing and what is not used. Raises DataError where nothing can be read."""
    notes, known = [], set(RESERVED)
    there = 0
    for channel in reading.channels:
        columns = channel.source.columns
        known |= set(columns)
        lacking = [name for name in columns if name not in manifest.columns]
        there += len(lacking) < len(columns)
        if lacking:
            notes.append(f"no column {', '.join(lacking)}: absent from every record")
    if not there:
        wanted = ", ".join(name for one in reading.channels for name in one.source.columns)
        raise DataError(
            "no column is one of the model's modalities",
            where=str(manifest.path),
            hint=f"it was trained on the columns {wanted}",
        )
    spare = [name for name in manifest.columns if name not in known]
    if spare:
        notes.append(f"not of the model, so not used: {', '.join(spare)}")
    return notes


def _layout(reading: Reading, manifest: Manifest) -> Layout:
    """The run's layout over another manifest, in which every column that is missing is blank."""
    sources = tuple(one.source for one in reading.channels)
    names = ("id", *(name for source in sources for name in source.columns))
    rows = tuple(Row(row.line, {**dict.fromkeys(names, ""), **row.cells}) for row in manifest.rows)
    return Layout(
        manifest=Manifest(
            path=manifest.path, root=manifest.root, columns=names, rows=rows, declaration=None
        ),
        root=manifest.root.resolve(),
        sources=sources,
        specs=tuple(one.spec for one in reading.channels),
        all_sources=sources,
        target=reading.target,
        target_column="",
        notes=(),
    )


def _dataset(reading: Reading, columns: dict[str, Column], rows: tuple[Row, ...]) -> Dataset:
    several = reading.target.kind is TargetKind.MULTILABEL
    shape = (len(rows), len(reading.target.classes)) if several else (len(rows),)
    blank = np.full(len(rows), "", dtype=np.str_)
    ids = np.array([row.cells["id"] for row in rows], dtype=np.str_)
    return Dataset(reading.schema, columns, np.zeros(shape, np.float32), ids, blank, blank)


def _warnings(problems: list[Problem]) -> list[str]:
    found = [problem.what for problem in problems if problem.warning]
    return [f"{found.count(what)} times: {what}" for what in dict.fromkeys(found)]


def _rebuilt(cls: type[Any], tree: Mapping[str, Any]) -> Any:
    """An instance of the dataclass `cls` from what `asdict` and JSON made of one."""
    kinds = get_type_hints(cls)
    known = {field.name for field in fields(cls)}
    if set(tree) - known:
        raise ValueError(f"unknown: {sorted(set(tree) - known)}")
    return cls(**{name: _value(kinds[name], value) for name, value in tree.items()})


def _value(kind: Any, value: Any) -> Any:
    if is_dataclass(kind):
        return _rebuilt(kind, value)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        return tuple(_value(get_args(kind)[0], one) for one in value)
    options = [one for one in (kind, *get_args(kind)) if isinstance(one, type)]
    enum = next((one for one in options if issubclass(one, StrEnum)), None)
    return value if enum is None or value is None else enum(value)
