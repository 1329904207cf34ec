"""A process that spends until it is refused or killed, and says what it was told is spent.

    python -m tests.privacy.spender LEDGER NAME LIMIT [--key KEY] [--anchor FILE] [--slowly]

It waits for a line on stdin, so that several can be let go at once. After each reservation and
each commit it prints a line; what it printed, it was told. At the end of the budget it prints
"refused".
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from fedfuse.errors import BudgetExceeded
from fedfuse.privacy.ledger import Ledger
from tests.privacy.ledgers import mechanism, spend, up_to


def say(*words: object) -> None:
    """In one write, so that a kill cuts no line in two."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def write_in_pieces() -> None:
    """Makes a write last, so that a kill falls into it."""
    real = os.pwrite

    def piece(handle: int, data: bytes, at: int) -> int:
        time.sleep(0.0005)
        return real(handle, data[:32], at)

    os.pwrite = piece


def main() -> None:
    """Spends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("ledger", type=Path)
    parser.add_argument("name")
    parser.add_argument("limit", type=int)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--anchor", type=Path)
    parser.add_argument("--slowly", action="store_true")
    asked = parser.parse_args()
    if asked.slowly:
        write_in_pieces()
    ledger = Ledger.open(asked.ledger, key=asked.key, anchor=asked.anchor)
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
