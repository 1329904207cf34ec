"""From a manifest to everything a run needs: train, valid and test records, and the nodes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfuse.batch import Schema
from fedfuse.data.dataset import Column, Dataset
from fedfuse.data.decode import Decoded, decode
from fedfuse.data.fingerprint import of_records
from fedfuse.data.layout import Layout, plan
from fedfuse.data.manifest import Manifest, read_manifest
from fedfuse.data.media import looks_like_path
from fedfuse.data.normalise import Scale, find_scale
from fedfuse.data.partition import NodeShard, partition
from fedfuse.data.problem import refuse
from fedfuse.data.reading import Channel, Reading, on_scale
from fedfuse.data.spec import DataConfig
from fedfuse.data.target import coded_labels, with_scale
from fedfuse.errors import DataError

__all__ = ["Prepared", "fingerprint_of", "open_node", "open_split", "prepare"]

_NODES = "nodes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A data set, decoded, on a public scale, split among nodes.

    `notes`: everything that was inferred or assumed. `skipped`: records left out as bad.
    `fingerprint`: SHA-256 over manifest, declaration, and names and sizes of the media.
    `shared_files`: media files that several train records use. `repeated_subjects`: train subjects
    with several records. Of either, a guarantee for one record does not cover the whole.
    """

    schema: Schema
    reading: Reading
    train: Dataset
    test: Dataset
    valid: Dataset | None
    shards: tuple[NodeShard, ...]
    notes: tuple[str, ...]
    skipped: int
    fingerprint: str
    shared_files: int
    repeated_subjects: int
    node_fingerprints: tuple[str, ...] = ()
    """Of each node's records, as `fingerprint.of_records` names them; empty where not asked for."""

    def node(self, number: int) -> Dataset:
        """The train records of node `number`."""
        shard = self.shards[number]
        return self.train.take(shard.rows, absent=shard.absent)

    def write(self, folder: Path) -> None:
        """Stores all of it in `folder`, readable by its owner only, for `open_node`."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        if self.shards:
            self.train.save(folder / "train")
            fingerprints = self.node_fingerprints or ("",) * len(self.shards)
            _write_nodes(folder, self.shards, fingerprints)
        if len(self.test):
            self.test.save(folder / "test")
        if self.valid is not None:
            self.valid.save(folder / "valid")
        self.reading.write(folder)

    def replace(self, folder: Path) -> None:
        """As `write`, in the place of what is there; whoever has opened that keeps it."""
        fresh, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
        for left in (fresh, old):  # of one who was killed
            shutil.rmtree(left, ignore_errors=True)
        self.write(fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def open_node(folder: Path, number: int) -> tuple[str, Dataset]:
    """(name, train records, memory-mapped) of a node in a folder that `Prepared.write` made.

    The data is mapped once in a process, so many nodes cost no more than their row numbers.
    """
    try:
        nodes = _nodes(folder, _stamp(folder))
        name, rows = nodes.names[number], nodes.rows_of(number)
        absent = json.loads(str(nodes.absent[number]))
    except (OSError, ValueError, LookupError) as error:
        raise _no_node(folder, number, error) from None
    return str(name), nodes.train.take(rows, absent=absent)


def fingerprint_of(folder: Path, number: int) -> str:
    """The fingerprint of a node's records in such a folder. Raises DataError where it has none."""
    try:
        name = _nodes(folder, _stamp(folder)).fingerprints[number]
    except (OSError, ValueError, LookupError) as error:
        raise _no_node(folder, number, error) from None
    if not name:
        raise DataError(
            f"node {number} has no fingerprint of its records",
            where=str(folder),
            hint="prepare the data again with fingerprints",
        )
    return str(name)


@dataclass(frozen=True, slots=True)
class _Nodes:
    """All nodes of a folder, memory-mapped."""

    train: Dataset
    names: NDArray[np.str_]
    absent: NDArray[np.str_]
    """As JSON."""
    fingerprints: NDArray[np.str_]
    rows: NDArray[np.int64]
    """Of all nodes, one after the other."""
    ends: NDArray[np.int64]

    def rows_of(self, number: int) -> NDArray[np.int64]:
        """The train rows of node `number`. Raises IndexError."""
        if number < 0:
            raise IndexError(number)
        return self.rows[self.ends[number - 1] if number else 0 : self.ends[number]]


