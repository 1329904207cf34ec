"""Locks that say that a process is at work: they go with it, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

__all__ = ["hold", "is_held"]

_LOOK_S = 0.02


def is_held(path: Path) -> bool:
    """Whether a process holds the lock. Asking takes it for a moment: `hold` waits that out."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def hold(path: Path, patience_s: float = 1.0) -> int:
    """A handle that holds the lock, of a file that is made where there is none, until it is closed.

    Raises BlockingIOError where another process holds it for longer than `patience_s`, and OSError
    where the file cannot be made.
    """
    end = time.monotonic() + patience_s
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > end:
                os.close(handle)
                raise
        time.sleep(_LOOK_S)
