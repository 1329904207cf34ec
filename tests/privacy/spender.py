"""A process that spends until it is refused or killed, and says what it was told is spent.

    python -m tests.privacy.spender LEDGER NAME LIMIT [--key KEY] [--anchor FILE] [--dies SEED]

It waits for a line on stdin, so that several can be let go at once. After each reservation and
each commit it prints a line; what it printed, it was told. At the end of the budget it prints
"refused". With --dies it kills itself by SIGKILL within a drawn write to the ledger.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
from pathlib import Path

from fedfuse.errors import BudgetExceeded
from fedfuse.privacy.ledger import Ledger
from tests.privacy.ledgers import mechanism, spend, up_to


def say(*words: object) -> None:
    """In one write, so that a kill cuts no line in two."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def die_in_a_write(ledger: Path, draw: random.Random) -> None:
    """A drawn write to the ledger ends at a drawn byte, on the disk, and the process with it."""
    real, left = os.pwrite, draw.randint(4, 12)
    inode = ledger.stat().st_ino

    def pwrite(handle: int, data: bytes, at: int) -> int:
        nonlocal left
        left -= os.fstat(handle).st_ino == inode
        if left:
            return real(handle, data, at)
        real(handle, data[: draw.randrange(1, len(data))], at)
        os.fsync(handle)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("dead")

    os.pwrite = pwrite


def main() -> None:
    """Spends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("ledger", type=Path)
    parser.add_argument("name")
    parser.add_argument("limit", type=int)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--anchor", type=Path)
    parser.add_argument("--dies", type=int, metavar="SEED")
    asked = parser.parse_args()
    ledger = Ledger.open(asked.ledger, key=asked.key, anchor=asked.anchor)
    if asked.dies is not None:
        die_in_a_write(asked.ledger, random.Random(asked.dies))
    say("ready")
    sys.stdin.readline()
    for number in range(1_000_000):
        request = f"{asked.name}-{os.getpid()}-{number}"
        try:
            entry = spend(ledger, request, what=mechanism(1), allow=up_to(asked.limit, 1))
        except BudgetExceeded:
            break
        say("reserved", entry.number, entry.hash)
        committed = ledger.commit(entry)
        say("committed", committed.number, committed.hash)
    say("refused")


if __name__ == "__main__":
    main()