def _write_nodes(folder: Path, shards: Sequence[NodeShard], fingerprints: Sequence[str]) -> None:
    columns = {
        "names": np.array([shard.name for shard in shards], dtype=np.str_),
        "absent": np.array([json.dumps(shard.absent) for shard in shards], dtype=np.str_),
        "fingerprints": np.array(fingerprints, dtype=np.str_),
        "rows": np.concatenate([shard.rows for shard in shards]),
        "ends": np.cumsum([len(shard.rows) for shard in shards]),
    }
    (folder / _NODES).mkdir(exist_ok=True)
    for name, column in columns.items():
        np.save(folder / _NODES / f"{name}.npy", column, allow_pickle=False)


def _stamp(folder: Path) -> int:
    """Changes when the folder is written anew."""
    return (folder / _NODES / "ends.npy").stat().st_mtime_ns


@lru_cache(maxsize=2)  # each holds some file descriptors
def _nodes(folder: Path, stamp: int) -> _Nodes:
    def column(name: str) -> NDArray[Any]:
        path = folder / _NODES / f"{name}.npy"
        try:
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except ValueError:  # an empty array cannot be mapped
            return np.asarray(np.load(path, allow_pickle=False))

    return _Nodes(
        Dataset.open(folder / "train"),
        *(column(name) for name in ("names", "absent", "fingerprints", "rows", "ends")),
    )


def _no_node(folder: Path, number: int, error: Exception) -> DataError:
    return DataError(
        f"no node {number} here ({type(error).__name__})",
        where=str(folder),
        hint="prepare the data again",
    )


def open_split(folder: Path, split: str) -> Dataset:
    """The records of "train", "test" or "valid", memory-mapped. Raises DataError."""
    return Dataset.open(folder / split)


def prepare(
    config: DataConfig, *, seed: int, fingerprints: bool = False, part: str = "all"
) -> Prepared:
    """The data set that `config` names. `seed` is the partition's.

    fingerprints  name each node's records by their content too, which reads every file once more
    part          "node": the train records alone, which are those of one real node, whatever
                  config.partition says; "server": the test and valid records alone

    Raises DataError where the manifest or a file is wrong (with config.skip_bad only where nothing
    is left), or there are no train or no test records among those that are meant.
    """
    if part != "all":
        config = replace(config, partition="iid", nodes=1)
    if not config.manifest:
        raise DataError("no manifest is named", where="data.manifest", hint="give its path")
    path = Path(config.manifest)
    manifest = read_manifest(path)
    need_client = config.partition == "client"
    if need_client and "client" not in manifest.columns:
        raise DataError(
            "no column client",
            where=str(path),
            hint="name each record's client, or take another data.partition such as iid",
        )
    layout = plan(manifest, config)
    decoded = decode(layout, need_client=need_client)
    errors = [problem for problem in decoded.problems if not problem.warning]
    if errors and not config.skip_bad:
        raise refuse(errors, str(path))
    notes = list(layout.notes)
    splits, reading = _split(layout, decoded, notes, part)
    train = splits["train"]
    shards = () if part == "server" else partition(train, config, seed)
    skipped = decoded.bad_rows if errors else 0
    shared, repeated = _shared_files(layout, decoded), _repeated(train.subjects)
    notes += _about(decoded, layout, config, splits, shards, skipped, shared, repeated)
    return Prepared(
        schema=train.schema,
        reading=reading,
        train=train,
        test=splits["test"],
        valid=splits["valid"] if len(splits["valid"]) else None,
        shards=shards,
        notes=tuple(dict.fromkeys(notes)),
        skipped=skipped,
        fingerprint=_fingerprint(manifest, layout),
        shared_files=shared,
        repeated_subjects=repeated,
        node_fingerprints=_node_fingerprints(decoded, shards, manifest) if fingerprints else (),
    )


def _split(
    layout: Layout, decoded: Decoded, notes: list[str], part: str
) -> tuple[dict[str, Dataset], Reading]:
    """The three splits, normalised by what is public, and how any record is read like them."""
    splits = np.array(decoded.splits, dtype=np.str_)
    needed = {"node": ("train",), "server": ("test",)}.get(part, ("train", "test"))
    for name in needed:
        if name not in decoded.splits:
            raise DataError(
                f"no good {name} record",
                where=str(layout.manifest.path),
                hint=f"the column split needs {' and '.join(needed)}",
            )
    if part == "node":
        splits[splits != "train"] = ""
    elif part == "server":
        splits[splits == "train"] = ""
    held = {name: decoded.target[splits == name].tolist() for name in ("valid", "test")}
    target = with_scale(layout.target, layout.manifest.declaration, held, notes)
    labels = coded_labels(decoded.target, target)
    channels = _channels(layout, decoded, splits == "valid", notes)
    columns = {
        name: Column(
            values if one.scale is None else on_scale(values, one.spec, one.scale),
            decoded.index[name],
        )
        for (name, values), one in zip(decoded.values.items(), channels, strict=True)
    }
    cells = {
        name: np.array([row.cells.get(name, "") for row in decoded.rows], dtype=np.str_)
        for name in ("id", "client", "subject")
    }
    everything = Dataset(
        layout.schema(target), columns, labels, cells["id"], cells["client"], cells["subject"]
    )
    parts = {
        name: everything.take(np.flatnonzero(splits == name).astype(np.int64))
        for name in ("train", "valid", "test")
    }
    return parts, Reading(channels=channels, target=target)


