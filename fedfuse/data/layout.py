"""The public sizes of every modality: declared, or inferred from what the server holds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedfuse.batch import Kind, Modality, Schema, Target
from fedfuse.data.audio import HOP_S, AudioSpec, audio_facts
from fedfuse.data.columns import Source, find_sources
from fedfuse.data.image import ImageSpec, image_facts
from fedfuse.data.inline import numbers
from fedfuse.data.manifest import SPLITS, Manifest
from fedfuse.data.media import looks_like_path, media_path, quiet, read_array
from fedfuse.data.series import SeriesSpec
from fedfuse.data.spec import DataConfig
from fedfuse.data.table import TableSpec
from fedfuse.data.target import find_target, target_column
from fedfuse.data.text import TextSpec, load_tokenizer
from fedfuse.data.vector import VectorSpec
from fedfuse.data.video import VideoSpec, load_av, video_facts
from fedfuse.errors import DataError

__all__ = ["Layout", "Spec", "array_of", "plan"]

Spec = ImageSpec | AudioSpec | VideoSpec | TextSpec | SeriesSpec | VectorSpec | TableSpec
T = TypeVar("T")

_PROBES = 64
_MOST_PIXELS = 64
_MOST_SECONDS = 10.0
_MOST_STEPS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How every record of a manifest is read. `specs[m]` belongs to `sources[m]`."""

    manifest: Manifest
    root: Path
    sources: tuple[Source, ...]
    specs: tuple[Spec, ...]
    all_sources: tuple[Source, ...]
    target: Target
    target_column: str
    notes: tuple[str, ...]

    def schema(self, target: Target) -> Schema:
        """The schema with `target`, once its scale is known."""
        return Schema(
            modalities=tuple(
                Modality(name=source.name, kind=source.kind, shape=spec.shape)
                for source, spec in zip(self.sources, self.specs, strict=True)
            ),
            target=target,
        )


def plan(manifest: Manifest, config: DataConfig) -> Layout:
    """How to read `manifest`. Looks at some files, decodes none for good. Raises DataError."""
    notes: list[str] = []
    said = manifest.declaration
    if said and said.unused:
        notes.append(f"{said.path.name}: not understood, so not used: {', '.join(said.unused)}")
    column = target_column(manifest)
    target = find_target(manifest, column, notes)
    everything = find_sources(manifest, (), notes, target=column)
    sources = (
        find_sources(manifest, config.modalities, [], target=column)
        if config.modalities
        else everything
    )
    root = manifest.root.resolve()
    probe = _Probe(manifest, root)
    with quiet():
        specs = tuple(_spec(source, config, probe, notes) for source in sources)
    return Layout(
        manifest=manifest,
        root=root,
        sources=sources,
        specs=specs,
        all_sources=everything,
        target=target,
        target_column=column,
        notes=tuple(notes),
    )


