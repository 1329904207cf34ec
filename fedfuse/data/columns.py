"""Which columns of a manifest are modalities, and of which kind each is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from fedfuse.batch import Kind
from fedfuse.data.declaration import DeclaredModality
from fedfuse.data.inline import BLANKS, number, numbers
from fedfuse.data.kinds import KINDS, kind_of_suffixes
from fedfuse.data.manifest import RESERVED, Manifest
from fedfuse.data.media import looks_like_path, media_path, read_array
from fedfuse.data.table import TableColumn, scale_of
from fedfuse.errors import DataError

__all__ = ["TABLE", "Source", "find_sources", "undeclared"]

TABLE = "table"
"""The modality that all scalar columns become together."""

_MOST_CATEGORIES = 32
_PROSE = {"text", "note", "notes", "report", "question", "sentence", "caption", "comment"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One modality as the manifest has it: its columns, its kind, and what was declared of it.

    `table`: the scalar columns that it is made of, empty for every other form.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...]
    declared: DeclaredModality
    table: tuple[TableColumn, ...] = ()

    def present(self, cells: tuple[str, ...]) -> bool:
        """Whether a record with these cells, one for each of `columns`, has the modality."""
        blank = BLANKS if self.table else frozenset({""})
        return any(cell.lower() not in blank for cell in cells)


def undeclared(manifest: Manifest) -> tuple[str, ...]:
    """The columns that a declaration with modalities does not name."""
    said = manifest.declaration
    if said is None or not said.modalities:
        return ()
    known = set(RESERVED) | set(said.modalities) | {said.target_column}
    known |= {name for modality in said.modalities.values() for name in modality.columns}
    spare = tuple(name for name in manifest.columns if name not in known)
    # A declared table that is no column itself is made of the columns that nothing else explains.
    return () if _virtual_table(manifest) else spare


def find_sources(
    manifest: Manifest, wanted: Sequence[str], notes: list[str], *, target: str
) -> tuple[Source, ...]:
    """The modalities in the manifest's order; every inference is a line in `notes`.

    `wanted`: their names, or of columns within the table; empty for all. `target`: the column that
    is predicted. Raises DataError where a wanted one is unknown, or nothing is left.
    """
    said = manifest.declaration
    declared = dict(said.modalities) if said else {}
    explained = set(RESERVED) | {target}
    names = [name for name in manifest.columns if name not in explained]
    spare = undeclared(manifest)
    if spare:
        notes.append(f"not declared, so not used: {', '.join(spare)}")
        names = [name for name in names if name not in spare]
    sources: list[Source] = []
    scalars: list[TableColumn] = []
    table = _virtual_table(manifest) or DeclaredModality(name=TABLE)
    place = -1
    for name in names:
        cells = [row.cells[name] for row in manifest.rows if row.cells[name]]
        if not cells:
            notes.append(f"{name}: blank in every record, so not used")
            continue
        modality = declared.get(name) or DeclaredModality(name=name)
        told = _told(name, modality, table)
        kind, column = _kind(manifest, name, modality, told, cells, notes)
        if column is None:
            sources.append(Source(name=name, kind=kind, columns=(name,), declared=modality))
        else:
            place = len(sources) if place < 0 else place
            scalars.append(column)
    found = {source.name for source in sources} | {column.name for column in scalars}
    for name in declared:
        if name not in found and name not in manifest.columns and name != table.name:
            notes.append(f"{name}: declared, but the manifest has no such column")
    if scalars:
        sources.insert(place, _table(scalars, table, sources, notes))
    return _choose(sources, wanted, str(manifest.path))


def _virtual_table(manifest: Manifest) -> DeclaredModality | None:
    """The declared table that is no column itself, but made of columns."""
    said = manifest.declaration
    for name, modality in (said.modalities if said else {}).items():
        if modality.kind is Kind.TABLE and name not in manifest.columns:
            return modality
    return None


def _told(name: str, said: DeclaredModality, table: DeclaredModality) -> TableColumn:
    """What is declared of a column of the table: by itself, or within the table."""
    for column in (*said.inner, *table.inner):
        if column.name == name:
            return column
    for whole in (said, table):
        if len(whole.mean) == 1:
            return TableColumn(name=name, mean=whole.mean[0], std=whole.std[0])
    return TableColumn(name=name)


def _kind(
    manifest: Manifest,
    name: str,
    said: DeclaredModality,
    told: TableColumn,
    cells: list[str],
    notes: list[str],
) -> tuple[Kind, TableColumn | None]:
    """The column's kind; and, where it holds one scalar a record, the column of the table, of
    which the declaration has `told`."""
    kind = said.kind
    if told.categories:
        return Kind.TABLE, told
    suffixes = [PurePosixPath(cell).suffix.lower() for cell in cells if looks_like_path(cell)]
    arrays = suffixes.count(".npy") * 2 > len(cells)
    media = kind is not None and bool(KINDS[kind].suffixes)
    if arrays and media:
        notes.append(f"{name}: declared as {kind}, but its cells are arrays, so features of it")
        kind, media = None, False
    if kind is not None and (arrays or (media and kind is not Kind.TEXT)):
        return kind, None
    found = kind_of_suffixes(suffixes, len(cells))
    if kind is None and (arrays or found):
        kind = found or _array_kind(manifest, name, cells)
        notes.append(f"{name}: kind {kind}, inferred from {_usual(suffixes)} cells")
        return kind, None
    scalar = sum(number(cell) is not None for cell in cells) >= 0.9 * len(cells)
    if scalar:
        if said.kind is not Kind.TABLE:
            notes.append(f"{name}: a column of the table, inferred from numeric cells")
        return Kind.TABLE, told
    if kind is Kind.TEXT:
        return Kind.TEXT, None
    if sum(numbers(cell) is not None for cell in cells) >= 0.9 * len(cells):
        if kind is None:
            kind = _inline_kind(name, cells)
            notes.append(f"{name}: kind {kind}, inferred from cells that hold lists of numbers")
        return kind, None
    if kind in (Kind.VECTOR, Kind.SERIES):
        return kind, None  # the cells are wrong: each becomes a problem
    categories = sorted({cell for cell in cells if cell.lower() not in BLANKS})
    if kind is Kind.TABLE or _categorical(name, cells, categories):
        if len(categories) > _MOST_CATEGORIES:
            raise DataError(
                f"column {name} is declared a table, but is neither numbers nor at most "
                f"{_MOST_CATEGORIES} categories",
                where=str(manifest.path),
                hint=f'declare {name} = "text", or leave the column out',
            )
        notes.append(
            f"{name}: a column of the table, {len(categories)} categories in sorted order, "
            "taken as public, inferred from the cells"
        )
        return Kind.TABLE, TableColumn(name=name, categories=tuple(categories))
    notes.append(f"{name}: kind text, inferred from its cells")
    return Kind.TEXT, None


def _array_kind(manifest: Manifest, name: str, cells: list[str]) -> Kind:
    if name.lower() in (TABLE, "tabular"):
        return Kind.TABLE
    root = Path(manifest.root).resolve()
    for cell in cells[:64]:
        try:
            array = read_array(media_path(root, cell))
        except DataError:
            continue
        if array.ndim in (1, 2):
            return Kind.VECTOR if 1 in (array.ndim, array.shape[0]) else Kind.SERIES
    return Kind.VECTOR  # nothing readable: each record becomes a problem


def _inline_kind(name: str, cells: list[str]) -> Kind:
    """Lists of numbers: a table where some number is left blank, otherwise by their shape."""
    arrays = [array for cell in cells if (array := numbers(cell)) is not None]
    gaps = any(np.isnan(array).any() for array in arrays)
    if name.lower() in (TABLE, "tabular") or (gaps and arrays[0].ndim == 1):
        return Kind.TABLE
    return Kind.VECTOR if arrays[0].ndim == 1 else Kind.SERIES


def _categorical(name: str, cells: list[str], categories: list[str]) -> bool:
    """Whether few short values repeat often, so that they are categories rather than prose."""
    return (
        name.lower() not in _PROSE
        and len(categories) <= _MOST_CATEGORIES
        and 4 * len(categories) <= len(cells)
        and all(len(category.split()) <= 2 for category in categories)
    )


def _usual(suffixes: list[str]) -> str:
    return max(sorted(set(suffixes)), key=suffixes.count)


def _table(
    scalars: list[TableColumn], said: DeclaredModality, others: list[Source], notes: list[str]
) -> Source:
    taken = {source.name for source in others}
    name = said.name if said.name not in taken else f"{TABLE}_columns"
    columns = tuple(column.name for column in scalars)
    notes.append(f"{name}: one modality of kind table, made of {', '.join(columns)}")
    mean, std = scale_of(scalars)
    said = replace(said, mean=mean, std=std) if mean else said
    return Source(name=name, kind=Kind.TABLE, columns=columns, declared=said, table=tuple(scalars))


def _choose(sources: list[Source], wanted: Sequence[str], where: str) -> tuple[Source, ...]:
    known = [source.name for source in sources]
    inner = [column for source in sources if source.table for column in source.columns]
    for name in wanted:
        if name not in known and name not in inner:
            raise DataError(f"no modality {name!r}", where=where, hint=f"it has {', '.join(known)}")
    if not sources:
        raise DataError(
            "no modality to learn from", where=where, hint="add a column for each modality"
        )
    chosen = []
    for source in sources:
        table = tuple(column for column in source.table if column.name in wanted)
        if not wanted or source.name in wanted:
            chosen.append(source)
        elif table:
            columns = tuple(column.name for column in table)
            mean, std = scale_of(table)
            declared = replace(source.declared, mean=mean, std=std) if mean else source.declared
            chosen.append(
                Source(
                    name=source.name, kind=source.kind, columns=columns,
                    declared=declared, table=table,
                )
            )  # fmt: skip
    return tuple(chosen)
