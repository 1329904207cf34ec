"""Files that hold after a crash at any moment.

    create    a new file, whole and on the disk, or none
    replace   a file with new content: all of it, or as it was before
    append    bytes at the end, on the disk; or, where that fails, the file as it was before

    remedy    what to do where one of these failed

"On the disk" is what fsync promises: no more than the file system and the disk keep of it. All
raise OSError.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

__all__ = ["append", "create", "remedy", "replace"]

_REMEDIES = {
    errno.ENOSPC: "free some space on its disk, and try again",
    errno.EDQUOT: "free some of this user's space on its disk, and try again",
    errno.EFBIG: "let its file grow larger (ulimit -f), and try again",
    errno.EROFS: "mount its disk so that it can be written",
    errno.EACCES: "let the user that runs this read and write it",
    errno.EPERM: "let the user that runs this read and write it",
    errno.ENOENT: "make its folder first",
    errno.EIO: "its disk fails: save what is on it, and mend it",
}


def create(path: Path, data: bytes) -> None:
    """Writes a file that nobody but its owner can read. Raises FileExistsError."""
    _write(path, data)
    _sync(path.parent)


def replace(path: Path, data: bytes) -> None:
    """Puts `data` in the place of a file's content, or of no file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of one who was killed
    try:
        _write(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def append(handle: int, end: int, data: bytes) -> None:
    """Writes `data` at `end`, where the file ends. On return it is on the disk."""
    try:
        written = 0
        while written < len(data):
            written += os.pwrite(handle, data[written:], end + written)
        os.fsync(handle)
    except BaseException:
        # Where even this fails, what stays has no end, and is cut off by the next writer; or it is
        # whole, and counts.
        with suppress(OSError):
            os.ftruncate(handle, end)
            os.fsync(handle)
        raise


def remedy(error: OSError) -> str:
    """What whoever uses the file can do about `error`."""
    return _REMEDIES.get(error.errno or 0, "look after its disk")


def _write(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        append(handle, 0, data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
