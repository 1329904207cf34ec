"""A file of lines that only grows, shared by threads and processes: who may read or write when.

Knows nothing of what the lines say.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from weakref import WeakSet

from fedfuse.errors import LedgerError
from fedfuse.privacy import disk

__all__ = ["Journal"]

_BLOCK = 1 << 20


class Journal:
    """One opening of the file, and how far it has been read.

    Between two locks no file is held open, so it may be kept for days. After a fork, parent and
    child go on by themselves; a lock that a thread held in that moment stays with the parent.

    Raises LedgerError where the file is not there, cannot be used, or is not the one that was read
    before, grown at its end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rest = b""
        """What stands behind the last line: the beginning of one that a crash cut off."""
        self._mutex = threading.RLock()
        self._open: FileIO | None = None  # while it is locked
        self._file: tuple[int, int] | None = None  # device and inode
        self._read = 0, b""  # where the lines end that were read, and the last of them
        _JOURNALS.add(self)

    @contextmanager
    def locked(self, *, exclusive: bool = False) -> Iterator[bool]:
        """Holds the file: alone, or with other readers. False within a lock that is held already.

        The lock is flock's, on the file itself. Each time the file is opened anew, so that handles
        within a process, and processes after a fork, exclude each other too.
        """
        with self._mutex:
            if self._open is not None:
                if exclusive:
                    raise LedgerError("nothing can be entered while another entry is decided on")
                yield False
                return
            try:
                with self._telling():
                    self._open = file = _opened(self.path, writing=exclusive)
                    fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
                    self._check(file)
                yield True
            finally:
                self._release()

    def fresh(self) -> Iterator[bytes]:
        """Each line since the last time, without its end; under the lock.

        A line counts as read once the next is asked for: one that its reader cannot take is met
        again.
        """
        self.rest = b""
        with self._telling():
            handle, (end, _) = self._handle(), self._read
            for line in _lines(handle, end, os.fstat(handle).st_size):
                if not line.endswith(b"\n"):
                    self.rest = line
                    return
                yield line[:-1]
                end += len(line)
                self._read = end, line

    def known(self) -> Iterator[bytes]:
        """Each line read so far, once more; they do not change, so no lock is needed."""
        with self._telling(), _opened(self.path) as file:
            self._check(file)
            for line in _lines(file.fileno(), 0, self._read[0]):
                yield line[:-1]

    def append(self, lines: Sequence[bytes]) -> None:
        """Puts lines, given without their ends, on the disk: all, or none where that fails.

        Under the exclusive lock, with all before them read. What a crash left of a line is cut
        off first. They are fresh afterwards. In a file that was replaced meanwhile nothing counts.
        """
        handle, (end, _) = self._handle(), self._read
        try:
            if self.rest:
                os.ftruncate(handle, end)
            disk.append(handle, end, b"".join(line + b"\n" for line in lines))
        except OSError as error:
            what = "so nothing was entered"
            if self._left(handle) > end:
                what = "nor take back what it wrote, which counts where it is whole"
            raise LedgerError(
                f"cannot write, {what}: {error.strerror}",
                where=str(self.path),
                hint=disk.remedy(error),
            ) from None
        with self._telling():
            self._identify(handle)

    def _check(self, file: FileIO) -> None:
        """Raises LedgerError unless this is the file that was read, and has only grown."""
        size = self._identify(file.fileno())
        end, last = self._read
        if size < end:
            raise self._another("it lost entries while in use")
        if os.pread(file.fileno(), len(last), end - len(last)) != last:
            raise self._another("it was changed while in use")

    def _identify(self, handle: int) -> int:
        """The file's size. Raises LedgerError unless it is the one that was read, by its name."""
        found, named = os.fstat(handle), self.path.stat()
        identity = (found.st_dev, found.st_ino)
        if identity != (named.st_dev, named.st_ino) or self._file not in (None, identity):
            raise self._another("it was replaced by another file while in use")
        self._file = identity
        return found.st_size

    def _handle(self) -> int:
        """Of the locked file."""
        if self._open is None:
            raise LedgerError("its lock stayed with another process", where=str(self.path))
        return self._open.fileno()

    def _left(self, handle: int) -> int:
        """How long the file is after a write that failed, as far as that can be known."""
        try:
            return os.fstat(handle).st_size
        except OSError:
            return sys.maxsize

    def _release(self) -> None:
        """Gives the lock back, though a process that was forked meanwhile may have a copy of it."""
        held, self._open = self._open, None
        if held is not None:
            fcntl.flock(held, fcntl.LOCK_UN)
            held.close()

    def after_fork(self) -> None:
        """In the child, where the thread that held mutex and lock may not be."""
        self._mutex = threading.RLock()
        held, self._open = self._open, None
        if held is not None:
            held.close()  # of the copy alone

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
            raise LedgerError(
                f"cannot use it: {error.strerror}", where=str(self.path), hint=disk.remedy(error)
            ) from None


_JOURNALS: WeakSet[Journal] = WeakSet()


def _after_fork() -> None:
    for journal in tuple(_JOURNALS):
        journal.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _opened(path: Path, *, writing: bool = False) -> FileIO:
    def plain(name: str, flags: int) -> int:
        handle = os.open(name, flags | os.O_NONBLOCK)  # not waiting at a pipe
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, "it is not a plain file")
        return handle

    return FileIO(str(path), "r+" if writing else "r", opener=plain)


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
