"""Becomes another program, which is told to end (SIGTERM) when the process that started it ends,
however that one ended. Run by its path, before anything else is loaded:

    python -I -S tether.py PARENT PROGRAM WORDS...
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2): kept by the program that this process becomes

if __name__ == "__main__":
    parent, *words = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(parent):  # it has ended already
        raise SystemExit(1)
    os.execv(words[0], words)
