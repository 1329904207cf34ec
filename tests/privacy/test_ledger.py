"""What was spent stays spent: entries, budgets, files, several at once."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import resource
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from fedfuse.errors import BudgetExceeded, LedgerError
from fedfuse.privacy import accounting, chain
from fedfuse.privacy.chain import Chain
from fedfuse.privacy.ledger import Kind, Ledger, verify
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.privacy.transfer import exported, imported
from fedfuse.privacy.verification import Head
from tests.privacy.ledgers import (
    SERVER,
    fill,
    lines_of,
    mechanism,
    spend,
    spent,
    trees_of,
    up_to,
    write_anew,
)

# ---- what is written


def test_a_new_ledger_holds_nothing_but_its_opening(ledger: Ledger, path: Path) -> None:
    (entry,) = ledger.entries()
    assert (entry.number, entry.kind, entry.node) == (0, Kind.OPENED, "clinic-a")
    assert entry.hash == ledger.head
    assert (ledger.datasets(), ledger.history("scans"), ledger.public_key) == ((), (), "")
    assert re.fullmatch("[0-9a-f]{32}", ledger.id)
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_two_ledgers_have_the_same_id(tmp_path: Path) -> None:
    ids = {Ledger.create(tmp_path / str(number), node="a").id for number in range(20)}
    assert len(ids) == 20


def test_an_entry_says_all_that_was_asked_for(ledger: Ledger, path: Path) -> None:
    what = Mechanism(
        unit=Unit.SUBJECT,
        sample_rate=0.1,
        noise_multiplier=1.3,
        clip_norm=0.7,
        steps=9,
        count_noise=2.5,
    )
    entry = ledger.reserve(
        "scans",
        what,
        run="run-7",
        server=SERVER,
        node="clinic-a",
        round=3,
        request="r1",
        allow=lambda history: None,
    )
    assert (entry.kind, entry.dataset, entry.mechanism) == (Kind.RESERVED, "scans", what)
    assert (entry.run, entry.server, entry.node) == ("run-7", SERVER, "clinic-a")
    assert (entry.round, entry.request, entry.of, entry.number) == (3, "r1", -1, 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", entry.time)
    committed = ledger.commit(entry)
    assert (committed.kind, committed.of, committed.mechanism) == (Kind.COMMITTED, 1, None)
    assert list(Ledger.open(path).entries())[1:] == [entry, committed]
    assert Ledger.open(path).history("scans") == (what,)


def test_who_does_not_use_fedfuse_reads_the_same(any_ledger: Ledger, path: Path) -> None:
    """The chain by hashlib, the spending by json, as docs/ledger.md describes them."""
    before = path.read_bytes()
    write_anew(path, trees_of(path))
    assert path.read_bytes() == before
    assert spent(path) == sum(m.steps for m in any_ledger.history("scans")) == 12


def test_a_clock_that_goes_back_changes_nothing(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Early(chain.datetime):
        @classmethod
        def now(cls, tz: object = None) -> Early:
            return cls(1999, 1, 1, tzinfo=chain.UTC)

    spend(ledger, "now")
    monkeypatch.setattr(chain, "datetime", Early)
    entry = spend(ledger, "then")
    assert entry.time == "1999-01-01T00:00:00.000000Z"
    assert verify(path).holds
    assert Ledger.open(path).history("scans") == (mechanism(8),)


# ---- what counts as spent


def test_equal_mechanisms_are_one_with_their_steps_summed(ledger: Ledger) -> None:
    for number, what in enumerate(
        [mechanism(4), mechanism(6), mechanism(1, sigma=2.0), mechanism(1, C=2.0), mechanism(2)]
    ):
        spend(ledger, f"r{number}", what=what)
    assert ledger.history("scans") == (
        mechanism(12),
        mechanism(1, sigma=2.0),
        mechanism(1, C=2.0),
    )


def test_data_sets_have_budgets_of_their_own(ledger: Ledger) -> None:
    spend(ledger, "r1", dataset="scans")
    spend(ledger, "r2", dataset="notes", what=mechanism(7))
    assert ledger.datasets() == ("notes", "scans")
    assert ledger.history("scans") == (mechanism(4),)
    assert ledger.history("notes") == (mechanism(7),)


def test_runs_and_servers_share_the_budget_of_a_data_set(ledger: Ledger) -> None:
    spend(ledger, "r1", run="one", server="aa")
    spend(ledger, "r2", run="two", server="bb")
    assert ledger.history("scans") == (mechanism(8),)


def test_a_reservation_without_a_commit_is_spent_all_the_same(ledger: Ledger, path: Path) -> None:
    spend(ledger, "r1")
    del ledger  # the process ends here
    again = Ledger.open(path)
    assert again.history("scans") == (mechanism(4),)
    assert again.accounts()[0].open == 1


def test_a_commit_changes_nothing_in_what_was_spent(ledger: Ledger) -> None:
    entry = spend(ledger, "r1")
    before = ledger.history("scans")
    ledger.commit(entry)
    assert ledger.history("scans") == before
    assert ledger.accounts()[0].open == 0


def test_what_became_of_a_request_can_be_asked(ledger: Ledger, path: Path, tmp_path: Path) -> None:
    """Also of another handle's, and of what is only imported."""
    other = Ledger.open(path)
    assert ledger.committed("r1") is None
    with pytest.raises(BudgetExceeded):
        spend(ledger, "r1", allow=up_to(1, 4))
    assert ledger.committed("r1") is None
    entry = spend(ledger, "r1")
    assert (ledger.committed("r1"), other.committed("r1")) == (False, False)
    ledger.commit(entry)
    assert (ledger.committed("r1"), other.committed("r1")) == (True, True)
    assert Ledger.open(path).committed("r1") is True
    elsewhere = Ledger.create(tmp_path / "other", node="b")
    for request in ("r1", "r2"):
        elsewhere.commit(spend(elsewhere, request, what=mechanism(9)))
    ledger.adopt(imported(exported(elsewhere.path), name="export"))
    assert (ledger.committed("r1"), ledger.committed("r2")) == (True, False)


