"""A file of lines that only grows, shared by threads and processes: who may read or write when.

Knows nothing of what the lines say.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedfuse.errors import LedgerError
from fedfuse.privacy import disk

__all__ = ["Journal"]

_BLOCK = 1 << 20


class Journal:
    """One opening of the file, and how far it has been read.

    Raises LedgerError where the file is not there, cannot be used, or is not the one that was read
    before, grown at its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rest = b""
        """What stands behind the last line: the beginning of one that a crash cut off."""
        self._mutex = threading.RLock()
        self._handle = -1  # while it is locked
        self._file: tuple[int, int] | None = None  # device and inode
        self._end = 0  # of the lines read
        self._last = b""  # of them

    @contextmanager
    def locked(self, *, exclusive: bool = False) -> Iterator[bool]:
        """Holds the file: alone, or with other readers. False within a lock that is held already.

        The lock is flock's, on the file itself. Each time the file is opened anew, so that handles
        within a process, and processes after a fork, exclude each other too.
        """
        with self._mutex:
            if self._handle >= 0:
                if exclusive:
                    raise LedgerError("nothing can be entered while another entry is decided on")
                yield False
                return
            try:
                with self._telling():
                    self._handle = _lock(self.path, exclusive)
                    self._check()
                yield True
            finally:
                if self._handle >= 0:
                    os.close(self._handle)
                self._handle = -1

    def fresh(self) -> Iterator[bytes]:
        """Each line since the last time, without its end; under the lock.

        A line counts as read once the next is asked for: one that its reader cannot take is met
        again.
        """
        self.rest = b""
        with self._telling():
            for line in _lines(self._handle, self._end, os.fstat(self._handle).st_size):
                if not line.endswith(b"\n"):
                    self.rest = line
                    return
                yield line[:-1]
                self._end += len(line)
                self._last = line

    def known(self) -> Iterator[bytes]:
        """Each line read so far, once more; they do not change, so no lock is held."""
        with self._telling():
            handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for line in _lines(handle, 0, self._end):
                    yield line[:-1]
            finally:
                os.close(handle)

    def append(self, lines: Sequence[bytes]) -> None:
        """Puts lines, given without their ends, on the disk: all, or none where that fails.

        Under the exclusive lock, with all before them read. What a crash left of a line is cut
        off first. They are fresh afterwards.
        """
        try:
            if self.rest:
                os.ftruncate(self._handle, self._end)
            disk.append(self._handle, self._end, b"".join(line + b"\n" for line in lines))
        except OSError as error:
            raise LedgerError(
                f"cannot write, so nothing was entered: {error.strerror}",
                where=str(self.path),
                hint="free some space, or mend the disk",
            ) from None

    def _check(self) -> None:
        """Raises LedgerError unless this is the file that was read, and has only grown."""
        found, named = os.fstat(self._handle), self.path.stat()
        identity = (found.st_dev, found.st_ino)
        if identity != (named.st_dev, named.st_ino) or self._file not in (None, identity):
            raise self._another("it was replaced by another file while in use")
        self._file = identity
        if found.st_size < self._end:
            raise self._another("it lost entries while in use")
        start = self._end - len(self._last)
        if os.pread(self._handle, len(self._last), start) != self._last:
            raise self._another("it was changed while in use")

    def _another(self, what: str) -> LedgerError:
        return LedgerError(
            what,
            where=str(self.path),
            hint="restore the newest copy, and start the node anew",
        )

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns trouble with the file into a LedgerError."""
        try:
            yield
        except FileNotFoundError:
            raise LedgerError(
                "there is no ledger",
                where=str(self.path),
                hint="restore it; `fedfuse ledger init` is for data that nothing was spent on",
            ) from None
        except OSError as error:
            raise LedgerError(f"cannot use it: {error.strerror}", where=str(self.path)) from None


def _lock(path: Path, exclusive: bool) -> int:
    flags = os.O_RDWR if exclusive else os.O_RDONLY
    handle = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)  # not waiting at a pipe
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file")
        fcntl.flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _lines(handle: int, start: int, end: int) -> Iterator[bytes]:
    """The lines between two positions, each with its end; the last may lack it."""
    rest = b""
    while start < end:
        block = os.pread(handle, min(_BLOCK, end - start), start)
        if not block:
            break
        start += len(block)
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest
