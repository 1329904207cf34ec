"""Memory that a step has freed is there for the next one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

PAGES = """
import ctypes, sys
import torch
from fedfuse.allocator import keep_freed_memory

class Malloc(ctypes.Structure):  # of mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

def now():
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Malloc
    return ask()

if sys.argv[1] == "keep":
    keep_freed_memory()
before = now()
blocks = [torch.ones(5_000_000) for _ in range(5)]
held = now()
del blocks
after = now()
print(held.hblkhd - before.hblkhd, after.arena - before.arena)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="no glibc 2.33 or later")
def test_freed_blocks_stay_in_the_heap() -> None:
    def bytes_of(word: str, **env: str) -> tuple[int, int]:
        """Of blocks of 100 MB in all: mapped one by one while in use; kept in the heap after."""
        command = [sys.executable, "-c", PAGES, word]
        clean = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=clean | env
        ).stdout
        mapped, kept = map(int, done.split())
        return mapped, kept

    mapped, kept = bytes_of("keep")
    assert mapped < 20e6
    assert kept > 80e6
    mapped, kept = bytes_of("leave")
    assert mapped > 80e6
    assert kept < 20e6
    # Whoever has said how it should be is not overruled.
    mapped, _ = bytes_of("keep", MALLOC_MMAP_THRESHOLD_="100000")
    assert mapped > 80e6