def test_accounts_tell_units_runs_servers_and_rounds_apart(ledger: Ledger) -> None:
    spend(ledger, "r1", run="one", server="aa", round=1)
    spend(ledger, "r2", run="one", server="aa", round=2)
    spend(ledger, "r3", run="one", server="aa", round=2)  # of a round that was broken off
    spend(ledger, "r4", run="two", server="bb", round=1)
    subject = Mechanism(
        unit=Unit.SUBJECT, sample_rate=0.1, noise_multiplier=1.0, clip_norm=1.0, steps=1
    )
    spend(ledger, "r5", run="two", server="bb", round=2, what=subject)
    record, other = ledger.accounts()
    assert (record.unit, record.runs, record.servers, record.rounds) == (Unit.RECORD, 2, 2, 3)
    assert (record.steps, record.open, record.history) == (16, 4, (mechanism(16),))
    assert (other.unit, other.steps, other.rounds, other.history) == (
        Unit.SUBJECT,
        1,
        1,
        (subject,),
    )


# ---- what is refused


def test_the_budget_decides_on_all_that_was_spent_before(ledger: Ledger, path: Path) -> None:
    asked: list[tuple[Mechanism, ...]] = []
    spend(ledger, "r1", allow=asked.append)
    spend(ledger, "r2", allow=asked.append)
    assert asked == [(), (mechanism(4),)]
    before = path.read_bytes()
    with pytest.raises(BudgetExceeded):
        spend(ledger, "r3", allow=up_to(11, 4))
    assert path.read_bytes() == before
    spend(ledger, "r3", allow=up_to(12, 4))  # what was refused may be asked again


def test_the_real_accountant_stops_at_the_promise(ledger: Ledger) -> None:
    what = mechanism(4, q=0.1, sigma=1.5)

    def allow(history: tuple[Mechanism, ...]) -> None:
        if not accounting.within([*history, what], 1.5, 1e-5):
            raise BudgetExceeded("more than epsilon = 1.5")

    def allowed(number: int) -> bool:
        try:
            spend(ledger, f"r{number}", what=what, allow=allow)
        except BudgetExceeded:
            return False
        return True

    rounds = next(number for number in range(100) if not allowed(number))
    assert rounds > 1
    (total,) = ledger.history("scans")
    assert total.steps == 4 * rounds
    assert accounting.epsilon([total], 1e-5) <= 1.5
    assert accounting.epsilon([total, what], 1e-5) > 1.5


