"""The public sizes of every modality: declared, or inferred from what the server holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedfuse.batch import Modality, Schema, Target
from fedfuse.data.columns import Source, find_sources
from fedfuse.data.decoder import Decoder
from fedfuse.data.kinds import KINDS
from fedfuse.data.manifest import Manifest
from fedfuse.data.media import quiet
from fedfuse.data.probe import Probe
from fedfuse.data.spec import DataConfig
from fedfuse.data.target import find_target, target_column

__all__ = ["Layout", "plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How every record of a manifest is read. `specs[m]` belongs to `sources[m]`."""

    manifest: Manifest
    root: Path
    sources: tuple[Source, ...]
    specs: tuple[Decoder, ...]
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
    probe = Probe(manifest, manifest.root.resolve(), notes)
    with quiet():
        specs = tuple(KINDS[source.kind].plan(source, config, probe) for source in sources)
    return Layout(
        manifest=manifest,
        root=probe.root,
        sources=sources,
        specs=specs,
        all_sources=everything,
        target=target,
        target_column=column,
        notes=tuple(notes),
    )
