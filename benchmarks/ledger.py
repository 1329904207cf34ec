"""The ledger against a SQLite database in WAL mode that keeps the same books.

    python benchmarks/ledger.py                  # all tables, a few minutes
    python benchmarks/ledger.py --trials 5 --lines 10000 --folder /some/disk

Both enter under an exclusive lock after a look at the sums of what was spent, chain each entry to
the one before by sha256, and are on the disk (SQLite: synchronous = FULL) before they answer. They
run in turn, in the same folder.

    rounds      reserve and commit, by one process; with fsync, and with none at all
    kill -9     at a random moment while a process enters: acknowledged entries that are missing
                afterwards, and files that do not open
    plain cp    of the file while a process enters: entries acknowledged before the copy began that
                the copy lacks, and copies that do not open and check
    size        reading and checking all of it, and the commands
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import platform
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fedfuse.errors import LedgerError
from fedfuse.privacy.chain import Chain
from fedfuse.privacy.ledger import Entry, Kind, Ledger, verify
from fedfuse.privacy.signing import SigningKey
from fedfuse.privacy.spec import Mechanism, Unit

WHAT = Mechanism(unit=Unit.RECORD, sample_rate=0.25, noise_multiplier=1.0, clip_norm=1.0, steps=1)
SERVER = "5e" * 32


class Books(Protocol):
    """What both can do."""

    def reserve(self, request: str) -> object:
        """Enters one step; on return it is on the disk."""

    def commit(self, entry: Any) -> None:
        """Enters that what `reserve` gave was done; likewise."""

    def requests(self) -> set[str]:
        """The requests of all entries, each checked."""


class Lines:
    """The ledger of fedfuse."""

    def __init__(self, path: Path, *, key: Path | None = None, anchor: Path | None = None) -> None:
        if not path.exists():
            Ledger.create(path, node="clinic-a", key=key, anchor=anchor)
        self.ledger = Ledger.open(path, key=key, anchor=anchor)

    def reserve(self, request: str) -> Entry:
        return self.ledger.reserve(
            "scans",
            WHAT,
            run="run-1",
            server=SERVER,
            node="clinic-a",
            round=1,
            request=request,
            allow=lambda history: None,
        )

    def commit(self, entry: Entry) -> None:
        self.ledger.commit(entry)

    def requests(self) -> set[str]:
        return {entry.request for entry in self.ledger.entries() if entry.kind is Kind.RESERVED}


class Rows:
    """The same books in SQLite; the sums have a table of their own."""

    def __init__(self, path: Path, *, synchronous: str = "FULL") -> None:
        self.base = sqlite3.connect(path, isolation_level=None, timeout=30)
        for statement in (
            "PRAGMA journal_mode = WAL",
            f"PRAGMA synchronous = {synchronous}",
            "CREATE TABLE IF NOT EXISTS entries (number INTEGER PRIMARY KEY, time TEXT, kind TEXT,"
            " dataset TEXT, unit TEXT, q REAL, sigma REAL, clip REAL, steps INTEGER, run TEXT,"
            " server TEXT, node TEXT, round INTEGER, request TEXT, prev TEXT, hash TEXT)",
            "CREATE UNIQUE INDEX IF NOT EXISTS once ON entries (request, kind)",
            "CREATE TABLE IF NOT EXISTS sums (dataset TEXT PRIMARY KEY, steps INTEGER)",
            "INSERT OR IGNORE INTO sums VALUES ('scans', 0)",
        ):
            self.base.execute(statement)

    def reserve(self, request: str) -> str:
        self.base.execute("BEGIN IMMEDIATE")
        self.base.execute("SELECT steps FROM sums WHERE dataset = 'scans'").fetchone()
        self.enter(request)
        self.base.execute("UPDATE sums SET steps = steps + 1 WHERE dataset = 'scans'")
        self.base.execute("COMMIT")
        return request

    def commit(self, request: str) -> None:
        self.base.execute("BEGIN IMMEDIATE")
        self.enter(request, "committed")
        self.base.execute("COMMIT")

    def enter(self, request: str, kind: str = "reserved") -> None:
        """One row, chained to the last."""
        last = self.base.execute(
            "SELECT number, hash FROM entries ORDER BY number DESC LIMIT 1"
        ).fetchone() or (-1, "0" * 64)
        row = (
            *(last[0] + 1, time.strftime("%Y-%m-%dT%H:%M:%SZ"), kind, "scans", "record"),
            *(0.25, 1.0, 1.0, 1, "run-1", SERVER, "clinic-a", 1, request, last[1]),
        )
        row = (*row, hashlib.sha256(repr(row).encode()).hexdigest())
        self.base.execute(f"INSERT INTO entries VALUES ({','.join('?' * len(row))})", row)

    def requests(self) -> set[str]:
        if self.base.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            raise sqlite3.DatabaseError("integrity_check")
        found, head = set(), "0" * 64
        for row in self.base.execute("SELECT * FROM entries ORDER BY number"):
            if row[-2] != head or hashlib.sha256(repr(row[:-1]).encode()).hexdigest() != row[-1]:
                raise sqlite3.DatabaseError("the chain is broken")
            head = row[-1]
            found.add(row[-3])
        return found


KINDS: dict[str, Callable[[Path], Books]] = {"ledger": Lines, "SQLite": Rows}
BROKEN = (LedgerError, sqlite3.DatabaseError)


# ---- a process that enters


def enter_for_ever(kind: str, path: Path) -> None:
    """Says each request once it is entered."""
    books = KINDS[kind](path)
    for number in range(10**9):
        books.reserve(f"{os.getpid()}-{number}")
        os.write(1, f"{os.getpid()}-{number}\n".encode())


@contextmanager
def entering(kind: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """That process, after its first entry."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--enter", kind, str(path)], stdout=subprocess.PIPE, bufsize=0
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """What it says from its first entry on, for a while."""
    assert process.stdout is not None
    text = process.stdout.read(1)
    end = time.monotonic() + seconds
    os.set_blocking(process.stdout.fileno(), False)
    while time.monotonic() < end:
        text += process.stdout.read(65536) or b""
        time.sleep(0.001)
    return text + (process.stdout.read(65536) or b"")


