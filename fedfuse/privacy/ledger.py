"""A node's ledger: one file that only grows, with what was spent on each of its data sets.

    reserve   before a record is read: from now on it is spent, whatever happens
    commit    after the work was done: this changes nothing in what was spent

A line is on the disk before either returns. What a line is stands in `chain`; what the file can
and cannot show, in docs/ledger.md.

Guarantees
    The budget that `allow` guards is never overspent by processes on one machine that use the
    same file, and no reservation that `reserve` returned is forgotten, after crashes too. Whoever
    can write the file can do what they like with it; a key, an anchor and the heads that servers
    keep make that show.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from fedfuse.errors import LedgerError
from fedfuse.privacy import disk
from fedfuse.privacy.anchor import Anchor, read_anchor
from fedfuse.privacy.chain import Chain, Entry, Kind, Opening
from fedfuse.privacy.journal import Journal
from fedfuse.privacy.signing import SigningKey
from fedfuse.privacy.spec import Mechanism
from fedfuse.privacy.tally import Account, Tally
from fedfuse.privacy.verification import Report, verify

__all__ = ["Account", "Allow", "Entry", "Kind", "Ledger", "Report", "verify"]

Allow = Callable[[tuple[Mechanism, ...]], None]
"""Gets all that was spent on a data set, and raises where no more may be."""


class Ledger:
    """The ledger in one file. Threads may share it, and any number may have the file open.

    It may be kept for days, and used in a child after a fork as well. It is not pickled: a process
    that is started anew opens it by its path.
    """

    def __init__(self, path: Path, key: SigningKey | None, anchor: Path | None) -> None:
        """Use `create` or `open`."""
        self.path = path
        self.problems: list[str] = []
        """What was wrong with the file and could be got round."""
        self._key, self._anchor = key, anchor
        self._journal = Journal(path)
        self._chain, self._tally = Chain(str(path)), Tally(str(path))
        self._trusted = 0  # how many lines a checked signature covers
        self._noted: bytes | None = None  # the anchor last found to be right: the chain only grows
        self._whole = True  # chain and tally have taken all lines that the journal has read

    @classmethod
    def create(
        cls, path: Path, *, node: str, key: Path | None = None, anchor: Path | None = None
    ) -> Ledger:
        """A new ledger, with nothing spent. Raises LedgerError where a file is there already.

        key     the private key that signs each line
        anchor  where the last line is noted after each change, see `anchor`
        """
        signer = SigningKey.load(key) if key else None
        chain = Chain(str(path))
        line = chain.open_line(id=secrets.token_hex(16), node=_named(node, "node"), key=signer)
        chain.take(line)
        if anchor is not None and anchor.exists():
            raise LedgerError("the anchor of another ledger is there already", where=str(anchor))
        try:
            disk.create(path, line + b"\n")
        except FileExistsError:
            raise LedgerError(
                "a file is there already: a ledger is never overwritten",
                where=str(path),
                hint="open it, or take another path for data that nothing was spent on",
            ) from None
        except OSError as error:
            raise LedgerError(
                f"cannot create it: {error.strerror}", where=str(path), hint=disk.remedy(error)
            ) from None
        if anchor is not None:
            try:
                _write_anchor(Anchor.of(chain, signer), anchor)
            except LedgerError:
                path.unlink()
                raise
        return cls.open(path, key=key, anchor=anchor)

    @classmethod
    def open(cls, path: Path, *, key: Path | None = None, anchor: Path | None = None) -> Ledger:
        """The ledger in a file, checked from the first line to the last.

        Never makes one: a ledger that vanished must not become a new budget. Without the key of
        a ledger that has one, it can be read only. With `anchor`, it must have the line that was
        noted there last.

        Raises LedgerError.
        """
        ledger = cls(path, SigningKey.load(key) if key else None, anchor)
        with ledger._locked():
            pass
        return ledger

    @property
    def id(self) -> str:
        """Drawn at random when the ledger was made."""
        return self._opening.id

    @property
    def node(self) -> str:
        """The node whose ledger it is."""
        return self._opening.node

    @property
    def public_key(self) -> str:
        """Of the key that signs each line; empty where lines are not signed."""
        return self._opening.public_key

    @property
    def head(self) -> str:
        """The hash of the last line, as of the last call of anything else here."""
        return self._chain.head

    # ---- reading

    def history(self, dataset: str) -> tuple[Mechanism, ...]:
        """All that was ever reserved on `dataset`, here or by another process, committed or not.

        Equal mechanisms are one, with their steps summed.
        """
        with self._locked():
            return self._tally.history(dataset)

    def datasets(self) -> tuple[str, ...]:
        """The names of all data sets that something was spent on."""
        with self._locked():
            return self._tally.datasets()

    def accounts(self) -> tuple[Account, ...]:
        """What was spent, for each data set and unit."""
        with self._locked():
            return self._tally.accounts()

    def committed(self, request: str) -> bool | None:
        """Whether what was spent on `request` was committed. None: nothing was spent on it.

        False also of work that another ledger says was done: whether it was committed there is not
        known here.
        """
        with self._locked():
            return self._tally.requests.get(request)

    def last_round(self, run: str) -> int:
        """The last round of `run` that something was spent on; 0 where there is none."""
        with self._locked():
            return self._tally.last.get(run, 0)

    def entries(self) -> Iterator[Entry]:
        """All lines that are there now, checked once more."""
        with self._locked():
            chain = Chain(str(self.path))
        for line in self._journal.known():
            yield chain.take(line)

    # ---- writing

    def reserve(
        self,
        dataset: str,
        mechanism: Mechanism,
        *,
        run: str,
        server: str,
        node: str,
        round: int,
        request: str,
        allow: Allow,
    ) -> Entry:
        """The entry that spends `mechanism` on `dataset`, on the disk, if `allow` lets it.

        `allow` gets the history without it, and runs while everybody else waits: nothing can be
        spent between its answer and the entry. What it raises is raised, and nothing is spent.

        Raises LedgerError where something was spent on this `request` before, where the `run` was
        another `server`'s first, and where the ledger cannot be trusted or written. Nothing is
        spent then, except where only the anchor could not be written.
        """
        work = _new_work(dataset, mechanism, run, server, node, round, request)
        with self._locked(writing=True):
            self._check_new(run, server, request)
            if dataset in self._tally.exposed:
                raise LedgerError(
                    "these records were read for a run that promises nothing, so that no promise "
                    "holds for them any more",
                    where=str(self.path),
                    hint="what is to be protected from now on needs other records",
                )
            line = self._chain.next_line(Kind.RESERVED, **work, key=self._key)
            allow(self._tally.history(dataset))
            return self._append([line])[0]

    def expose(
        self, dataset: str, *, run: str, server: str, node: str, round: int, request: str
    ) -> Entry:
        """The entry that says that a run without a promise reads `dataset`: NOT PRIVATE.

        No figure holds for that data set from then on, and `reserve` refuses it. Raises LedgerError
        as `reserve`.
        """
        work = _new_work(dataset, None, run, server, node, round, request)
        with self._locked(writing=True):
            self._check_new(run, server, request)
            line = self._chain.next_line(Kind.EXPOSED, **work, key=self._key)
            return self._append([line])[0]

    def _check_new(self, run: str, server: str, request: str) -> None:
        """Raises LedgerError on a request that was answered, or a run of another server."""
        if request in self._tally.requests:
            raise LedgerError(
                f"request {request!r} was answered before: what was spent on it stays spent",
                where=str(self.path),
                hint="a server that needs another answer makes another request",
            )
        owner = self._tally.servers.get(run, server)
        if owner != server:
            raise LedgerError(
                f"run {run!r} belongs to another server",
                where=str(self.path),
                hint="a server that begins a run gives it an id of its own",
            )

    def commit(self, entry: Entry) -> Entry:
        """The entry that says that what `entry` reserved has been done.

        Raises LedgerError where it says so already, or `entry` is no reservation of this ledger.
        """
        with self._locked(writing=True):
            if self._tally.open.get(entry.number) != entry:
                raise LedgerError(
                    f"entry {entry.number} is no open reservation of this ledger: "
                    "it was committed before, or never made here",
                    where=str(self.path),
                )
            work = _work(entry) | {"mechanism": None}
            line = self._chain.next_line(Kind.COMMITTED, **work, of=entry.number, key=self._key)
            return self._append([line])[0]

    def adopt(self, entries: Iterable[Entry]) -> int:
        """Enters what another ledger spent as imported; the number of entries that were new here.

        An entry is known where all that it says of the work is known, not its request id alone:
        what is not certainly the same is counted.
        """
        with self._locked(writing=True):
            known = {tuple(_work(entry).values()) for entry in self.entries()}
            ahead, new = self._chain.fork(), []
            for entry in entries:
                work = _work(entry)
                exposed = entry.kind is Kind.EXPOSED
                spends = entry.mechanism is not None or exposed
                if not spends or tuple(work.values()) in known:
                    continue
                known.add(tuple(work.values()))
                kind = Kind.EXPOSED if exposed else Kind.IMPORTED
                line = ahead.next_line(kind, **work, key=self._key)
                ahead.take(line)
                new.append(line)
            return len(self._append(new))

    def anchor(self, path: Path) -> None:
        """Notes the last line in a new file, and from now on after each change.

        Only right where the ledger is known to be complete. Raises LedgerError where a file is
        there: an anchor that speaks against the ledger is not to be replaced.
        """
        if path.exists():
            raise LedgerError("an anchor is there already", where=str(path))
        with self._locked(writing=True):
            _write_anchor(Anchor.of(self._chain, self._key), path)
            self._anchor = path

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a Ledger cannot be pickled or copied: open it by its path where it is used"
        )

    @property
    def _opening(self) -> Opening:
        assert self._chain.opening is not None  # a ledger without a first line is never opened
        return self._chain.opening

    @contextmanager
    def _locked(self, *, writing: bool = False) -> Iterator[None]:
        """The file under its lock, with all that others appended read and checked."""
        with self._journal.locked(exclusive=writing) as first:
            if first:
                self._catch_up()
                self._check_trust(writing)
            yield

    def _catch_up(self, entries: list[Entry] | None = None) -> None:
        """Takes what was appended since the last time, here or by others, into `entries` too."""
        if not self._whole:  # it was broken off in between, or a fork came
            chain, tally = Chain(str(self.path)), Tally(str(self.path))
            for line in self._journal.known():
                tally.take(chain.take(line))
            self._chain, self._tally = chain, tally
        self._whole = False
        for line in self._journal.fresh():
            entry = self._chain.take(line)
            self._tally.take(entry)
            if entries is not None:
                entries.append(entry)
        self._whole = True
        if not self._chain.count:
            raise LedgerError(
                "it holds not even a first line",
                where=str(self.path),
                hint="restore it; if it was just being made, remove it and make it again",
            )
        rest = self._journal.rest
        if rest:
            self._chain.check_unfinished(rest)
            self.problems = [f"an unfinished last line of {len(rest)} bytes is left out"]

    def _check_trust(self, writing: bool) -> None:
        """Raises LedgerError unless signature, key and anchor are those of the lines read."""
        if self._chain.count > self._trusted:
            self._chain.check_signature()
            self._trusted = self._chain.count
        if self._key is None and writing and self.public_key:
            raise LedgerError(
                "its lines are signed: without its key it can only be read", where=str(self.path)
            )
        if self._key is not None and self._key.public != self.public_key:
            raise LedgerError(
                f"its key is {self.public_key or 'none'}, not {self._key.public}",
                where=str(self.path),
                hint="open it with the key that it was made with",
            )
        if self._anchor is not None:
            data = read_anchor(self._anchor)
            if data != self._noted:
                Anchor.parsed(data, self._anchor).check(self._chain, self._anchor)
                self._noted = data

    def _append(self, lines: Sequence[bytes]) -> list[Entry]:
        """The entries in `lines`, which are on the disk, and anchored."""
        if not lines:
            return []
        self._journal.append(lines)
        entries: list[Entry] = []
        self._catch_up(entries)
        self._trusted = self._chain.count  # signed here
        if self._anchor is not None:
            anchor = Anchor.of(self._chain, self._key)
            _write_anchor(anchor, self._anchor, entered=True)
            self._noted = anchor.data
        return entries


def _named(text: str, name: str) -> str:
    if not text:
        raise LedgerError(f"{name} must not be empty")
    return text


def _new_work(
    dataset: str,
    mechanism: Mechanism | None,
    run: str,
    server: str,
    node: str,
    round: int,
    request: str,
) -> dict[str, Any]:
    """What a new entry says of the work. Raises LedgerError where a name is empty."""
    for text, name in ((dataset, "dataset"), (run, "run"), (request, "request")):
        _named(text, name)
    return {
        "dataset": dataset,
        "mechanism": mechanism,
        "run": run,
        "server": server,
        "node": node,
        "round": round,
        "request": request,
    }


def _work(entry: Entry) -> dict[str, Any]:
    """What an entry says of the work that was done."""
    names = ("dataset", "mechanism", "run", "server", "node", "round", "request")
    return {name: getattr(entry, name) for name in names}


def _write_anchor(anchor: Anchor, path: Path, *, entered: bool = False) -> None:
    """`entered`: after an entry, which stays."""
    try:
        anchor.write(path)
    except OSError as error:
        what = "the entry counts as spent, but the anchor" if entered else "the anchor"
        why = ": without its anchor no work may start" if entered else ""
        raise LedgerError(
            f"{what} cannot be written: {error.strerror}",
            where=str(path),
            hint=f"{disk.remedy(error)}{why}",
        ) from None