def _channels(
    layout: Layout, decoded: Decoded, valid: NDArray[np.bool_], notes: list[str]
) -> tuple[Channel, ...]:
    """Each modality with its scale, where its values are measurements."""
    channels = []
    for source, spec in zip(layout.sources, layout.specs, strict=True):
        scale: Scale | None = None
        if spec.measured:
            raw = decoded.values[source.name].astype(np.float32, copy=False)
            public = decoded.index[source.name][valid]
            width = raw.shape[-1]
            scale = find_scale(width, source.declared, raw[public[public >= 0]], notes)
        channels.append(Channel(source=source, spec=spec, scale=scale))
    return tuple(channels)


def _about(
    decoded: Decoded,
    layout: Layout,
    config: DataConfig,
    splits: dict[str, Dataset],
    shards: tuple[NodeShard, ...],
    skipped: int,
    shared: int,
    repeated: int,
) -> list[str]:
    """What a reader of the report should know besides."""
    notes = []
    warnings = Counter(problem.what for problem in decoded.problems if problem.warning)
    notes += [f"{count} times: {what}" for what, count in sorted(warnings.items())]
    if skipped:
        notes.append(f"{skipped} bad records left out, as asked")
    seen = {name for name in (row.cells.get("client", "") for row in decoded.rows) if name}
    idle = len(seen - set(splits["train"].clients.tolist()))
    if config.partition == "client" and idle:
        notes.append(f"{idle} clients have no train record, so they are no nodes")
    used = sum(len(shard.rows) for shard in shards)
    if used < len(splits["train"]):
        notes.append(f"{len(shards)} nodes asked for: {len(splits['train']) - used} train records "
                     "of other clients left out")  # fmt: skip
    for name, dataset in splits.items():
        missing = len(dataset) - int(
            np.any([dataset.present(m) for m in dataset.schema.names], axis=0).sum()
        )
        if missing:
            notes.append(f"{missing} {name} records have none of the modalities in use")
    if shared:
        notes.append(f"{shared} media files are used by several train records: a guarantee for one "
                     "record does not cover such a file as a whole")  # fmt: skip
    if repeated:
        notes.append(f"{repeated} train subjects have several records: a guarantee for one record "
                     "does not cover such a subject as a whole")  # fmt: skip
    return notes


def _shared_files(layout: Layout, decoded: Decoded) -> int:
    cells: Counter[str] = Counter()
    for row, split in zip(decoded.rows, decoded.splits, strict=True):
        if split == "train":
            cells.update({row.cells[name] for name in _media_columns(layout)} - {""})
    return sum(n > 1 and looks_like_path(cell) for cell, n in cells.items())


def _media_columns(layout: Layout) -> list[str]:
    return [source.columns[0] for source in layout.sources if not source.table]


def _repeated(subjects: NDArray[np.str_]) -> int:
    _, counts = np.unique(subjects[subjects != ""], return_counts=True)
    return int((counts > 1).sum())


def _node_fingerprints(
    decoded: Decoded, shards: tuple[NodeShard, ...], manifest: Manifest
) -> tuple[str, ...]:
    train = np.flatnonzero(np.array(decoded.splits, dtype=np.str_) == "train")
    parts = [[int(i) for i in train[shard.rows]] for shard in shards]
    return of_records(decoded.rows, parts, manifest.root)


def _fingerprint(manifest: Manifest, layout: Layout) -> str:
    digest = hashlib.sha256(manifest.path.read_bytes())
    if manifest.declaration:
        digest.update(manifest.declaration.path.read_bytes())
    cells = {row.cells[name] for row in manifest.rows for name in _media_columns(layout)}
    for cell in sorted(filter(looks_like_path, cells)):
        try:
            size = (manifest.root / cell).stat().st_size
        except (OSError, ValueError):
            continue
        digest.update(f"\n{cell} {size}".encode())
    return digest.hexdigest()
