"""A name for a node's records that follows from their content, whatever the files are called.

    record   sha256 over its cells in the order of their columns' names, each cell that names a file
             replaced by the sha256 of that file; id, split, client and subject are left out
    node     sha256 over the digests of its records, sorted

So a renamed run, a moved folder, another order or other ids give the same name, and any changed,
added or removed record gives another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from fedfuse.data.manifest import Row
from fedfuse.data.media import looks_like_path, media_path
from fedfuse.errors import DataError

__all__ = ["of_records"]

_LEFT_OUT = frozenset({"id", "split", "client", "subject"})


def of_records(rows: Sequence[Row], parts: Iterable[Sequence[int]], root: Path) -> tuple[str, ...]:
    """The name of each of `parts`, given as positions in `rows`; files lie below `root`.

    Raises DataError where a file went away.
    """
    folder = root.resolve()
    content = lru_cache(maxsize=None)(lambda cell: _file(folder, cell))

    def digest(row: Row) -> bytes:
        cells = [
            [name, content(cell) if looks_like_path(cell) else cell]
            for name, cell in sorted(row.cells.items())
            if name not in _LEFT_OUT and cell
        ]
        return hashlib.sha256(json.dumps(cells).encode()).digest()

    return tuple(
        "sha256:" + hashlib.sha256(b"".join(sorted(digest(rows[i]) for i in part))).hexdigest()
        for part in parts
    )


def _file(folder: Path, cell: str) -> str:
    try:
        path = media_path(folder, cell)
    except DataError:
        return cell  # text that only looks like a file's name
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"file {cell} cannot be read: {error.strerror}") from None