def array_of(root: Path, cell: str) -> NDArray[np.float32]:
    """The numbers of a cell: an .npy file's, or those in the cell itself. Raises DataError."""
    if looks_like_path(cell) and cell.lower().endswith(".npy"):
        return read_array(media_path(root, cell))
    array = numbers(cell)
    if array is None:
        if looks_like_path(cell):
            media_path(root, cell)  # a missing file is the likelier reason
        raise DataError(
            "its cell is neither an .npy file nor numbers", hint='such as "0.5 1.2" or [0.5, 1.2]'
        )
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Probe:
    """Some cells of a column: the server's splits first, train only where those have none."""

    manifest: Manifest
    root: Path

    def look(
        self, source: Source, read: Callable[[str], T], notes: list[str], what: str
    ) -> tuple[list[T], bool]:
        """(what `read` made of some cells, whether they are the server's). Unreadable: left out."""
        for held in (True, False):
            found: list[T] = []
            for cell in self._cells(source.columns[0], held):
                try:
                    found.append(read(cell))
                except DataError:
                    continue
            if found:
                whose = "the valid and test splits" if held else "the first train records"
                notes.append(f"{source.name}: {what} inferred from {whose}")
                return found, held
        return [], False

    def _cells(self, column: str, held: bool) -> Iterator[str]:
        wanted = ("valid", "test") if held else ("train",)
        cells = list(
            dict.fromkeys(
                row.cells[column]
                for row in self.manifest.rows
                if row.cells[column] and SPLITS.get(row.cells["split"].lower()) in wanted
            )
        )
        step = max(1, len(cells) // _PROBES) if held else 1
        yield from cells[::step][:_PROBES]


def _spec(source: Source, config: DataConfig, probe: _Probe, notes: list[str]) -> Spec:
    match source.kind:
        case Kind.IMAGE:
            size, channels = _pixels(source, config.image_size, image_facts, probe, notes)
            return ImageSpec(size=size, channels=channels)
        case Kind.AUDIO:
            return _audio(source, config, probe, notes)
        case Kind.VIDEO:
            load_av()  # an error belongs here, not to each record
            size, channels = _pixels(source, config.video_size, video_facts, probe, notes)
            return VideoSpec(frames=config.video_frames, size=size, channels=channels)
        case Kind.TEXT:
            if config.tokenizer:
                load_tokenizer(config.tokenizer)  # an error belongs here, not to each record
            return TextSpec(
                tokens=config.text_tokens,
                vocabulary=config.vocabulary,
                tokenizer=config.tokenizer,
            )
        case Kind.TABLE if source.table:
            return TableSpec(columns=source.table)
        case _:
            return _array(source, config, probe, notes)


def _pixels(
    source: Source,
    wanted: int,
    facts_of: Callable[[Path], tuple[int, int]],
    probe: _Probe,
    notes: list[str],
) -> tuple[int, int]:
    """(size, channels) of an image or of a video's frames."""
    said = source.declared
    size, channels = wanted or min(said.image_size, _MOST_PIXELS), said.channels
    if not size or channels not in (1, 3):
        facts, _ = probe.look(
            source, lambda cell: facts_of(media_path(probe.root, cell)), notes, "size or colour"
        )
        facts = facts or [(_MOST_PIXELS, 3)]  # nothing readable: each record becomes a problem
        size = size or min(Counter(fact[0] for fact in facts).most_common(1)[0][0], _MOST_PIXELS)
        channels = channels if channels in (1, 3) else max(fact[1] for fact in facts)
    return size, channels


def _audio(source: Source, config: DataConfig, probe: _Probe, notes: list[str]) -> AudioSpec:
    said = source.declared
    rate, seconds = config.sample_rate or said.sample_rate, config.audio_seconds or said.seconds
    if not rate or not seconds:
        what = "sample rate and length" if not rate and not seconds else (
            "length" if rate else "sample rate"
        )  # fmt: skip
        facts, held = probe.look(
            source, lambda cell: audio_facts(media_path(probe.root, cell)), notes, what
        )
        facts = facts or [(8000, 1.0)]  # nothing readable: each record becomes a problem
        rate = rate or Counter(fact[0] for fact in facts).most_common(1)[0][0]
        if not seconds:
            seconds = min(max(fact[1] for fact in facts), _MOST_SECONDS) if held else 1.0
    frames = config.mel_frames or max(1, math.ceil(round(seconds / HOP_S, 6)))
    return AudioSpec(
        rate=rate,
        seconds=seconds,
        bands=config.mel_bands,
        frames=frames,
        coefficients=config.mfcc if config.audio_features == "mfcc" else 0,
    )


def _array(source: Source, config: DataConfig, probe: _Probe, notes: list[str]) -> Spec:
    """The size of a vector, a series, or a table that comes as one array."""
    said, dims = source.declared, 2 if source.kind is Kind.SERIES else 1
    shape = said.shape if len(said.shape) == dims else ()
    if not shape:
        arrays, _ = probe.look(source, lambda cell: array_of(probe.root, cell), notes, "shape")
        shapes = [array.shape for array in arrays if array.ndim == dims]
        if not shapes and dims == 1:
            shapes = [
                (array.size,) for array in arrays if array.size == max(array.shape, default=1)
            ]
        if arrays and not shapes:
            needed = "(time, features)" if dims == 2 else "(features,)"
            raise DataError(
                f"column {source.columns[0]}: its arrays have shapes such as {arrays[0].shape}",
                where=str(probe.manifest.path),
                hint=f"save each record of a {source.kind} as {needed}",
            )
        shapes = shapes or [(1,) * dims]  # nothing readable: each record becomes a problem
        width = Counter(shape[-1] for shape in shapes).most_common(1)[0][0]
        steps = min(max(shape[0] for shape in shapes), _MOST_STEPS)
        shape = (steps, width) if dims == 2 else (width,)
    if source.kind is Kind.SERIES:
        return SeriesSpec(steps=config.series_steps or shape[0], features=shape[1])
    if source.kind is Kind.TABLE:
        return TableSpec(features=shape[0])
    return VectorSpec(features=shape[0])