def test_runs_servers_and_settings_compose_to_what_dp_accounting_says(ledger: Ledger) -> None:
    """Three runs of two servers, settings of their own and changed in between, some broken off:
    written out event by event, in the order in which they were entered."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    runs = [
        ("one", "aa", [mechanism(4, q=0.05, sigma=1.4)] * 3),
        ("two", "bb", [mechanism(2, q=0.02, sigma=1.1)] * 4),
        ("one", "aa", [mechanism(4, q=0.05, sigma=1.4), mechanism(1, q=0.1, sigma=2.5)]),
        ("three", "bb", [mechanism(3, q=0.05, sigma=2.0)] * 2),
    ]
    other = PLDAccountant(value_discretization_interval=accounting.CALIBRATION_GRID)
    for number, (run, server, works) in enumerate(runs):
        for round, what in enumerate(works):
            entry = spend(ledger, f"{number}-{round}", run=run, server=server, what=what)
            if round % 2 == 0:
                ledger.commit(entry)
            event = GaussianDpEvent(what.noise_multiplier)
            for _ in range(what.steps):
                other.compose(PoissonSampledDpEvent(what.sample_rate, event))
    history = ledger.history("scans")
    found = accounting.epsilon(history, 1e-5, grid=accounting.CALIBRATION_GRID)
    assert found == pytest.approx(other.get_epsilon(1e-5), rel=1e-6)
    (account,) = ledger.accounts()
    assert (account.runs, account.servers) == (3, 2)


def test_nothing_is_written_before_the_budget_has_decided(ledger: Ledger, path: Path) -> None:
    sizes = [path.stat().st_size]
    spend(ledger, "r1", allow=lambda history: sizes.append(path.stat().st_size))
    assert sizes[0] == sizes[1] < path.stat().st_size


def test_a_request_is_answered_once(ledger: Ledger, path: Path) -> None:
    ledger.commit(spend(ledger, "r1"))
    before = path.read_bytes()
    for book in (ledger, Ledger.open(path)):
        with pytest.raises(LedgerError, match="'r1' was answered before"):
            spend(book, "r1", run="run-2", round=9)
    assert path.read_bytes() == before


def test_a_run_belongs_to_the_server_that_began_it(ledger: Ledger, path: Path) -> None:
    spend(ledger, "r1", run="one", server="aa")
    before = path.read_bytes()
    for book in (ledger, Ledger.open(path)):
        with pytest.raises(LedgerError, match="'one' belongs to another server"):
            spend(book, "r2", run="one", server="bb")
    assert path.read_bytes() == before
    spend(ledger, "r2", run="two", server="bb")


def test_a_commit_is_made_once(ledger: Ledger, path: Path) -> None:
    entry = spend(ledger, "r1")
    ledger.commit(entry)
    before = path.read_bytes()
    for book in (ledger, Ledger.open(path)):
        with pytest.raises(LedgerError, match="entry 1 is no open reservation"):
            book.commit(entry)
    assert path.read_bytes() == before


def test_only_a_reservation_of_this_ledger_is_committed(ledger: Ledger, tmp_path: Path) -> None:
    elsewhere = spend(Ledger.create(tmp_path / "other", node="b"), "r1")
    committed = ledger.commit(spend(ledger, "r1"))
    for entry in (elsewhere, committed, *ledger.entries()):
        with pytest.raises(LedgerError, match="no open reservation of this ledger"):
            ledger.commit(entry)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", ""),
        ("run", ""),
        ("request", ""),
        ("dataset", "a\nb"),
        ("run", "a\x1b[2Jb"),
        ("server", "\u202e"),
        ("request", "x" * 257),
        ("node", "x" * 257),
        ("round", -1),
        ("round", 1.0),
        ("round", True),
        ("server", None),
        ("run", 7),
    ],
)
def test_what_could_not_be_read_again_is_not_written(
    ledger: Ledger, path: Path, field: str, value: object
) -> None:
    before = path.read_bytes()
    fields = {"dataset": "d", "run": "u", "request": "r", "server": "s", "node": "n", "round": 1}
    with pytest.raises(LedgerError, match=field) as error:
        ledger.reserve(mechanism=mechanism(), allow=lambda _: None, **{**fields, field: value})  # type: ignore[arg-type]
    assert "line" not in error.value.where  # the ledger is as good as before
    assert path.read_bytes() == before


def test_within_the_decision_the_ledger_can_be_read_and_not_written(
    ledger: Ledger, path: Path
) -> None:
    def allow(history: tuple[Mechanism, ...]) -> None:
        assert ledger.history("scans") == history
        with pytest.raises(LedgerError, match="while another entry is decided on"):
            spend(ledger, "sly")

    spend(ledger, "r1", allow=allow)
    assert ledger.history("scans") == (mechanism(4),)


# ---- files


def test_a_ledger_is_never_overwritten(any_ledger: Ledger, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="never overwritten"):
        Ledger.create(path, node="clinic-a")
    assert path.read_bytes() == before


def test_a_vanished_ledger_is_no_new_budget(any_ledger: Ledger, path: Path) -> None:
    path.unlink()
    for ask in (
        lambda: Ledger.open(path),
        lambda: spend(any_ledger, "r9"),
        lambda: any_ledger.history("scans"),
        lambda: verify(path),
    ):
        with pytest.raises(LedgerError, match=r"node\.ledger: there is no ledger"):
            ask()
    assert not path.exists()


def test_an_empty_file_is_no_ledger(path: Path) -> None:
    path.touch()
    with pytest.raises(LedgerError, match="not even a first line"):
        Ledger.open(path)
    assert verify(path).problems == (f"{path}: it holds not even a first line",)


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(LedgerError, match="not a plain file"):
            Ledger.open(path)


def test_nothing_is_acknowledged_before_it_is_on_the_disk(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync is watched: what it has not seen, a loss of power may take."""
    safe: list[bytes] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        if os.fstat(handle).st_ino == path.stat().st_ino:
            safe.append(path.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    entry = spend(ledger, "r1")
    assert entry.hash.encode() in safe[-1]
    committed = ledger.commit(entry)
    assert committed.hash.encode() in safe[-1]
    other = path.with_name("other")
    Ledger.create(other, node="b")
    spend(Ledger.open(other), "r2")
    ledger.adopt(imported(exported(other), name="other"))
    assert b'"r2"' in safe[-1]


def test_a_new_ledger_is_on_the_disk_and_its_name_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (seen.append(os.fstat(handle).st_ino), real(handle))
    )
    Ledger.create(path, node="a")
    assert seen == [path.stat().st_ino, path.parent.stat().st_ino]


