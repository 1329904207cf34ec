"""From a cell to a file inside the data folder, and from an .npy file to an array."""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedfuse.data.inline import numbers
from fedfuse.errors import DataError

__all__ = ["array_of", "looks_like_path", "media_path", "quiet", "read_array", "read_bytes"]

_MEDIA = re.compile(r"[^\s]+\.[A-Za-z0-9]{1,5}")


def looks_like_path(cell: str) -> bool:
    """Whether `cell` reads as a file's name, not as a sentence."""
    return len(cell) < 512 and _MEDIA.fullmatch(cell) is not None


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of decoding libraries. Not thread-safe: enter it before starting threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def media_path(root: Path, cell: str) -> Path:
    """The file that `cell` names. `root` must be resolved.

    Raises DataError where the path is absolute, leaves `root` (by ".." or a link) or is no file.
    """
    shown = f"file {cell}" if looks_like_path(cell) else "the file that its cell names"
    try:
        relative = Path(cell)
        if relative.is_absolute() or ".." in relative.parts:
            raise _outside(shown)
        if _is_plain(root, relative):
            return root / relative
        path = (root / relative).resolve()
        if not path.is_relative_to(root):
            raise _outside(shown)
        if path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):
        pass
    raise DataError(f"{shown} is missing", hint="paths are relative to the manifest's folder")


def _is_plain(root: Path, relative: Path) -> bool:
    """Whether a file lies there and no part of the way below `root` is a link: it is where its name
    says, which takes a fifth of the time in which a name is resolved."""
    way, mode = str(root), 0
    for part in relative.parts:
        way = f"{way}{os.sep}{part}"
        mode = os.lstat(way).st_mode
        if stat.S_ISLNK(mode):
            return False
    return stat.S_ISREG(mode)


def _outside(shown: str) -> DataError:
    return DataError(
        f"{shown} leaves the data folder",
        hint="keep media beside the manifest, and name them by relative paths",
    )


def read_bytes(path: Path) -> bytes:
    """The content of a media file. Raises DataError where it is empty or cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"file {path.name} cannot be read ({type(error).__name__})", hint="check its rights"
        ) from None
    if not data:
        raise DataError(f"file {path.name} is empty", hint="copy it again")
    return data


def read_array(path: Path) -> NDArray[np.float32]:
    """The numbers in an .npy file as float32; NaN and inf are left for the caller to judge.

    Raises DataError where the file is no .npy of real numbers, or is cut off.
    """
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError, SyntaxError):
        raise DataError(
            f"file {path.name} cannot be read as .npy", hint="write it with numpy.save"
        ) from None
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"file {path.name} holds {array.dtype}, not real numbers", hint="save it as float32"
        )
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def array_of(root: Path, cell: str) -> NDArray[np.float32]:
    """The numbers of a cell: an .npy file's, or those in the cell itself. Raises DataError."""
    if looks_like_path(cell) and cell.lower().endswith(".npy"):
        return read_array(media_path(root, cell))
    array = numbers(cell)
    if array is None:
        if looks_like_path(cell):
            media_path(root, cell)  # a missing file is the likelier reason
        raise DataError(
            "its cell is neither an .npy file nor numbers", hint='such as "0.5 1.2" or [0.5, 1.2]'
        )
    with np.errstate(over="ignore"):
        return array.astype(np.float32)
