"""Random sequences of everything that happens to a ledger, against a model that is a dict.

After each step: what was acknowledged is spent, nothing else is, the budget is not exceeded by
what `reserve` let through, and the ledger can be opened and checked. What somebody does to the file
is seen by those means that docs/ledger.md says, and by no others.
"""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, assume, seed, settings
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

LIMIT = 50
MEMORY = Path("/dev/shm")
"""Where fsync costs nothing, if there is such a place."""

sets = st.sampled_from(["scans", "notes"])
handles = st.integers(0, 1)
steps = st.integers(1, 9)
sigmas = st.sampled_from([1.0, 2.0])
fractions = st.floats(0, 1)


SEEN: Counter[str] = Counter()
"""How often each rule was run to its end."""


class Means(NamedTuple):
    """By what a change of the file is seen for certain."""

    file: bool
    key: bool
    anchor: bool
    head: bool


CLAIMS = {
    "any byte changed": Means(True, True, True, True),
    "a line deleted (not the last), moved, repeated, or taken from another ledger": Means(
        True, True, True, True
    ),
    "edited, and the chain made to fit, without the key": Means(False, True, True, True),
    "edited and signed with another key": Means(False, True, True, True),
    "the last lines cut off, at the end of a line or within one": Means(False, False, True, True),
    "an older copy put in its place": Means(False, False, True, True),
    "an older copy that went on by itself (two copies, each with a budget)": Means(
        False, False, True, True
    ),
    "a new ledger put in its place": Means(False, False, True, True),
    "any of these by somebody who has the key and can write the anchor": Means(
        False, False, False, True
    ),
}
"""The table of docs/ledger.md."""


def counted(rule_of: Any) -> Any:
    @functools.wraps(rule_of)
    def run(self: Books, *given: object, **named: object) -> None:
        rule_of(self, *given, **named)
        SEEN[rule_of.__name__] += 1

    return run


def at(fraction: float, length: int) -> int:
    """A place in something of `length`, 0 to length - 1."""
    return min(int(fraction * length), length - 1)


def some(part: float, length: int) -> int:
    """How many of `length` bytes: all of them for 1 alone."""
    return length if part == 1 else at(part, length)


def die_within(part: float) -> None:
    """From now on a write ends after some of its bytes, and the process with it."""
    real = os.pwrite

    def pwrite(handle: int, data: bytes, start: int) -> NoReturn:
        real(handle, data[: some(part, len(data))], start)
        os.fsync(handle)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("dead")

    os.pwrite = pwrite  # type: ignore[assignment]


