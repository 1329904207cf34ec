"""Disks that are really full or really read-only: tmpfs of a few pages, mounted for a test.

Only root can mount one; elsewhere the test is skipped.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["fill_up", "mount", "small_disk"]


def mount(*words: object) -> bool:
    """Whether `mount` did what the words say."""
    try:
        done = subprocess.run(
            ["mount", *map(str, words)], capture_output=True, check=False, timeout=30
        )
    except OSError:
        return False
    return done.returncode == 0


@contextmanager
def small_disk(folder: Path, kib: int = 64) -> Iterator[Path]:
    """`folder`, which is made, as a disk of `kib` KiB."""
    folder.mkdir()
    if os.getuid() != 0 or not mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder):
        pytest.skip("nothing can be mounted here")
    try:
        yield folder
    finally:
        # Lazily: something may be mapped still.
        subprocess.run(["umount", "--lazy", folder], check=True, timeout=30)


def fill_up(folder: Path, *, but: int = 0) -> Path:
    """All pages of a disk but some are taken."""
    filler = folder / "filler"
    free = os.statvfs(folder)
    filler.write_bytes(b"\0" * (free.f_bavail - but) * free.f_bsize)
    return filler
