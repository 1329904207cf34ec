"""What can be said for a ledger, from its file and from what others kept of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedfuse.errors import LedgerError
from fedfuse.privacy.anchor import Anchor
from fedfuse.privacy.chain import Chain
from fedfuse.privacy.journal import Journal
from fedfuse.privacy.tally import Tally

__all__ = ["Head", "Report", "read_heads", "verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The hash of a ledger's last line, as somebody else kept it."""

    hash: str
    ledger: str = ""
    """The id of the ledger; empty where it was given for the one that is looked at."""
    node: str = ""
    where: str = ""
    """Who kept it, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was found. `problems` is empty where everything that was asked for holds."""

    ledger: str
    """Its id; empty where not even the first line could be read."""
    node: str
    entries: int
    """Lines that hold together, the opening included."""
    head: str
    """The hash of the last of them."""
    public_key: str
    """That the first line names; empty where lines are not signed."""
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    """What is no problem, and worth knowing."""

    @property
    def holds(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def verify(
    path: Path,
    *,
    public_key: str = "",
    anchor: Path | None = None,
    heads: Iterable[Head] = (),
    every_signature: bool = False,
    seen: Callable[[int], None] = lambda size: None,
) -> Report:
    """Checks every line of a ledger, and that it is the one that others saw.

    public_key       what the lines must be signed with; else the key that the ledger itself names
                     is taken, which says nothing about who signed
    anchor           the file where the last line was noted
    heads            what others kept: each that is of this ledger must be a line of it, and some
                     must be
    every_signature  check each line's; the last line's covers them all
    seen             told the size of each line as it is checked

    Problems are in the report; raises LedgerError only where there is no file to look at.
    """
    journal, chain, tally = Journal(path), Chain(str(path)), Tally(str(path))
    problems: list[LedgerError] = []
    notes: list[str] = []
    with journal.locked():
        try:
            for line in journal.fresh():
                tally.take(chain.take(line))
                if every_signature:
                    chain.check_signature()
                seen(len(line) + 1)
            if journal.rest:
                chain.check_unfinished(journal.rest)
                notes.append(f"an unfinished last line of {len(journal.rest)} bytes is left out")
        except LedgerError as error:
            problems.append(error)
    if chain.opening is not None:
        heads = tuple(heads)
        problems += _claims(chain, public_key, anchor, heads)
        opening = chain.opening
        others = {head.ledger for head in heads if head.node == opening.node} - {opening.id, ""}
        notes += [f"node {opening.node!r} also answered with ledger {id}" for id in sorted(others)]
        if chain.opening.public_key and not public_key:
            notes.append("signed with the key that it names itself: compare it with the node's")
        if not chain.opening.public_key:
            notes.append("not signed: whoever can write the file can write all of it anew")
        if tally.open:
            notes.append(f"{len(tally.open)} reserved and never committed: they count as spent")
    elif not problems:
        problems.append(LedgerError("it holds not even a first line", where=str(path)))
    return Report(
        ledger=chain.opening.id if chain.opening else "",
        node=chain.opening.node if chain.opening else "",
        entries=chain.count,
        head=chain.head,
        public_key=chain.opening.public_key if chain.opening else "",
        problems=tuple(str(LedgerError(found.what, where=found.where)) for found in problems),
        notes=tuple(notes),
    )


def _claims(
    chain: Chain, public_key: str, anchor: Path | None, heads: Sequence[Head]
) -> list[LedgerError]:
    """What does not hold of signature, key, anchor and heads."""
    assert chain.opening is not None
    found = []
    if public_key and chain.opening.public_key != public_key:
        named = chain.opening.public_key or "none"
        found.append(LedgerError(f"its key is {named}, not {public_key}", where=chain.name))
    try:
        chain.check_signature()
    except LedgerError as error:
        found.append(error)
    if anchor is not None:
        try:
            Anchor.read(anchor).check(chain, anchor)
        except LedgerError as error:
            found.append(error)
    ours = [head for head in heads if head.ledger in ("", chain.opening.id)]
    if heads and not ours:
        found.append(LedgerError(f"{heads[0].where} has no line of this ledger", where=chain.name))
    found += [
        LedgerError(
            f"it lacks the line {head.hash}, which {head.where} saw: it lost entries, is an older "
            "copy, or was written anew",
            where=chain.name,
        )
        for head in ours
        if chain.number_of(head.hash) < 0
    ]
    return found


def read_heads(path: Path) -> tuple[Head, ...]:
    """What a server kept of its nodes' ledgers: lines {"round", "node", "ledger", "head"}.

    A last line that a crash cut off is left out. Raises LedgerError, OSError.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            tree = json.loads(line)
            head = Head(
                hash=tree["head"],
                ledger=tree["ledger"],
                node=tree["node"],
                where=f"{path}, line {number}",
            )
            if not (head.ledger and isinstance(head.hash, str)):
                raise ValueError("no ledger")
        except (ValueError, TypeError, KeyError):
            raise LedgerError("it is no head of a ledger", where=f"{path}, line {number}") from None
        found.append(head)
    return tuple(found)
