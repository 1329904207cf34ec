"""Real processes that spend, race and are killed: what they were told is spent, is spent.

A kill leaves the page cache as it is, so these tests say nothing of a loss of power; that a line is
on the disk before it is acknowledged is tested in test_ledger.py.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fedfuse.errors import BudgetExceeded
from fedfuse.privacy.ledger import Kind, Ledger, verify
from fedfuse.privacy.signing import SigningKey
from tests.privacy.ledgers import mechanism, spend, spent, up_to

ROOT = Path(__file__).resolve().parents[2]
Said = list[tuple[str, int, str]]


@contextmanager
def spender(
    path: Path, name: str, limit: int, *options: object
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of `tests.privacy.spender` that has opened the ledger, and waits."""
    words = [sys.executable, "-m", "tests.privacy.spender", path, name, limit, *options]
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,  # what is behind a line that was read stays in the pipe
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def let_go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")


def said(process: subprocess.Popen[bytes]) -> Said:
    """What it was told, up to its end."""
    out, _ = process.communicate(timeout=60)
    return [parsed(line) for line in out.splitlines() if line != b"refused"]


def heard(process: subprocess.Popen[bytes], count: int) -> Said:
    """The next that it was told, so many."""
    assert process.stdout is not None
    return [parsed(process.stdout.readline()) for _ in range(count)]


def parsed(line: bytes) -> tuple[str, int, str]:
    kind, number, hash = line.decode().split()
    return kind, int(number), hash


def check_all_there(path: Path, told: Said, **options: Path | None) -> Ledger:
    """Every entry that anybody was told of is in the ledger, under its number."""
    report = verify(path, anchor=options.get("anchor"))
    assert report.problems == ()
    ledger = Ledger.open(path, **options)
    entries = list(ledger.entries())
    for kind, number, hash in told:
        assert entries[number].hash == hash
        assert entries[number].kind == kind
    reserved = sum(entry.kind is Kind.RESERVED for entry in entries)
    assert sum(m.steps for m in ledger.history("scans")) == reserved
    return ledger


@pytest.mark.parametrize("where", ["in a write", "anywhere"])
def test_what_was_acknowledged_is_there_after_a_kill(tmp_path: Path, where: str) -> None:
    """Each of two processes at a time is killed; the next go on after them.

    "in a write": by itself, at a drawn byte of a drawn write, which is on the disk up to there.
    "anywhere": by the test, at a random moment after a drawn number of entries.
    """
    path, anchor, key = tmp_path / "node.ledger", tmp_path / "anchor", tmp_path / "key.pem"
    SigningKey.create(key)
    Ledger.create(path, node="clinic-a", key=key, anchor=anchor)
    draw = random.Random(20)
    told: Said = []
    for trial in range(6):
        with ExitStack() as stack:
            processes = []
            for name in ("a", "b"):
                options: list[object] = ["--key", key, "--anchor", anchor]
                if where == "in a write":
                    options += ["--dies", draw.randrange(2**32)]
                processes.append(stack.enter_context(spender(path, name, 10**9, *options)))
            for process in processes:
                let_go(process)
            for process in processes:
                if where == "anywhere":
                    told += heard(process, draw.randint(2, 8))
                    time.sleep(draw.uniform(0.0, 0.02))
                    process.kill()
            for process in processes:
                told += said(process)
            assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
        if where == "in a write":
            assert not path.read_bytes().endswith(b"\n")
        ledger = check_all_there(path, told, key=key, anchor=anchor)
        spend(ledger, f"after {trial}", what=mechanism(1))
        assert verify(path, anchor=anchor, every_signature=True).holds
    assert len(told) >= 6 * 2 * 2


def test_processes_that_race_for_the_last_of_the_budget_never_overspend(tmp_path: Path) -> None:
    """Exactly as many are let as there is budget for."""
    path, limit = tmp_path / "node.ledger", 60
    Ledger.create(path, node="clinic-a")
    with ExitStack() as stack:
        processes = [stack.enter_context(spender(path, name, limit)) for name in "abcd"]
        for process in processes:
            let_go(process)
        told = [said(process) for process in processes]
    kinds = Counter(kind for process in told for kind, _, _ in process)
    assert kinds == {"reserved": limit, "committed": limit}
    check_all_there(path, [line for process in told for line in process])
    assert spent(path) == limit
    assert [process.returncode for process in processes] == [0] * 4


def test_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    """Its lock, which it holds while it writes, goes with it."""
    path = tmp_path / "node.ledger"
    ledger = Ledger.create(path, node="clinic-a")
    with spender(path, "a", 10**9, "--dies", 1) as process:
        let_go(process)
        assert process.wait(60) == -signal.SIGKILL
        assert not path.read_bytes().endswith(b"\n")
        spend(ledger, "next")
    assert verify(path).holds


def forked(ledger: Ledger, name: str, limit: int, results: multiprocessing.Queue[int]) -> None:
    done = 0
    try:
        while True:
            spend(ledger, f"{name}-{done}", what=mechanism(1), allow=up_to(limit, 1))
            done += 1
    except BudgetExceeded:
        results.put(done)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python warns of a fork beside threads")
def test_a_handle_that_was_forked_shares_the_budget_too(tmp_path: Path) -> None:
    """A lock that belonged to the open file would be shared by parent and child."""
    ledger = Ledger.create(tmp_path / "node.ledger", node="clinic-a")
    spend(ledger, "before", what=mechanism(1))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [
        context.Process(target=forked, args=(ledger, name, 41, results)) for name in ("a", "b")
    ]
    for child in children:
        child.start()
    forked(ledger, "parent", 41, results)
    total = sum(results.get(timeout=30) for _ in range(3))
    for child in children:
        child.join(30)
    assert total == 40
    assert spent(ledger.path) == 41
    assert verify(ledger.path).holds


WITHOUT_RIGHTS = """
import os
from pathlib import Path
from fedfuse.errors import LedgerError
from fedfuse.privacy.ledger import Ledger
from tests.privacy.ledgers import spend

if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)

def told(what):
    try:
        what()
    except LedgerError as error:
        print(error.what)

path, anchor = Path("node.ledger"), Path("shut/anchor")
told(lambda: Ledger.create(Path("shut/new"), node="a"))
told(lambda: spend(Ledger.open(path, anchor=anchor), "r1"))
told(lambda: spend(Ledger.open(Path("shut/read.ledger")), "r1"))
print(len(Ledger.open(Path("shut/read.ledger")).history("scans")), "kind")
"""


def test_files_and_folders_that_may_not_be_written_are_told(tmp_path: Path) -> None:
    """Of a process without root's rights."""
    shut = tmp_path / "shut"
    shut.mkdir()
    path, anchor, read = tmp_path / "node.ledger", shut / "anchor", shut / "read.ledger"
    Ledger.create(path, node="clinic-a", anchor=anchor)
    spend(Ledger.create(read, node="clinic-a"), "r0")
    before = anchor.read_bytes(), read.read_bytes()
    for file, mode in ((path, 0o666), (anchor, 0o444), (read, 0o444), (shut, 0o555)):
        file.chmod(mode)
    tmp_path.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RIGHTS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    shut.chmod(0o755)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "cannot create it: Permission denied",
        "the entry counts as spent, but the anchor cannot be written: Permission denied",
        "cannot use it: Permission denied",
        "1 kind",
    ]
    assert (anchor.read_bytes(), read.read_bytes()) == before
    assert spent(path) == 4
