"""A ledger that is kept open for long, interrupted, forked, or handed to another process."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from fedfuse.errors import LedgerError
from fedfuse.privacy.chain import Chain
from fedfuse.privacy.journal import Journal
from fedfuse.privacy.ledger import Ledger, verify
from fedfuse.privacy.tally import Tally
from tests.privacy.ledgers import fill, lines_of, mechanism, spend, spent

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_ledger_is_neither_pickled_nor_copied(
    ledger: Ledger, way: Callable[[object], object]
) -> None:
    """A copy would forget what the original learns; a process opens the file by itself."""
    with pytest.raises(TypeError, match="a Ledger cannot be pickled or copied: open it by its pa"):
        way(ledger)
    spend(ledger, "r1")


def work(path: Path, name: str) -> None:
    ledger = Ledger.open(path)
    for number in range(5):
        ledger.commit(spend(ledger, f"{name}-{number}", what=mechanism(1)))


def test_a_process_that_is_started_anew_opens_the_file_by_itself(ledger: Ledger) -> None:
    """While this one has it open too."""
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=work, args=(ledger.path, name)) for name in "ab"]
    for child in children:
        child.start()
    work(ledger.path, "parent")
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert ledger.history("scans") == (mechanism(15),)
    assert ledger.committed("a-4") is True


FORKED_WHILE_A_THREAD_HOLDS_IT = """
import os, sys, threading
from pathlib import Path
from fedfuse.privacy.ledger import Ledger
from tests.privacy.ledgers import mechanism, spend

ledger = Ledger.open(Path(sys.argv[1]))
held, go = threading.Event(), threading.Event()

def allow(history):
    held.set()
    go.wait()

thread = threading.Thread(target=lambda: spend(ledger, "thread", allow=allow))
thread.start()
held.wait()
ready, ready_w = os.pipe()
end, end_w = os.pipe()
child = os.fork()
if child == 0:
    spend(ledger, "child")  # waits for the parent's thread
    assert ledger.history("scans") == (mechanism(8),)
    os.write(ready_w, b"x")
    os.read(end, 1)  # stays
    os._exit(0)
go.set()
thread.join()
os.read(ready, 1)
spend(ledger, "parent")  # though the child, with its copies of what was open, is there
assert ledger.history("scans") == (mechanism(12),)
os.write(end_w, b"x")
assert os.waitpid(child, 0)[1] == 0
print("done")
"""

LOCK_KEPT_BY_A_CHILD = """
import os, sys
from pathlib import Path
from fedfuse.privacy.ledger import Ledger
from tests.privacy.ledgers import spend

ledger, children = Ledger.open(Path(sys.argv[1])), []
end, end_w = os.pipe()

def allow(history):
    children.append(os.fork())
    if children == [0]:
        os.close(end_w)
        os.read(end, 1)  # does nothing, and stays until the parent is done
        os._exit(0)

spend(ledger, "one", allow=allow)
spend(ledger, "two")
spend(Ledger.open(Path(sys.argv[1])), "three")
os.close(end_w)
os.waitpid(children[0], 0)
print("done")
"""

FORKED_WITHIN_A_DECISION = """
import os, sys
from pathlib import Path
from fedfuse.errors import LedgerError
from fedfuse.privacy.ledger import Ledger
from tests.privacy.ledgers import mechanism, spend

ledger, children = Ledger.open(Path(sys.argv[1])), []
try:
    spend(ledger, "both", allow=lambda history: children.append(os.fork()))
except LedgerError as error:
    assert children == [0], error
    assert "its lock stayed with another process" in error.what
    spend(ledger, "child")
    os._exit(0)
assert children != [0]
assert os.waitpid(children[0], 0)[1] == 0
spend(ledger, "parent")
assert ledger.history("scans") == (mechanism(12),)
print("done")
"""


@pytest.mark.parametrize(
    "program",
    [FORKED_WHILE_A_THREAD_HOLDS_IT, LOCK_KEPT_BY_A_CHILD, FORKED_WITHIN_A_DECISION],
    ids=["a thread holds it", "the child stays", "within a decision"],
)
def test_a_fork_at_a_bad_moment_neither_blocks_nor_spends_twice(
    ledger: Ledger, program: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, str(ledger.path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
    assert ledger.history("scans") == (mechanism(12),)
    assert spent(ledger.path) == 12
    assert verify(ledger.path).holds


def test_no_file_is_kept_open_however_long_a_ledger_is(ledger: Ledger, path: Path) -> None:
    """One that were left open at each call would end a node after days."""

    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    for number in range(200):
        entry = spend(ledger, f"r{number}")
        ledger.commit(entry)
        ledger.history("scans")
        with pytest.raises(LedgerError):
            spend(ledger, f"r{number}")
        next(ledger.entries())
    assert opened() == before
    assert len(lines_of(path)) == 401


@pytest.mark.parametrize("where", [(Chain, "take"), (Tally, "take"), (Journal, "_check")])
def test_what_was_interrupted_is_made_up_for(
    ledger: Ledger, path: Path, where: tuple[type, str]
) -> None:
    """Ctrl-C, or a want of memory, in the middle of reading what others entered."""
    fill(Ledger.open(path), 3)
    kind, name = where
    real = getattr(kind, name)

    def interrupted(*given: object) -> None:
        real(*given)
        raise KeyboardInterrupt

    for _ in range(3):
        with mock.patch.object(kind, name, interrupted), pytest.raises(KeyboardInterrupt):
            ledger.history("scans")
    assert ledger.history("scans") == (mechanism(12),)
    spend(ledger, "after")
    spend(Ledger.open(path), "another")
    assert ledger.history("scans") == Ledger.open(path).history("scans") == (mechanism(20),)
    assert verify(path).holds


def test_an_interrupted_write_is_taken_back(ledger: Ledger, path: Path) -> None:
    before = path.read_bytes()
    with (
        mock.patch.object(os, "fsync", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        spend(ledger, "r1")
    assert path.read_bytes() == before
    assert ledger.history("scans") == ()
    spend(ledger, "r1")
