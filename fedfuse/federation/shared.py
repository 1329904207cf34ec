"""Arrays of a message in memory that two processes share, and the rest of it as bytes.

A sheet is a nameless piece of memory (a memfd, or a file that has been deleted): whoever holds its
file descriptor can map it, and it is gone when the last one lets go, however that ends. The
writer lays down the arrays of a message; the reader maps them, and nothing is copied:

    writer   sheet.put(record) -> Packed     small: names, shapes, types, places; and other records
    pipe     the descriptor once, Packed for each message
    reader   sheet.get(packed) -> record     its arrays are views of the sheet

A record that was read from a sheet is good until the writer puts the next one there; `owned` makes
a copy that lasts.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, RecordDict

__all__ = ["Packed", "Sheet", "owned"]

_LINE = 64
"""Arrays begin at multiples of this, as processors and NumPy like it."""
_Place = tuple[str, str, tuple[int, ...], str, int, int]
"""name, dtype, shape, stype, offset, bytes"""


@dataclass(frozen=True, slots=True)
class Packed:
    """A message without the contents of its arrays."""

    rest: bytes
    """All other records, pickled."""
    arrays: tuple[tuple[str, tuple[_Place, ...]], ...]
    size: int
    """How much of the sheet it takes."""


class Sheet:
    """Shared memory, from one end of it."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Makes a sheet, to write on; or with another process's `descriptor` reads one."""
        self._writes = descriptor is None
        self.descriptor = _nameless() if descriptor is None else descriptor
        self._map: mmap.mmap | None = None

    def put(self, record: RecordDict) -> Packed:
        """Lays down the arrays of `record`, over whatever was there."""
        arrays: list[tuple[str, tuple[_Place, ...]]] = []
        place = 0
        for key, group in record.array_records.items():
            places: list[_Place] = []
            for name, array in group.items():
                places.append((name, array.dtype, array.shape, array.stype, place, len(array.data)))
                place += -(-len(array.data) // _LINE) * _LINE
            arrays.append((key, tuple(places)))
        where = self._mapped(place)
        for key, laid in arrays:
            for name, _, _, _, start, length in laid:
                where[start : start + length] = record.array_records[key][name].data
        others = {key: record[key] for key in record if key not in record.array_records}
        return Packed(pickle.dumps(others, protocol=5), tuple(arrays), place)

    def get(self, packed: Packed) -> RecordDict:
        """The message. Its arrays are views, good until the other end puts the next one."""
        where = memoryview(self._mapped(packed.size)).toreadonly()
        record = RecordDict(pickle.loads(packed.rest))
        for key, places in packed.arrays:
            group = ArrayRecord()
            for name, dtype, shape, stype, start, length in places:
                group[name] = _view(dtype, shape, stype, where[start : start + length])
            record[key] = group
        return record

    def close(self) -> None:
        """Lets go of it; views that are still held keep the memory alive."""
        self._map = None
        os.close(self.descriptor)

    def _mapped(self, size: int) -> mmap.mmap:
        """The memory, at least `size` bytes of it."""
        if self._map is None or len(self._map) < size:
            if self._writes:
                os.ftruncate(self.descriptor, max(size, mmap.PAGESIZE))
            access = mmap.ACCESS_WRITE if self._writes else mmap.ACCESS_READ
            self._map = mmap.mmap(self.descriptor, 0, access=access)
        return self._map


def owned(record: RecordDict) -> RecordDict:
    """`record`, its arrays now copies that last."""
    for group in record.array_records.values():
        for array in group.values():
            array.data = bytes(array.data)
    return record


def _view(dtype: str, shape: tuple[int, ...], stype: str, data: bytes | memoryview) -> Array:
    array = Array(dtype, tuple(shape), stype, b"")
    array.data = data  # type: ignore[assignment]  # a view is read as bytes are
    return array


def _nameless() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedfuse", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