@pytest.mark.parametrize("signed", [False, True])
def test_an_unfinished_last_line_is_cut_off_and_said_so(
    path: Path, key: Path, signed: bool
) -> None:
    """Wherever a crash cut it; it was never acknowledged."""
    ledger = Ledger.create(path, node="clinic-a", key=key if signed else None)
    fill(ledger, 2)
    whole = path.read_bytes()
    spend(ledger, "cut off" * 20)  # longer than the next: what is not cut off stands out
    line = lines_of(path)[-1]
    for length in range(1, len(line)):
        path.write_bytes(whole + line[:length])
        again = Ledger.open(path, key=key if signed else None)
        note = f"an unfinished last line of {length} bytes is left out"
        assert again.problems == [note]
        assert again.history("scans") == (mechanism(8),)
        assert note in verify(path).notes
        assert path.read_bytes() == whole + line[:length]  # reading writes nothing
        if length % 97 == 1 or length == len(line) - 1:
            spend(again, "next")
            assert path.read_bytes().startswith(whole + b"{")
            assert path.read_bytes().endswith(b"\n")
            assert Ledger.open(path).history("scans") == (mechanism(12),)
            assert verify(path).holds


def test_a_finished_line_is_never_cut_off(any_ledger: Ledger, path: Path) -> None:
    """A line with its end was written as a whole: if it cannot be read, somebody changed it."""
    with path.open("ab") as file:
        file.write(b'{"dataset":"sca\n')
    before = path.read_bytes()
    for ask in (lambda: spend(any_ledger, "r9"), lambda: Ledger.open(path)):
        with pytest.raises(LedgerError, match="line 7: it is not a line of a ledger"):
            ask()
    assert path.read_bytes() == before


