"""The vault's door: a Unix socket, who may knock, and what the worst visitor can do.

    1  the kernel says which user knocks; one who is not on the list is sent away
    2  a letter is read within a time and a size, by a thread of its own; of too many visitors the
       one who has been at it longest is sent away, so nobody holds the door by dawdling
    3  whole letters queue up, and are handed out one at a time, in the order in which they came
    4  a visitor who has left meanwhile is passed over, and nothing is spent on the letter

A visitor that floods the door can keep others waiting, and do no more: what a letter may do is
decided behind it.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flwr.app import RecordDict

from fedfuse.errors import ConfigError, FederationError, WireError
from fedfuse.federation.framing import Letter, nearby, receive, send
from fedfuse.federation.locks import hold, is_held
from fedfuse.federation.packing import record_bytes

__all__ = ["LOG", "Door", "Visit", "is_guarded"]

_log = logging.getLogger("fedfuse.node")
_VISITORS = 8
"""At once, those whose letters wait included; each takes a letter's bytes at the most."""
_KNOCKS = 128
"""So many more may knock before the kernel sends them away."""
_PEERS = struct.Struct("3i")  # pid, uid, gid: struct ucred in unix(7)
_LOCK, LOG = "vault.lock", "vault.log"
"""Beside the socket: what says that a vault is there, and what it says, for its own user alone."""


@dataclass(slots=True, eq=False)
class Visit:
    """A letter, and the way back to who brought it."""

    letter: Letter
    _line: socket.socket
    _patience_s: float
    _rate: float

    def answer(self, record: RecordDict) -> bool:
        """Sends the answer, and ends the visit; whether it was taken."""
        with self._line:
            try:
                seconds = self._patience_s + record_bytes(record) / self._rate
                send(self._line, Letter(kind="reply", record=record), seconds=seconds)
            except OSError:
                return False
            return True

    def end(self) -> None:
        """Ends the visit without an answer."""
        self._line.close()

    @property
    def left(self) -> bool:
        """Whether who brought the letter has gone."""
        self._line.setblocking(False)
        try:
            return not self._line.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


class Door:
    """The socket at `path`, open until `close`.

    clients     the users who may knock, by number
    most_bytes  of a letter's arrays
    patience_s  for a letter's head, and for an answer to be taken; a letter's arrays have a second
                for `rate` bytes beyond that, an answer's, while others wait, for `answer_rate`

    Raises ConfigError where others could put a socket of their own in its place, and
    FederationError where another vault holds it.
    """

    def __init__(
        self,
        path: Path,
        *,
        clients: frozenset[int],
        most_bytes: int,
        patience_s: float = 10.0,
        rate: float = 1e6,
        answer_rate: float = 1e7,
    ) -> None:
        self._path, self._clients = path, clients
        self._most, self._patience, self._rate = most_bytes, patience_s, rate
        self._answer_rate = answer_rate
        self._letters: queue.SimpleQueue[Visit | None] = queue.SimpleQueue()
        self._reading: dict[socket.socket, float] = {}
        self._waiting = 0
        self._change = threading.Lock()
        _make_folder(path.parent)
        self._held = _hold(path.parent)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with nearby(path) as name:
                path.unlink(missing_ok=True)  # of one who was killed: the lock says that it is gone
                self._socket.bind(name)
            path.chmod(0o660)
            self._socket.listen(_KNOCKS)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"the socket cannot be made: {error.strerror}", where=str(path)
            ) from None
        threading.Thread(target=self._welcome, name="door", daemon=True).start()

    def visits(self) -> Iterator[Visit]:
        """Each letter, as soon as the one before it is done with; ends when the door is closed."""
        while (visit := self._letters.get()) is not None:
            with self._change:
                self._waiting -= 1
            if visit.left:
                _log.warning("who brought a letter left before its turn: nothing was done")
                visit.end()
            else:
                yield visit

    def close(self) -> None:
        """Ends all visits, and takes the socket away; once."""
        if self._socket.fileno() < 0:
            return
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._change:
            lines = list(self._reading)
        for line in lines:
            _hang_up(line)
        self._path.unlink(missing_ok=True)
        os.close(self._held)
        with suppress(queue.Empty):
            while (visit := self._letters.get_nowait()) is not None:
                visit.end()
        self._letters.put(None)

    def _welcome(self) -> None:
        while True:
            try:
                line, _ = self._socket.accept()
            except ConnectionError:
                continue
            except OSError:  # closed; or no descriptor is left, which passes
                if self._socket.fileno() < 0:
                    return
                time.sleep(0.1)
                continue
            if not self._lets_in(line):
                line.close()
                continue
            reader = threading.Thread(target=self._read, args=(line,), name="visitor", daemon=True)
            try:
                reader.start()
            except RuntimeError:  # the machine has no thread left, which passes
                self._reading.pop(line, None)
                line.close()

    def _lets_in(self, line: socket.socket) -> bool:
        """Whether this visitor may stay; makes room where too many are still writing."""
        peer = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERS.size)
        process, user, _ = _PEERS.unpack(peer)
        if user not in self._clients:
            _log.warning("process %d of user %d is not a client of this vault", process, user)
            return False
        with self._change:
            if len(self._reading) + self._waiting >= _VISITORS:
                if not self._reading:
                    _log.warning("too many letters wait: another one was sent away")
                    return False
                slowest = min(self._reading, key=self._reading.__getitem__)
                del self._reading[slowest]
                _hang_up(slowest)
                _log.warning("too many visitors: the slowest was sent away")
            self._reading[line] = time.monotonic()
        return True

    def _read(self, line: socket.socket) -> None:
        try:
            letter = receive(line, most_bytes=self._most, head_s=self._patience, rate=self._rate)
        except Exception as error:  # whatever a visitor sends, the door stays
            what = str(error) if isinstance(error, WireError) else type(error).__name__
            _log.warning("no letter came: %s", what)
            letter = None
        with self._change:
            stays = self._reading.pop(line, None) is not None and letter is not None
            self._waiting += stays
        if stays and letter is not None:
            self._letters.put(Visit(letter, line, self._patience, self._answer_rate))
        else:
            line.close()


def is_guarded(folder: Path) -> bool:
    """Whether a vault is there whose socket lies in `folder`."""
    return is_held(folder / _LOCK)


def _hold(folder: Path) -> int:
    """The lock that says that a vault is there."""
    try:
        return hold(folder / _LOCK)
    except BlockingIOError:
        raise FederationError(
            "another vault is running here", where=str(folder), hint="stop it first"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the lock {_LOCK} cannot be made: {error.strerror}", where=str(folder)
        ) from None


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(
            f"the socket's folder cannot be made: {error.strerror}", where=str(folder)
        ) from None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o027:
        raise ConfigError(
            "others could put a socket of their own into this folder, or reach the one in it",
            where=str(folder),
            hint=f"it must be the vault's own and for its group to enter: chmod 750 {folder}",
        )


def _hang_up(line: socket.socket) -> None:
    with suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