class Books(RuleBasedStateMachine):
    """Two handles on one ledger, and another ledger to import from."""

    folder: Path

    @initialize(signed=st.booleans(), anchored=st.booleans(), entries=st.integers(0, 3))
    def begin(self, signed: bool, anchored: bool, entries: int) -> None:
        usable = MEMORY.is_dir() and os.access(MEMORY, os.W_OK)
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if usable else None))
        self.path = self.folder / "node.ledger"
        self.key = self.folder / "key.pem" if signed else None
        if self.key:
            SigningKey.create(self.key)
        self.anchor = self.folder / "anchor" if anchored else None
        first = Ledger.create(self.path, node="clinic-a", key=self.key, anchor=self.anchor)
        self.link = self.folder / "link"
        self.link.symlink_to(self.path)
        self.ledgers = [first, self.opened(self.link)]
        self.other = Ledger.create(self.folder / "other", node="clinic-b")
        self.spent: Counter[tuple[str, float]] = Counter()
        self.adopted: Counter[str] = Counter()
        self.requests: list[str] = []
        self.open: list[Entry] = []
        self.closed: list[Entry] = []
        self.heads = [first.head]
        self.copies: list[bytes] = []
        self.asked = 0
        for number in range(entries):
            self.copies.append(self.finished())
            self.enter(spend(self.ledgers[number % 2], self.request(), what=mechanism(4)))
        SEEN["sequences"] += 1

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    def opened(self, path: Path | None = None) -> Ledger:
        return Ledger.open(path or self.path, key=self.key, anchor=self.anchor)

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
    @counted
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
    @counted
    def commit(self, handle: int, which: float) -> None:
        entry = self.open.pop(at(which, len(self.open)))
        done = self.ledgers[handle].commit(entry)
        assert (done.kind, done.of) == (Kind.COMMITTED, entry.number)
        self.closed.append(entry)
        self.heads.append(done.hash)

    @rule(dataset=sets, first=steps, second=steps)
    @counted
    def reserve_at_once(self, dataset: str, first: int, second: int) -> None:
        """Two threads, each with a handle of its own: what does not fit after the other, waits."""
        before = self.total(dataset)

        def ask(ledger: Ledger, steps: int, request: str) -> Entry | None:
            try:
                what = mechanism(steps)
                return spend(ledger, request, dataset=dataset, what=what, allow=up_to(LIMIT, steps))
            except BudgetExceeded:
                return None

        with ThreadPoolExecutor(2) as pool:
            requests = [self.request(), self.request()]
            entries = list(pool.map(ask, self.ledgers, (first, second), requests))
        for entry in sorted(filter(None, entries), key=lambda entry: entry.number):
            self.enter(entry)
        fits = (before + first <= LIMIT, before + second <= LIMIT)
        assert any(entries) == any(fits)
        assert all(entries) == (before + first + second <= LIMIT)
        assert self.total(dataset) <= max(before, LIMIT)

    # ---- what is refused

    @precondition(lambda self: self.closed)
    @rule(handle=handles, which=fractions)
    @counted
    def commit_again(self, handle: int, which: float) -> None:
        entry = self.closed[at(which, len(self.closed))]
        self.refused(lambda: self.ledgers[handle].commit(entry))

    @precondition(lambda self: self.requests)
    @rule(handle=handles, which=fractions, dataset=sets)
    @counted
    def replay(self, handle: int, which: float, dataset: str) -> None:
        request = self.requests[at(which, len(self.requests))]
        self.refused(lambda: spend(self.ledgers[handle], request, dataset=dataset))

    @precondition(lambda self: self.open or self.closed)
    @rule(handle=handles)
    @counted
    def use_the_run_of_another_server(self, handle: int) -> None:
        self.refused(lambda: spend(self.ledgers[handle], self.request(), server="other"))

    def refused(self, ask: Callable[[], object]) -> None:
        before = self.path.read_bytes()
        with pytest.raises(LedgerError):
            ask()
        assert self.path.read_bytes() == before

    # ---- what goes wrong

    @rule(handle=handles)
    @counted
    def crash(self, handle: int) -> None:
        self.ledgers[handle] = self.opened()

    @rule(handle=handles, where=fractions, survivor=st.booleans())
    @counted
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

    @rule(handle=handles, where=fractions, after=st.integers(0, 2), dataset=sets)
    @counted
    def kill(self, handle: int, where: float, after: int, dataset: str) -> None:
        """A process enters, and SIGKILL ends it within a write to the ledger, or to the anchor."""
        reader, writer = os.pipe()
        requests = [self.request() for _ in range(after + 1)]
        process = os.fork()
        if process == 0:
            try:
                os.close(reader)
                for number, request in enumerate(requests):
                    if number == after:
                        die_within(where)
                    spend(self.ledgers[handle], request, dataset=dataset, what=mechanism(1))
                    os.write(writer, b"x")
            finally:
                os._exit(1)
        os.close(writer)
        _, status = os.waitpid(process, 0)
        told = len(os.read(reader, 100))
        os.close(reader)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert told == after
        entries = [entry for entry in self.opened().entries() if entry.request in requests]
        assert len(entries) in (told, told + (where == 1.0))
        for entry in entries:
            self.enter(entry)

    @precondition(lambda self: self.anchor)
    @rule(handle=handles, where=fractions)
    @counted
    def kill_before_the_anchor_is_written(self, handle: int, where: float) -> None:
        """The entry is whole, its anchor is not: it counts."""
        request = self.request()
        process = os.fork()
        if process == 0:
            try:
                real, write = os.pwrite, disk.replace

                def dying(path: Path, data: bytes) -> None:
                    die_within(where)
                    write(path, data)

                disk.replace = dying  # type: ignore[assignment]
                assert os.pwrite is real
                spend(self.ledgers[handle], request, what=mechanism(1))
            finally:
                os._exit(1)
        _, status = os.waitpid(process, 0)
        assert os.WIFSIGNALED(status)
        entry = list(self.opened().entries())[-1]
        assert entry.request == request
        self.enter(entry)

    @precondition(lambda self: self.anchor)
    @rule(handle=handles)
    @counted
    def crash_before_the_anchor_is_written(self, handle: int) -> None:
        """The entry is there, and nobody was told: it counts."""
        with (
            mock.patch.object(disk, "replace", side_effect=OSError(errno.ENOSPC, "full")),
            pytest.raises(LedgerError, match="counts as spent"),
        ):
            spend(self.ledgers[handle], self.request(), what=mechanism(1))
        self.enter(list(self.ledgers[1 - handle].entries())[-1])

    @rule(handle=handles, room=fractions, broken=st.booleans())
    @counted
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

    @rule(handle=handles, part=fractions)
    @counted
    def break_the_disk_for_good(self, handle: int, part: float) -> None:
        """Not even what was written can be taken back: it counts where it is whole."""
        pwrite = os.pwrite
        request, length = self.request(), [0]

        def begun(file: int, data: bytes, start: int) -> int:
            length[0] = some(part, len(data))
            pwrite(file, data[: length[0]], start)
            raise OSError(errno.EIO, "broken")

        rest = not self.path.read_bytes().endswith(b"\n")
        failing = mock.Mock(side_effect=OSError(errno.EIO, "broken"))
        with (
            mock.patch.object(os, "pwrite", begun),
            mock.patch.object(os, "fsync", failing),
            mock.patch.object(os, "ftruncate", failing),
            pytest.raises(LedgerError, match="cannot write") as error,
        ):
            spend(self.ledgers[handle], request, what=mechanism(1))
        assert ("nothing was entered" in error.value.what) == (not rest and not length[0])
        if rest:  # it could not even be cut off before
            assert not length[0]
        entry = list(self.opened().entries())[-1]
        assert (entry.request == request) == (part == 1.0 and not rest)
        if entry.request == request:
            self.enter(entry)

    @rule(handle=handles)
    @counted
    def read_only(self, handle: int) -> None:
        """As on a disk that was mounted so: it can be read, and nothing is entered."""
        real, before = os.open, self.path.read_bytes()

        def closed(name: object, flags: int, *rest: int, **named: int) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR):
                raise OSError(errno.EROFS, "Read-only file system")
            return real(name, flags, *rest, **named)  # type: ignore[arg-type]

        with mock.patch.object(os, "open", closed):
            with pytest.raises(LedgerError, match="Read-only file system"):
                spend(self.ledgers[handle], self.request())
            self.spent_is_what_was_acknowledged()
        assert self.path.read_bytes() == before

    # ---- what comes from elsewhere

    @rule(handle=handles, dataset=sets, steps=steps)
    @counted
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
    @counted
    def keep_a_copy(self) -> None:
        self.copies.append(self.finished())

    @rule(where=fractions, mask=st.integers(1, 255))
    @counted
    def change_a_byte(self, where: float, mask: int) -> None:
        changed = bytearray(self.finished())
        changed[at(where, len(changed))] ^= mask
        self.shows(bytes(changed), "any byte changed")

    @rule(
        which=fractions,
        change=st.sampled_from(["delete", "swap", "repeat", "move the last", "foreign"]),
    )
    @counted
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
            case "foreign":
                lines[number] = lines_of(self.other.path)[-1]
            case _:
                lines.insert(number, lines.pop())
        self.shows(
            b"".join(lines),
            "a line deleted (not the last), moved, repeated, or taken from another ledger",
        )

    @rule(which=fractions, within=st.booleans(), where=fractions)
    @counted
    def lose_the_end(self, which: float, within: bool, where: float) -> None:
        lines = self.finished().splitlines(keepends=True)
        assume(len(lines) > 1)
        kept = lines[: 1 + at(which, len(lines) - 1)]
        rest = lines[len(kept)][: at(where, len(lines[len(kept)]))] if within else b""
        self.shows(
            b"".join(kept) + rest, "the last lines cut off, at the end of a line or within one"
        )

    @precondition(lambda self: self.older_copies())
    @rule(which=fractions, anchored_too=st.booleans())
    @counted
    def put_an_older_copy_in_its_place(self, which: float, anchored_too: bool) -> None:
        copies = self.older_copies()
        scratch = self.scratch(copies[at(which, len(copies))])
        self.shows_with_its_anchor(scratch, "an older copy put in its place", anchored_too)

    @precondition(lambda self: self.older_copies())
    @rule(which=fractions, more=st.integers(1, 3), anchored_too=st.booleans())
    @counted
    def let_an_older_copy_go_on(self, which: float, more: int, anchored_too: bool) -> None:
        copies = self.older_copies()
        scratch = self.scratch(copies[at(which, len(copies))])
        for _ in range(more):
            spend(Ledger.open(scratch, key=self.key), self.request(), what=mechanism(1))
        claim = "an older copy that went on by itself (two copies, each with a budget)"
        self.shows_with_its_anchor(scratch, claim, anchored_too)

    @rule(anchored_too=st.booleans())
    @counted
    def put_a_new_ledger_in_its_place(self, anchored_too: bool) -> None:
        scratch = self.scratch(b"")
        scratch.unlink()
        Ledger.create(scratch, node="clinic-a", key=self.key)
        self.shows_with_its_anchor(scratch, "a new ledger put in its place", anchored_too)

    @precondition(lambda self: self.total("scans") + self.total("notes") > 1)
    @rule(which=fractions, signed_with=st.sampled_from(["nothing", "another key", "the key"]))
    @counted
    def write_it_anew(self, which: float, signed_with: str) -> None:
        """Steps are lowered, and the chain made to fit: without the key, or with a key."""
        assume(self.key or signed_with == "nothing")
        scratch = self.scratch(self.finished())
        trees = trees_of(scratch)
        candidates = [tree for tree in trees if (tree.get("mechanism") or {}).get("steps", 0) > 1]
        assume(candidates)
        candidates[at(which, len(candidates))]["mechanism"]["steps"] -= 1
        claim = "edited, and the chain made to fit, without the key"
        if signed_with == "another key":
            wrong = self.folder / "wrong.pem"
            wrong.unlink(missing_ok=True)
            trees[0]["public_key"] = SigningKey.create(wrong).public
            write_anew(scratch, trees, wrong)
            claim = "edited and signed with another key"
        else:
            write_anew(scratch, trees, self.key if signed_with == "the key" else None)
        self.shows_with_its_anchor(scratch, claim, signed_with == "the key")

    @rule(handle=handles, what=st.sampled_from(["gone", "a copy", "an older one", "a link"]))
    @counted
    def change_it_while_in_use(self, handle: int, what: str) -> None:
        """Both have read all of it, and neither goes on with another file, or with less."""
        whole, aside, copy = self.path.read_bytes(), self.folder / "aside", self.folder / "copy"
        last = len(self.finished().splitlines(keepends=True)[-1])
        copy.write_bytes(whole)
        with self.changed(what, whole, aside, copy, last):
            for ledger in self.ledgers if what != "a link" else self.linked():
                for ask in (
                    lambda: spend(ledger, "sly", what=mechanism(1)),  # noqa: B023
                    lambda: ledger.history("scans"),  # noqa: B023
                ):
                    with pytest.raises(
                        LedgerError, match=r"there is no ledger|replaced|lost|changed|not even"
                    ):
                        ask()
            assert what != "a copy" or self.path.read_bytes() == whole
        assert b"sly" not in copy.read_bytes()

    def linked(self) -> list[Ledger]:
        return [ledger for ledger in self.ledgers if ledger.path == self.link]

    @contextmanager
    def changed(
        self, what: str, whole: bytes, aside: Path, copy: Path, last: int
    ) -> Iterator[None]:
        """And afterwards as it was."""
        if what == "an older one":
            size = self.path.read_bytes().rfind(b"\n") + 1 - last
            with self.path.open("r+b") as file:
                file.truncate(size)
                yield
                file.seek(0)
                file.write(whole)
        elif what == "a link":
            self.link.unlink()
            self.link.symlink_to(copy)
            yield
            self.link.unlink()
            self.link.symlink_to(self.path)
        else:
            self.path.rename(aside)
            if what == "a copy":
                copy.replace(self.path)
                copy.write_bytes(whole)
            yield
            aside.replace(self.path)

    def older_copies(self) -> list[bytes]:
        whole = self.finished()
        return [copy for copy in self.copies if copy != whole]

    def finished(self) -> bytes:
        whole = self.path.read_bytes()
        return whole[: whole.rfind(b"\n") + 1]

    def scratch(self, data: bytes) -> Path:
        scratch = self.folder / "scratch"
        scratch.write_bytes(data)
        return scratch

    def shows_with_its_anchor(self, scratch: Path, claim: str, anchored_too: bool) -> None:
        """`shows`; with `anchored_too` whoever did it makes an anchor that fits as well."""
        if not anchored_too:
            self.shows(scratch.read_bytes(), claim)
            return
        forged = self.folder / "forged"
        forged.unlink(missing_ok=True)
        Ledger.open(scratch, key=self.key).anchor(forged)
        claim = "any of these by somebody who has the key and can write the anchor"
        self.shows(scratch.read_bytes(), claim, anchor=forged)

    def shows(self, data: bytes, claim: str, *, anchor: Path | None = None) -> None:
        """By what the table says, and by nothing else."""
        scratch, by = self.scratch(data), CLAIMS[claim]
        kept = [Head(hash=self.heads[-1], ledger=self.ledgers[0].id, node="clinic-a", where="r")]
        assert self.heads[-1].encode() in self.finished().splitlines()[-1]
        assert not verify(scratch, heads=kept).holds
        # The last lines may be lost from a ledger that is ahead of its anchor: nobody was told.
        noted = self.anchor and self.heads[-1] in self.anchor.read_text(encoding="utf-8")
        if anchor or noted:
            whose = anchor or self.anchor
            assert verify(scratch, anchor=whose).holds != by.anchor
            self.opens(scratch, not by.anchor, anchor=whose)
        if self.key:
            public = SigningKey.load(self.key).public
            assert verify(scratch, public_key=public).holds != by.key
            self.opens(scratch, not by.key, key=self.key)
        if by.file or not self.key:
            assert verify(scratch).holds != by.file
            self.opens(scratch, not by.file)
        SEEN[f"seen: {claim}"] += 1

    @staticmethod
    def opens(path: Path, may: bool, **options: Path | None) -> None:
        if may:
            Ledger.open(path, **options)
        else:
            with pytest.raises(LedgerError):
                Ledger.open(path, **options)

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


def explore(sequences: int, *, number: int | None = None) -> None:
    """Runs so many; drawn by `number`, or always the same ones."""
    run_state_machine_as_test(
        Books if number is None else seed(number)(Books),
        settings=settings(
            max_examples=sequences,
            stateful_step_count=20,
            deadline=None,
            derandomize=number is None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
