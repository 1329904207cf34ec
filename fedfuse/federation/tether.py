"""Becomes another program, which is told to end (SIGTERM) when the process that started it ends,
however that one ended. Run by its path, before anything else is loaded:

    python -I -S tether.py PARENT PROGRAM WORDS...
"""

import ctypes
import os
import signal
import sys

__all__ = ["end_with"]

_PR_SET_PDEATHSIG = 1  # prctl(2): kept by the program that this process becomes


def end_with(parent: int, by: signal.Signals) -> None:
    """This process gets the signal `by` when `parent`, which started it, ends; it ends at once
    where that has happened."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(by), 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(1)


if __name__ == "__main__":
    own_parent, *words = sys.argv[1:]
    end_with(int(own_parent), signal.SIGTERM)
    os.execv(words[0], words)