def whole(text: bytes) -> set[str]:
    return set(text[: text.rfind(b"\n") + 1].decode().split())


# ---- the tables


def table(*rows: tuple[object, ...]) -> None:
    """As Markdown; the first row is the head."""
    print("\n|" + "|".join(f" {cell} " for cell in rows[0]) + "|")
    print("|" + "---|" * len(rows[0]))
    for row in rows[1:]:
        print("|" + "|".join(f" {cell} " for cell in row) + "|")
    sys.stdout.flush()


def rounds(folder: Path, count: int = 20, turns: int = 15) -> None:
    """In short turns, so that a disk that is busy with something else is so for all."""
    SigningKey.create(folder / "key.pem")
    key, anchor = folder / "key.pem", folder / "anchor"
    lines: dict[str, Books] = {
        "ledger": Lines(folder / "a"),
        "ledger, signed": Lines(folder / "b", key=key),
        "ledger, signed and anchored": Lines(folder / "c", key=key, anchor=anchor),
    }
    safe = lines | {"SQLite WAL, synchronous = FULL": Rows(folder / "d")}
    unsafe = lines | {"SQLite WAL, synchronous = OFF": Rows(folder / "e", synchronous="OFF")}
    whole = [*timed_rounds("safe", safe, count, turns)]
    real = os.fsync
    os.fsync = lambda handle: None
    try:
        whole += timed_rounds("unsafe", unsafe, count, turns)
    finally:
        os.fsync = real
    table(("reserve and commit", "fsync", "median, us", "least, us"), *whole)


def timed_rounds(
    way: str, books: dict[str, Books], count: int, turns: int
) -> Iterator[tuple[object, ...]]:
    taken: dict[str, list[float]] = {name: [] for name in books}
    for turn in range(turns):
        for name, each in books.items():
            for number in range(count):
                begun = time.perf_counter()
                each.commit(each.reserve(f"{way}-{turn}-{number}"))
                taken[name].append(1e6 * (time.perf_counter() - begun))
    for name, found in taken.items():
        fsync = "yes" if way == "safe" else "no"
        yield name, fsync, f"{statistics.median(found):.0f}", f"{min(found):.0f}"


def kill(folder: Path, trials: int) -> None:
    """Each process goes on with the file of the one before."""
    draw = random.Random(1)
    rows = []
    counts = {kind: [0, 0, 0] for kind in KINDS}
    told: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for _ in range(trials):
        for kind in KINDS:
            path = folder / f"killed {kind}"
            with entering(kind, path) as process:
                text = said(process, draw.uniform(0, 0.2))
                process.kill()
                process.wait()
                assert process.stdout is not None
                told[kind] |= whole(text + (process.stdout.read() or b""))
            try:
                missing = told[kind] - KINDS[kind](path).requests()
                counts[kind][0] += bool(missing)
                counts[kind][1] = max(counts[kind][1], len(missing))
            except BROKEN:
                counts[kind][2] += 1
    for kind, (lost, missing, broken) in counts.items():
        rows.append((kind, trials, len(told[kind]), lost, missing, broken))
    table(("kill -9", "kills", "acknowledged", "kills that lost", "lost", "do not open"), *rows)


