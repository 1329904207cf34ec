"""Files about private records: readable by their owner only, whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from fedfuse.errors import UsageError

__all__ = ["private_folder", "write_private"]


def write_private(path: Path, data: bytes) -> None:
    """Writes a file with rights 0600, in place of what was there. Raises UsageError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"cannot write it: {error.strerror or error}", where=str(path), hint="take another path"
        ) from None


def private_folder(path: Path) -> None:
    """Makes a folder with rights 0700, or gives one that is there these rights."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError as error:
        raise UsageError(
            f"cannot make the folder: {error.strerror or error}",
            where=str(path),
            hint="take another path",
        ) from None
