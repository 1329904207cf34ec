"""The arrays of a record as one array, for their way through Flower, and back.

Flower 1.41 takes each array for two objects and gives each object a request of its own, four times:
to the SuperLink, to the SuperNode, to the app, and all the way back. A model of 16 arrays is some
150 requests to each node and round, however small it is; as one array it is some 30.

    packed    8 bytes: how long the outline is | outline | the arrays' bytes, one after the other
    outline   JSON: of each array name, type, shape, format, bytes

What comes is a stranger's: it is read into the same plain arrays, and these as strictly as ever.
Loads neither torch nor data: the bundle's process is started anew for each message.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, RecordDict

from fedfuse.errors import WireError

__all__ = ["outline", "packed", "rebuilt", "record_bytes", "unpacked"]

_NAME = "packed"
_FORMAT = "fedfuse.packed"
_START = struct.Struct(">Q")


def packed(record: RecordDict) -> RecordDict:
    """`record` with the arrays of each array record as one; all else as it is."""
    found = RecordDict()
    for name, part in record.items():
        if isinstance(part, ArrayRecord):
            head = json.dumps(outline(part)).encode()
            arrays = [array.data for array in part.values()]
            data = b"".join([_START.pack(len(head)), head, *arrays])
            part = ArrayRecord({_NAME: Array("uint8", (len(data),), _FORMAT, data)})
        found[name] = part
    return found


def unpacked(record: RecordDict) -> RecordDict:
    """What `packed` was given; what is not packed stays as it is. Raises WireError."""
    found = RecordDict()
    for name, part in record.items():
        if isinstance(part, ArrayRecord) and [a.stype for a in part.values()] == [_FORMAT]:
            (array,) = part.values()
            part = _unpacked(memoryview(array.data))
        found[name] = part
    return found


def record_bytes(record: RecordDict) -> int:
    """The size of the arrays in a message."""
    return sum(
        len(array.data) for arrays in record.array_records.values() for array in arrays.values()
    )


def outline(arrays: ArrayRecord) -> list[tuple[str, str, tuple[int, ...], str, int]]:
    """Of each array: name, type, shape, format, and how many bytes it has."""
    return [(key, a.dtype, a.shape, a.stype, len(a.data)) for key, a in arrays.items()]


def rebuilt(held: Sequence[Any], body: memoryview, place: int) -> tuple[ArrayRecord, int]:
    """The arrays of which `held` is the outline, from `place` on in `body`; and where they end.

    Raises ValueError or TypeError where it is no outline, or names more than there is.
    """
    arrays = ArrayRecord()
    for key, dtype, shape, stype, size in held:
        for value, kind in ((key, str), (dtype, str), (stype, str), (size, int)):
            _check(value, kind)
        if not 0 <= size <= len(body) - place:
            raise ValueError(size)
        shape = tuple(_check(n, int) for n in shape)
        arrays[key] = Array(dtype, shape, stype, bytes(body[place : place + size]))
        place += size
    return arrays, place


def _unpacked(data: memoryview) -> ArrayRecord:
    try:
        (length,) = _START.unpack(data[: _START.size])
        start = _START.size + length
        arrays, end = rebuilt(json.loads(bytes(data[_START.size : start])), data, start)
    except (ValueError, TypeError, struct.error, RecursionError) as error:
        raise WireError(f"packed arrays cannot be read ({type(error).__name__})") from None
    if end != len(data):
        raise WireError("packed arrays are followed by something else")
    return arrays


def _check(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(kind)
    return value
