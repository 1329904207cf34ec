"""Random sequences of everything that happens to a ledger, against a model that is a dict.

After each step: what was acknowledged is spent, nothing else is, the budget is not exceeded by
what `reserve` let through, and the ledger can be opened and checked.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fedfuse.errors import BudgetExceeded, LedgerError
from fedfuse.privacy import disk
from fedfuse.privacy.chain import Chain
from fedfuse.privacy.ledger import Entry, Kind, Ledger, verify
from fedfuse.privacy.signing import SigningKey
from fedfuse.privacy.transfer import exported, imported
from fedfuse.privacy.verification import Head
from tests.privacy.ledgers import lines_of, mechanism, spend, trees_of, up_to, write_anew

LIMIT = 30
MEMORY = Path("/dev/shm")
"""Where fsync costs nothing, if there is such a place."""

sets = st.sampled_from(["scans", "notes"])
handles = st.integers(0, 1)
steps = st.integers(1, 9)
sigmas = st.sampled_from([1.0, 2.0])
fractions = st.floats(0, 1)


def at(fraction: float, length: int) -> int:
    """A place in something of `length`, 0 to length - 1."""
    return min(int(fraction * length), length - 1)


class Books(RuleBasedStateMachine):
    """Two handles on one ledger, and another ledger to import from."""

    folder: Path

    @initialize(signed=st.booleans(), anchored=st.booleans())
    def begin(self, signed: bool, anchored: bool) -> None:
        usable = MEMORY.is_dir() and os.access(MEMORY, os.W_OK)
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if usable else None))
        self.path = self.folder / "node.ledger"
        self.key = self.folder / "key.pem" if signed else None
        if self.key:
            SigningKey.create(self.key)
        self.anchor = self.folder / "anchor" if anchored else None
        first = Ledger.create(self.path, node="clinic-a", key=self.key, anchor=self.anchor)
        self.ledgers = [first, self.opened()]
        self.other = Ledger.create(self.folder / "other", node="clinic-b")
        self.spent: Counter[tuple[str, float]] = Counter()
        self.adopted: Counter[str] = Counter()
        self.requests: list[str] = []
        self.open: list[Entry] = []
        self.closed: list[Entry] = []
        self.heads = [first.head]
        self.copies: list[bytes] = []
        self.asked = 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def opened(self) -> Ledger:
        return Ledger.open(self.path, key=self.key, anchor=self.anchor)

    def request(self) -> str:
        self.asked += 1
        return f"request-{self.asked}"

    def total(self, dataset: str) -> int:
        return sum(self.spent[dataset, sigma] for sigma in (1.0, 2.0))

    def enter(self, entry: Entry) -> None:
        """Into the model."""
        assert entry.mechanism is not None
        self.spent[entry.dataset, entry.mechanism.noise_multiplier] += entry.mechanism.steps
        self.requests.append(entry.request)
        self.open.append(entry)
        self.heads.append(entry.hash)

    # ---- what a node does

    @rule(handle=handles, dataset=sets, steps=steps, sigma=sigmas)
    def reserve(self, handle: int, dataset: str, steps: int, sigma: float) -> None:
        what, before = mechanism(steps, sigma=sigma), self.path.read_bytes()
        fits = self.total(dataset) + steps <= LIMIT
        try:
            entry = spend(
                self.ledgers[handle],
                self.request(),
                dataset=dataset,
                what=what,
                allow=up_to(LIMIT, steps),
            )
        except BudgetExceeded:
            assert not fits
            assert self.path.read_bytes() == before
        else:
            assert fits
            self.enter(entry)

    @precondition(lambda self: self.open)
    @rule(handle=handles, which=fractions)
    def commit(self, handle: int, which: float) -> None:
        entry = self.open.pop(at(which, len(self.open)))
        done = self.ledgers[handle].commit(entry)
        assert (done.kind, done.of) == (Kind.COMMITTED, entry.number)
        self.closed.append(entry)
        self.heads.append(done.hash)

    # ---- what is refused

    @precondition(lambda self: self.closed)
    @rule(handle=handles, which=fractions)
    def commit_again(self, handle: int, which: float) -> None:
        entry = self.closed[at(which, len(self.closed))]
        self.refused(lambda: self.ledgers[handle].commit(entry))

    @precondition(lambda self: self.requests)
    @rule(handle=handles, which=fractions, dataset=sets)
    def replay(self, handle: int, which: float, dataset: str) -> None:
        request = self.requests[at(which, len(self.requests))]
        self.refused(lambda: spend(self.ledgers[handle], request, dataset=dataset))

    @precondition(lambda self: self.open or self.closed)
    @rule(handle=handles)
    def use_the_run_of_another_server(self, handle: int) -> None:
        self.refused(lambda: spend(self.ledgers[handle], self.request(), server="other"))

    def refused(self, ask: Callable[[], object]) -> None:
        before = self.path.read_bytes()
        with pytest.raises(LedgerError):
            ask()
        assert self.path.read_bytes() == before

    # ---- what goes wrong

    @rule(handle=handles)
    def crash(self, handle: int) -> None:
        self.ledgers[handle] = self.opened()

    @rule(handle=handles, where=fractions, survivor=st.booleans())
    def crash_in_a_write(self, handle: int, where: float, survivor: bool) -> None:
        """Some of a line is there, and nobody was told."""
        chain = Chain("next")
        for line in lines_of(self.path):
            if line.endswith(b"\n"):
                chain.take(line[:-1])
        line = chain.next_line(
            Kind.RESERVED,
            dataset="scans",
            mechanism=mechanism(1),
            run="run-1",
            server="s",
            node="clinic-a",
            round=1,
            request=self.request(),
            key=SigningKey.load(self.key) if self.key else None,
        )
        size = sum(map(len, (line for line in lines_of(self.path) if line.endswith(b"\n"))))
        with self.path.open("r+b") as file:
            file.truncate(size)
            file.seek(size)
            file.write(line[: 1 + at(where, len(line))])
        self.ledgers[handle] = self.opened()
        if not survivor:
            self.ledgers[1 - handle] = self.opened()

    @precondition(lambda self: self.anchor)
    @rule(handle=handles)
    def crash_before_the_anchor_is_written(self, handle: int) -> None:
        """The entry is there, and nobody was told: it counts."""
        with (
            mock.patch.object(disk, "replace", side_effect=OSError(errno.ENOSPC, "full")),
            pytest.raises(LedgerError, match="counts as spent"),
        ):
            spend(self.ledgers[handle], self.request(), what=mechanism(1))
        self.enter(list(self.ledgers[1 - handle].entries())[-1])

    @rule(handle=handles, room=fractions, broken=st.booleans())
    def fill_the_disk(self, handle: int, room: float, broken: bool) -> None:
        whole = [line for line in lines_of(self.path) if line.endswith(b"\n")]
        pwrite, calls = os.pwrite, []

        def full(file: int, data: bytes, start: int) -> int:
            calls.append(start)
            if len(calls) > 1 or room == 0:
                raise OSError(errno.ENOSPC, "full")
            return pwrite(file, data[: max(1, at(room, len(data)))], start)

        def failing(file: int) -> None:
            raise OSError(errno.EIO, "broken")

        call = ("fsync", failing) if broken else ("pwrite", full)
        with mock.patch.object(os, *call), pytest.raises(LedgerError, match="nothing was entered"):
            spend(self.ledgers[handle], self.request(), what=mechanism(1))
        assert self.path.read_bytes() == b"".join(whole)

    # ---- what comes from elsewhere

    @rule(handle=handles, dataset=sets, steps=steps)
    def import_from_another_node(self, handle: int, dataset: str, steps: int) -> None:
        spend(self.other, self.request(), dataset=dataset, what=mechanism(steps), run="other")
        self.adopted[dataset] += steps
        entries = imported(exported(self.other.path), name="export")
        new = self.ledgers[handle].adopt(entries)
        assert new >= 1
        assert self.ledgers[1 - handle].adopt(entries) == 0
        for entry in list(self.ledgers[handle].entries())[-new:]:
            assert entry.mechanism is not None
            self.spent[entry.dataset, 1.0] += entry.mechanism.steps
            self.requests.append(entry.request)
            self.heads.append(entry.hash)

    # ---- what somebody does to the file

    @rule()
    def keep_a_copy(self) -> None:
        self.copies.append(self.path.read_bytes())

    @rule(where=fractions, mask=st.integers(1, 255))
    def change_a_byte(self, where: float, mask: int) -> None:
        whole = self.finished()
        changed = bytearray(whole)
        changed[at(where, len(whole))] ^= mask
        self.shows(bytes(changed))

    @rule(
        which=fractions,
        change=st.sampled_from(["delete", "swap", "repeat", "move the last"]),
    )
    def change_the_lines(self, which: float, change: str) -> None:
        lines = self.finished().splitlines(keepends=True)
        assume(len(lines) > 2)
        number = at(which, len(lines) - 1)
        match change:
            case "delete":  # the last would be a truncation
                del lines[number]
            case "swap":
                lines[number], lines[number + 1] = lines[number + 1], lines[number]
            case "repeat":
                lines.insert(number + 1, lines[number])
            case _:
                lines.insert(number, lines.pop())
        self.shows(b"".join(lines))

    @rule(which=fractions)
    def lose_the_end(self, which: float) -> None:
        lines = self.finished().splitlines(keepends=True)
        assume(len(lines) > 1)
        self.shows_elsewhere(b"".join(lines[: 1 + at(which, len(lines) - 1)]))

    @precondition(lambda self: self.copies)
    @rule(which=fractions)
    def put_an_older_copy_in_its_place(self, which: float) -> None:
        copy = self.copies[at(which, len(self.copies))]
        copy = copy[: copy.rfind(b"\n") + 1]
        assume(copy != self.finished())
        self.shows_elsewhere(copy)

    @rule(which=fractions, with_a_key=st.booleans())
    def write_it_anew(self, which: float, with_a_key: bool) -> None:
        """Steps are lowered, and the chain made to fit: without the key, or with another."""
        scratch = self.scratch(self.finished())
        trees = trees_of(scratch)
        candidates = [tree for tree in trees if (tree.get("mechanism") or {}).get("steps", 0) > 1]
        assume(candidates)
        candidates[at(which, len(candidates))]["mechanism"]["steps"] -= 1
        if self.key and with_a_key:
            wrong = self.folder / "wrong.pem"
            wrong.unlink(missing_ok=True)
            trees[0]["public_key"] = SigningKey.create(wrong).public
            write_anew(scratch, trees, wrong)
        else:
            write_anew(scratch, trees)
        if self.key:
            with pytest.raises(LedgerError):
                Ledger.open(scratch, key=self.key)
            assert not verify(scratch, public_key=SigningKey.load(self.key).public).holds
        self.shows_elsewhere(scratch.read_bytes())

    def finished(self) -> bytes:
        whole = self.path.read_bytes()
        return whole[: whole.rfind(b"\n") + 1]

    def scratch(self, data: bytes) -> Path:
        scratch = self.folder / "scratch"
        scratch.write_bytes(data)
        return scratch

    def shows(self, data: bytes) -> None:
        """By the file alone."""
        scratch = self.scratch(data)
        assert not verify(scratch).holds
        with pytest.raises(LedgerError):
            Ledger.open(scratch)

    def shows_elsewhere(self, data: bytes) -> None:
        """By the last head that a server kept; and by the anchor, if that is not behind."""
        scratch = self.scratch(data)
        last = self.finished().splitlines()[-1]
        assert self.heads[-1].encode() in last
        assert not verify(scratch, heads=[Head(hash=self.heads[-1], where="server")]).holds
        if self.anchor and self.heads[-1] in self.anchor.read_text(encoding="utf-8"):
            assert not verify(scratch, anchor=self.anchor).holds
            with pytest.raises(LedgerError):
                Ledger.open(scratch, key=self.key, anchor=self.anchor)

    # ---- what always holds

    @invariant()
    def spent_is_what_was_acknowledged(self) -> None:
        if not hasattr(self, "folder"):
            return
        report = verify(
            self.path, anchor=self.anchor, heads=[Head(hash=head) for head in self.heads]
        )
        assert report.problems == ()
        assert report.head == self.heads[-1]
        for ledger in (self.opened(), *self.ledgers):
            for dataset in ("scans", "notes"):
                found = Counter(
                    {
                        (dataset, what.noise_multiplier): what.steps
                        for what in ledger.history(dataset)
                    }
                )
                assert found == Counter(
                    {name: steps for name, steps in self.spent.items() if name[0] == dataset}
                )
            assert sum(account.open for account in ledger.accounts()) == len(self.open)


def explore(examples: int, *, derandomize: bool) -> None:
    run_state_machine_as_test(
        Books,
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            deadline=None,
            derandomize=derandomize,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_sequences_never_overspend_or_forget_and_tampering_shows() -> None:
    explore(150, derandomize=True)


@pytest.mark.slow
def test_ten_thousand_random_sequences() -> None:
    explore(10_000, derandomize=False)