def copy(folder: Path, trials: int) -> None:
    """Of the file by its name; of a database also with the files beside it, one after the other."""
    draw = random.Random(2)
    ways = {"ledger": ("",), "SQLite": ("",), "SQLite, -wal too": ("", "-wal")}
    rows = []
    for way, ends in ways.items():
        kind = way.split(",")[0]
        acknowledged = lost = broken = incomplete = 0
        for trial in range(trials):
            path, target = folder / f"source {way} {trial}", folder / f"copy {way} {trial}"
            with entering(kind, path) as process:
                told = whole(said(process, draw.uniform(0.1, 0.5)))
                for end in ends:
                    shutil.copyfile(f"{path}{end}", f"{target}{end}")
            acknowledged += len(told)
            try:
                missing = told - KINDS[kind](target).requests()
            except BROKEN:
                broken += 1
                continue
            incomplete += bool(missing)
            lost += len(missing)
        rows.append((way, trials, acknowledged, incomplete, lost, broken))
    table(("plain cp", "copies", "acknowledged", "copies that lack", "lost", "do not open"), *rows)


def size(folder: Path, lines: int) -> None:
    """Half of the lines are reservations, half their commits."""
    path = folder / "long.ledger"
    Ledger.create(path, node="clinic-a")
    chain = Chain("long")
    chain.take(path.read_bytes()[:-1])
    with path.open("ab") as file:
        for number in range(lines // 2):
            work = {"dataset": "scans", "run": f"run-{number // 500}", "server": SERVER}
            work |= {"node": "clinic-a", "round": number % 500, "request": f"{number:032x}"}
            line = chain.next_line(Kind.RESERVED, **work, mechanism=WHAT, key=None)
            of = chain.take(line).number
            done = chain.next_line(Kind.COMMITTED, **work, mechanism=None, of=of, key=None)
            chain.take(done)
            file.write(line + b"\n" + done + b"\n")
    rows = Rows(folder / "long.sqlite")
    rows.base.execute("BEGIN")
    for number in range(lines):
        rows.enter(f"{number:032x}")
    rows.base.execute("COMMIT")

    def command(*words: str) -> None:
        whole = [sys.executable, "-m", "fedfuse", "ledger", *words]
        subprocess.run(whole, check=True, capture_output=True)

    timed = {
        "ledger: open and history": lambda: Ledger.open(path).history("scans"),
        "ledger: verify": lambda: verify(path),
        "fedfuse ledger show": lambda: command("show", str(path)),
        "fedfuse ledger verify": lambda: command("verify", str(path)),
        "SQLite: sum": lambda: rows.base.execute("SELECT SUM(steps) FROM entries").fetchone(),
        "SQLite: integrity_check and chain": rows.requests,
    }
    found = []
    for name, work in timed.items():
        seconds, busy = [], []
        for _ in range(3):
            begun, cpu = time.perf_counter(), sum(os.times()[:4])
            work()
            seconds.append(time.perf_counter() - begun)
            busy.append(sum(os.times()[:4]) - cpu)
        found.append((name, f"{statistics.median(seconds):.2f}", f"{statistics.median(busy):.2f}"))
    head = f"{lines} lines, {path.stat().st_size >> 20} MiB"
    table((head, "seconds, median of 3", "of CPU"), *found)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--tables", default="rounds,kill,copy,size")
    parser.add_argument("--enter", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.enter:
        enter_for_ever(asked.enter[0], Path(asked.enter[1]))
        return
    today = datetime.datetime.now(datetime.UTC).date()
    print(f"{today}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}, ", end="")
    print(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}")
    with tempfile.TemporaryDirectory(dir=asked.folder) as temporary:
        folder = Path(temporary)
        for name, measure in (
            ("rounds", lambda: rounds(folder)),
            ("kill", lambda: kill(folder, asked.trials)),
            ("copy", lambda: copy(folder, asked.trials)),
            ("size", lambda: size(folder, asked.lines)),
        ):
            if name in asked.tables.split(","):
                measure()


if __name__ == "__main__":
    main()
