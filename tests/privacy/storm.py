"""Many random sequences on ledgers, and many processes that are killed; says what was tried.

    python -m tests.privacy.storm 10000 --kills 300 --jobs 2

sequences   of tests.privacy.books: reserve, commit, replay, import, crash, kill, full and broken
            disks, tampering; each is a ledger of its own
kills       of processes that race for one budget, by SIGKILL at a random moment, until nothing is
            left of it; by the thousand where --folder is a disk

It ends with 1, and a way to see it again, where anything did not hold.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import secrets
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from fedfuse.errors import BudgetExceeded
from fedfuse.privacy.ledger import Kind, Ledger, verify
from fedfuse.privacy.signing import SigningKey
from tests.privacy.books import CLAIMS, MEMORY, SEEN, explore
from tests.privacy.ledgers import mechanism, spend, spent, up_to

CHUNK = 250


def sequences(number: int) -> Counter[str]:
    """Of a chunk: what was run."""
    SEEN.clear()
    explore(CHUNK, number=number)
    return SEEN.copy()


def race(folder: Path, draw: random.Random, kills: int, *, signed: bool) -> Counter[str]:
    """Three processes at a time on one ledger; each is killed at a random moment.

    Raises AssertionError where an entry that a process was told of is missing, the budget is
    overspent, or the ledger does not hold.
    """
    path, limit, done = folder / "node.ledger", 50 * kills, Counter[str]()
    key = folder / "key.pem" if signed else None
    anchor = folder / "anchor" if signed else None
    if key:
        SigningKey.create(key)
    ledger = Ledger.create(path, node="clinic-a", key=key, anchor=anchor)
    told: dict[int, tuple[str, str]] = {}
    while done["kills"] < kills:
        reader, writer = os.pipe()
        processes = [fork(path, key, anchor, limit, writer) for _ in range(3)]
        os.close(writer)
        for process in processes:
            time.sleep(draw.expovariate(100))
            os.kill(process, signal.SIGKILL)
            done["kills"] += 1
        said = b""
        while piece := os.read(reader, 65536):
            said += piece
        os.close(reader)
        for process in processes:
            _, status = os.waitpid(process, 0)
            assert os.WIFSIGNALED(status), "a process failed"
        for line in said.decode().splitlines():
            kind, number, hash = line.split()
            told[int(number)] = kind, hash
        done["in a write"] += not path.read_bytes().endswith(b"\n")
        entries = list(Ledger.open(path, key=key, anchor=anchor).entries())
        for number, (kind, hash) in told.items():
            assert (entries[number].kind, entries[number].hash) == (kind, hash), "forgotten"
        reserved = sum(entry.kind is Kind.RESERVED for entry in entries)
        assert sum(m.steps for m in ledger.history("scans")) == reserved <= limit, "overspent"
        assert verify(path, anchor=anchor).holds
    while True:  # what is left is there, to the last
        try:
            spend(ledger, f"rest {ledger.head}", what=mechanism(1), allow=up_to(limit, 1))
        except BudgetExceeded:
            break
    assert spent(path) == limit, "overspent"
    assert verify(path, anchor=anchor, every_signature=True).holds
    done["acknowledged"] += len(told)
    return done


def fork(path: Path, key: Path | None, anchor: Path | None, limit: int, writer: int) -> int:
    """A process that spends until it is killed."""
    process = os.fork()
    if process:
        return process
    try:
        ledger = Ledger.open(path, key=key, anchor=anchor)
        for number in range(10**9):
            request = f"{os.getpid()}-{time.monotonic_ns()}-{number}"
            try:
                entry = spend(ledger, request, what=mechanism(1), allow=up_to(limit, 1))
            except BudgetExceeded:
                time.sleep(60)
            os.write(writer, f"reserved {entry.number} {entry.hash}\n".encode())
            done = ledger.commit(entry)
            os.write(writer, f"committed {done.number} {done.hash}\n".encode())
    finally:
        os._exit(1)


def main() -> None:
    """Says what was tried, and fails where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sequences", type=int, help="a multiple of 250")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9))
    parser.add_argument("--folder", type=Path, default=MEMORY if MEMORY.is_dir() else None)
    asked = parser.parse_args()
    print(f"--seed {asked.seed}", flush=True)
    begun, seen = time.monotonic(), Counter[str]()
    numbers = range(asked.seed, asked.seed + -(-asked.sequences // CHUNK))
    with multiprocessing.get_context("spawn").Pool(asked.jobs) as pool:
        for count, part in enumerate(pool.imap_unordered(sequences, numbers), 1):
            seen += part
            print(f"{count * CHUNK} sequences, {time.monotonic() - begun:.0f} s", flush=True)
    draw, killed = random.Random(asked.seed), Counter[str]()
    for number in range(-(-asked.kills // 100)):
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            killed += race(Path(folder), draw, 100, signed=bool(number % 2))
    print(f"\n{time.monotonic() - begun:.0f} s\n\nsequences")
    for name, count in sorted(seen.items()):
        print(f"  {count:7d}  {name}")
    print("\nprocesses that raced and were killed")
    for name, count in sorted(killed.items()):
        print(f"  {count:7d}  {name}")
    missing = [claim for claim in CLAIMS if not seen[f"seen: {claim}"]]
    if missing and asked.sequences >= 1000:
        raise SystemExit(f"never tried: {missing}")
    print("\nnever overspent, never forgotten, and what is said to be seen was seen")


if __name__ == "__main__":
    main()
