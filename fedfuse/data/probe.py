"""A look at some cells, to infer public sizes that nobody declared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from fedfuse.data.columns import Source
from fedfuse.data.manifest import SPLITS, Manifest
from fedfuse.data.media import array_of, media_path
from fedfuse.errors import DataError

__all__ = ["Probe"]

T = TypeVar("T")
_LOOKS = 64
_MOST_STEPS = 1024


@dataclass(frozen=True, slots=True)
class Probe:
    """Some cells of a column: the server's splits first, train only where those have none. What is
    inferred is a line in `notes`."""

    manifest: Manifest
    root: Path
    notes: list[str] = field(default_factory=list)

    def look(self, source: Source, read: Callable[[str], T], what: str) -> tuple[list[T], bool]:
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
                self.notes.append(f"{source.name}: {what} inferred from {whose}")
                return found, held
        return [], False

    def look_at_files(
        self, source: Source, read: Callable[[Path], T], what: str
    ) -> tuple[list[T], bool]:
        """The same of the files that the cells name."""
        return self.look(source, lambda cell: read(media_path(self.root, cell)), what)

    def shape(self, source: Source, dims: int) -> tuple[int, ...]:
        """The shape of a record's array, of one dimension or two, declared or inferred: the usual
        width and the longest record. Raises DataError where arrays are of other dimensions."""
        if len(source.declared.shape) == dims:
            return source.declared.shape
        arrays, _ = self.look(source, lambda cell: array_of(self.root, cell), "shape")
        shapes = [array.shape for array in arrays if array.ndim == dims]
        if not shapes and dims == 1:
            shapes = [
                (array.size,) for array in arrays if array.size == max(array.shape, default=1)
            ]
        if arrays and not shapes:
            needed = "(time, features)" if dims == 2 else "(features,)"
            raise DataError(
                f"column {source.columns[0]}: its arrays have shapes such as {arrays[0].shape}",
                where=str(self.manifest.path),
                hint=f"save each record of a {source.kind} as {needed}",
            )
        shapes = shapes or [(1,) * dims]  # nothing readable: each record becomes a problem
        width = Counter(shape[-1] for shape in shapes).most_common(1)[0][0]
        steps = min(max(shape[0] for shape in shapes), _MOST_STEPS)
        return (steps, width) if dims == 2 else (width,)

    def _cells(self, column: str, held: bool) -> Iterator[str]:
        wanted = ("valid", "test") if held else ("train",)
        cells = list(
            dict.fromkeys(
                row.cells[column]
                for row in self.manifest.rows
                if row.cells[column] and SPLITS.get(row.cells["split"].lower()) in wanted
            )
        )
        step = max(1, len(cells) // _LOOKS) if held else 1
        yield from cells[::step][:_LOOKS]
