"""What goes between an app bundle's process and a node's vault, byte by byte.

    letter   "fedfuse", protocol | bytes of the head | bytes of the arrays | head | arrays
    head     JSON: kind, version, package, settings, records; bytes in a record as {"bytes": base64}
    arrays   their bytes, one after the other

One letter each way over a Unix socket, and no pickle: a letter is read into plain records, which
are then read as strictly as if they had come from Flower. Sizes are known before anything is kept,
and memory grows only with what has come.

Loads neither torch nor data: the bundle's process is started anew for each message.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

import fedfuse
from fedfuse.errors import WireError
from fedfuse.federation.packing import outline, rebuilt

__all__ = ["MOST_HEAD", "PACKAGE", "Letter", "connect", "nearby", "receive", "send"]

PROTOCOL = 2
PACKAGE = str(Path(fedfuse.__file__).resolve().parent)
"""Where the fedfuse lies that this process runs."""
MOST_HEAD = 2 << 20
"""Bytes of a head: names, shapes and settings."""
_START = struct.Struct(">8sIQ")
_MAGIC = b"fedfuse" + bytes([PROTOCOL])
_PIECE = 1 << 20
_SCALARS = (str, int, float, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A message of Flower's, and what belongs to it."""

    kind: str
    """What Flower calls it: "train", "evaluate", "query"; or "reply"."""
    record: RecordDict
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The run's configuration, as Flower flattens it."""
    version: str = fedfuse.__version__
    package: str = PACKAGE
    """Where the sender's fedfuse lies. A sender can say what it likes: this finds mistakes."""


def send(door: socket.socket, letter: Letter, *, seconds: float) -> None:
    """Sends `letter`. Raises WireError where it holds what cannot go, and OSError."""
    arrays: list[bytes] = []
    records: dict[str, Any] = {}
    for name, part in letter.record.items():
        if isinstance(part, ArrayRecord):
            records[name] = ["arrays", outline(part)]
            arrays += [array.data for array in part.values()]
        else:
            records[name] = ["config" if isinstance(part, ConfigRecord) else "metrics", dict(part)]
    tree = {
        "kind": letter.kind,
        "version": letter.version,
        "package": letter.package,
        "settings": dict(letter.settings),
        "records": records,
    }
    head = json.dumps(tree, default=_encoded).encode()
    if len(head) > MOST_HEAD:
        raise WireError("a message's names and settings take more than the protocol allows")
    end = time.monotonic() + seconds
    for data in (_START.pack(_MAGIC, len(head), sum(map(len, arrays))), head, *arrays):
        door.settimeout(max(0.0, end - time.monotonic()) or 1e-3)
        door.sendall(data)


def receive(door: socket.socket, *, most_bytes: int, head_s: float, rate: float) -> Letter:
    """The letter that comes: its head within `head_s` seconds, its arrays at `rate` bytes/s.

    Raises WireError on whatever is no letter, or larger than `most_bytes`, and OSError; where the
    time is up, TimeoutError.
    """
    end = time.monotonic() + head_s
    magic, head_size, size = _START.unpack(_read(door, _START.size, end))
    if magic != _MAGIC:
        raise WireError(
            "what comes is no letter of this protocol",
            hint="install the same fedfuse on both sides of the door",
        )
    if head_size > MOST_HEAD or size > most_bytes:
        raise WireError(
            f"a letter of {head_size + size:,} bytes, but at most {most_bytes:,} are taken",
            hint="vault.max_megabytes in node.toml says how much, or policy.max_parameters",
        )
    head = _read(door, head_size, end)
    body = memoryview(_read(door, size, end + size / rate))
    try:
        return _letter(json.loads(head, parse_constant=_refuse), body)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise WireError(f"what comes is no letter ({type(error).__name__})") from None


def connect(path: Path, *, seconds: float) -> socket.socket:
    """A connection to the vault at `path`. Raises OSError."""
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    door.settimeout(seconds)
    try:
        with nearby(path) as name:
            door.connect(name)
    except BaseException:
        door.close()
        raise
    return door


@contextmanager
def nearby(path: Path) -> Iterator[str]:
    """A name for the socket at `path` that is short enough, however long the path is."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _read(door: socket.socket, size: int, end: float) -> bytearray:
    found = bytearray()
    while len(found) < size:
        left = end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        door.settimeout(left)
        piece = door.recv(min(_PIECE, size - len(found)))
        if not piece:
            raise ConnectionError("it ends in the middle")
        found += piece
    return found


def _letter(tree: dict[str, Any], body: memoryview) -> Letter:
    """Raises whatever comes of a tree that is not of the right form."""
    record, place = RecordDict(), 0
    for name, (kind, held) in tree.pop("records").items():
        match kind:
            case "arrays":
                part: Any
                part, place = rebuilt(held, body, place)
            case "config":
                part = ConfigRecord({key: _decoded(value) for key, value in held.items()})
            case "metrics":
                part = MetricRecord(held)
            case _:
                raise ValueError(kind)
        record[name] = part
    if place != len(body):
        raise ValueError(place)
    settings = tree.pop("settings")
    if not all(isinstance(value, _SCALARS) for value in settings.values()):
        raise TypeError("settings")
    words = {name: _word(tree.pop(name)) for name in ("kind", "version", "package")}
    if tree:
        raise KeyError(min(tree))
    return Letter(**words, record=record, settings=settings)


def _encoded(value: bytes) -> dict[str, str]:
    return {"bytes": base64.b64encode(value).decode()}


def _decoded(value: Any) -> Any:
    """A record's value, with its bytes. Raises ValueError or TypeError."""
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if isinstance(value, dict):
        if set(value) != {"bytes"}:
            raise ValueError(value)
        return base64.b64decode(value["bytes"], validate=True)
    return value


def _word(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(value)
    return value


def _refuse(name: str) -> float:
    raise ValueError(name)