def test_a_first_line_that_was_cut_off_is_no_ledger(ledger: Ledger, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LedgerError, match="not even a first line"):
        Ledger.open(path)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size`: the kernel writes what fits, then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 1, 300])
def test_a_full_disk_enters_nothing_and_leaves_nothing_half_written(
    any_ledger: Ledger, path: Path, key: Path, room: int
) -> None:
    before, history = path.read_bytes(), any_ledger.history("scans")
    open_entry = list(any_ledger.entries())[-1]
    with largest_file(len(before) + room):
        for ask in (lambda: spend(any_ledger, "r9"), lambda: any_ledger.commit(open_entry)):
            with pytest.raises(LedgerError, match="cannot write, so nothing was entered: File"):
                ask()
    assert path.read_bytes() == before
    assert any_ledger.history("scans") == history
    spend(any_ledger, "r9")  # the request was not spent
    any_ledger.commit(open_entry)
    assert Ledger.open(path).history("scans") == (mechanism(16),)
    assert verify(path).holds


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_failing_disk_enters_nothing(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def broken(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, broken)
        with pytest.raises(LedgerError, match="nothing was entered: Input/output error"):
            spend(ledger, "r1")
    assert path.read_bytes() == before
    assert ledger.history("scans") == ()
    spend(ledger, "r1")


def test_a_failing_disk_breaks_no_batch_in_two(ledger: Ledger, path: Path, tmp_path: Path) -> None:
    other = Ledger.create(tmp_path / "other", node="b")
    fill(other, 5)
    entries = imported(exported(other.path), name="other")
    before = path.read_bytes()
    with largest_file(len(before) + 1500), pytest.raises(LedgerError, match="cannot write"):
        ledger.adopt(entries)
    assert path.read_bytes() == before
    assert ledger.adopt(entries) == 5


def test_a_ledger_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot create it: No such file"):
        Ledger.create(tmp_path / "nosuch" / "node.ledger", node="a")
    with largest_file(10), pytest.raises(LedgerError, match="cannot create it: File too large"):
        Ledger.create(tmp_path / "node.ledger", node="a")
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_ledger_can_be_read(
    any_ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that was mounted to be read."""
    real = os.open

    def read_only(name: object, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system")
        return real(name, flags, mode)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    assert any_ledger.history("scans") == (mechanism(12),)
    assert Ledger.open(path).history("scans") == (mechanism(12),)
    assert verify(path).holds
    assert len(imported(exported(path), name="x")) == 6
    with pytest.raises(LedgerError, match="Read-only file system"):
        spend(any_ledger, "r9")
    with pytest.raises(LedgerError, match="Read-only file system"):
        Ledger.create(path.with_name("new"), node="a")


# ---- several at once


def test_handles_see_what_others_entered(ledger: Ledger, path: Path) -> None:
    other = Ledger.open(path)
    entry = spend(ledger, "r1")
    assert other.history("scans") == (mechanism(4),)
    other.commit(entry)
    with pytest.raises(LedgerError, match="no open reservation"):
        ledger.commit(entry)
    with pytest.raises(BudgetExceeded):
        spend(other, "r2", allow=up_to(7, 4))
    with pytest.raises(LedgerError, match="answered before"):
        spend(other, "r1")


def test_while_one_decides_everybody_else_waits(ledger: Ledger, path: Path) -> None:
    """Asked of the file's lock itself; who only reads waits for nobody who reads."""

    def free(kind: int) -> bool:
        with path.open("r+b") as file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    found: list[bool] = []
    entry = spend(
        ledger, "r1", allow=lambda _: found.extend([free(fcntl.LOCK_SH), free(fcntl.LOCK_EX)])
    )
    assert found == [False, False]
    with ledger._locked():
        assert (free(fcntl.LOCK_SH), free(fcntl.LOCK_EX)) == (True, False)
    assert free(fcntl.LOCK_EX)
    real = os.pwrite
    with mock.patch.object(
        os, "pwrite", side_effect=lambda *g: (found.append(free(fcntl.LOCK_SH)), real(*g))[1]
    ):
        ledger.commit(entry)
    assert found == [False] * 3


def test_threads_share_a_ledger_and_its_budget(ledger: Ledger, path: Path) -> None:
    start = threading.Barrier(6)

    def thread(name: int) -> int:
        book, done = (ledger if name % 2 else Ledger.open(path)), 0
        start.wait()
        for number in range(10):
            try:
                allow = up_to(100, 4, slowly_s=0.002)
                book.commit(spend(book, f"{name}-{number}", allow=allow))
            except BudgetExceeded:
                break
            done += 1
        return done

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(thread, range(6))) == 25
    assert Ledger.open(path).history("scans") == (mechanism(100),)


def test_a_file_put_in_its_place_is_refused(ledger: Ledger, path: Path, tmp_path: Path) -> None:
    shutil.copy(path, tmp_path / "old")
    spend(ledger, "r1")
    (tmp_path / "old").replace(path)
    for ask in (lambda: spend(ledger, "r2"), lambda: ledger.history("scans")):
        with pytest.raises(LedgerError, match="replaced by another file while in use"):
            ask()


@pytest.mark.parametrize("swap", ["another file", "nothing"])
def test_an_entry_in_a_file_that_was_taken_away_meanwhile_is_not_acknowledged(
    ledger: Ledger, path: Path, tmp_path: Path, swap: str
) -> None:
    """It would be spent nowhere but in a file without a name."""
    copy = tmp_path / "copy"

    def allow(history: tuple[Mechanism, ...]) -> None:
        if swap == "nothing":
            path.rename(copy)
        else:
            shutil.copy(path, copy)
            copy.replace(path)

    with pytest.raises(LedgerError, match=r"was replaced by another|there is no ledger"):
        spend(ledger, "r1", allow=allow)


def test_a_link_that_was_turned_elsewhere_is_refused(
    ledger: Ledger, path: Path, tmp_path: Path
) -> None:
    """A link is the file that it leads to, as long as it leads there."""
    shutil.copy(path, tmp_path / "copy")
    link = tmp_path / "link"
    link.symlink_to(path)
    book = Ledger.open(link)
    spend(book, "r1")
    assert ledger.history("scans") == (mechanism(4),)
    link.unlink()
    link.symlink_to(tmp_path / "copy")
    for ask in (lambda: spend(book, "r2"), lambda: book.history("scans"), book.entries().__next__):
        with pytest.raises(LedgerError, match="replaced by another file while in use"):
            ask()
    assert spent(path) == 4
    assert spent(tmp_path / "copy") == 0


def test_an_older_copy_written_over_it_is_refused(ledger: Ledger, path: Path) -> None:
    old = path.read_bytes()
    spend(ledger, "r1")
    path.write_bytes(old)
    with pytest.raises(LedgerError, match="lost entries while in use"):
        spend(ledger, "r2")
    with pytest.raises(LedgerError, match="lost entries while in use"):
        ledger.history("scans")


def test_another_history_written_over_it_is_refused(ledger: Ledger, path: Path) -> None:
    spend(ledger, "r1")
    trees = trees_of(path)
    trees[1]["mechanism"]["steps"] = 1
    write_anew(path, [*trees, trees[1] | {"request": "r2"}])
    with pytest.raises(LedgerError, match="it was changed while in use"):
        spend(ledger, "r3")


# ---- size


@pytest.mark.slow
def test_a_hundred_thousand_lines_are_read_and_checked(path: Path) -> None:
    """How long that takes is measured in benchmarks/ledger.py."""
    Ledger.create(path, node="clinic-a")
    book = Chain("big")
    book.take(path.read_bytes()[:-1])
    with path.open("ab") as file:
        for number in range(50_000):
            work = {"dataset": "scans", "run": f"run-{number // 500}", "server": SERVER}
            work |= {"node": "clinic-a", "round": number % 500, "request": f"r{number}"}
            line = book.next_line(Kind.RESERVED, **work, mechanism=mechanism(), key=None)
            entry = book.take(line)
            done = book.next_line(Kind.COMMITTED, **work, mechanism=None, of=entry.number, key=None)
            book.take(done)
            file.write(line + b"\n" + done + b"\n")
    ledger = Ledger.open(path)
    assert ledger.history("scans") == (mechanism(200_000),)
    (account,) = ledger.accounts()
    assert (account.runs, account.rounds, account.open) == (100, 50_000, 0)
    entry = spend(ledger, "one more")
    assert entry.number == 100_001
    report = verify(path, heads=[Head(hash=book.head)])
    assert (report.entries, report.holds) == (100_002, True)


def test_data_read_without_a_promise_has_no_figure_any_more(tmp_path: Path) -> None:
    """Neither here nor in a ledger that imports it; the line is checked like any other."""
    path = tmp_path / "node.ledger"
    ledger = Ledger.create(path, node="clinic-a")
    spend(ledger, "1")
    work = {"run": "run-2", "server": SERVER, "node": "clinic-a", "round": 1}
    ledger.expose("scans", request="2", **work)
    for again in (ledger, Ledger.open(path)):
        with pytest.raises(LedgerError, match="promises nothing"):
            spend(again, "3")
        assert {account.exposed for account in again.accounts()} == {True}
    with pytest.raises(LedgerError, match="answered before"):
        ledger.expose("scans", request="1", **work)
    spend(ledger, "4", dataset="notes")
    assert verify(path).holds
    other = Ledger.create(tmp_path / "other.ledger", node="clinic-b")
    assert other.adopt(imported(exported(path), name="it")) == 3
    assert other.adopt(imported(exported(path), name="it")) == 0
    with pytest.raises(LedgerError, match="promises nothing"):
        spend(other, "5")
    assert verify(tmp_path / "other.ledger").holds
