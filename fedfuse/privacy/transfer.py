"""A ledger in one JSON document, so that another ledger can take over what was spent.

Data that moves to another machine, or lies on two nodes, brings its books along: what was spent on
records does not depend on who spent it.

    format, ledger, node, public_key    what this is, and whose
    lines                               the ledger's lines as they are
    head, signature                     of the last line

A document is worth what a copy of the file is worth: it may be an old one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedfuse.errors import LedgerError
from fedfuse.privacy.chain import Chain, Entry
from fedfuse.privacy.journal import Journal
from fedfuse.privacy.tally import Tally

__all__ = ["exported", "imported"]

_FORMAT = "fedfuse ledger export 1"
_HINT = "ask for a new export; this one was changed, or made from a damaged ledger"


def exported(path: Path) -> str:
    """The document of the ledger in a file. Raises LedgerError where the ledger does not hold."""
    journal = Journal(path)
    with journal.locked():
        lines = list(journal.fresh())
    chain, _ = _read(lines, str(path))
    tree = _seal(chain) | {"lines": [line.decode() for line in lines]}
    return json.dumps(tree, indent=1) + "\n"


def imported(text: str, *, name: str, public_key: str = "") -> tuple[Entry, ...]:
    """The entries in a document, every one checked.

    name        what messages call the document
    public_key  what it must be signed with; else the key that it names itself is taken

    Raises LedgerError.
    """
    try:
        tree: Any = json.loads(text)
        lines = [line.encode("ascii") for line in tree["lines"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise LedgerError("it is no export of a ledger", where=name, hint=_HINT) from None
    chain, entries = _read(lines, name)
    if {key: value for key, value in tree.items() if key != "lines"} != _seal(chain):
        raise LedgerError("its head is not that of its lines", where=name, hint=_HINT)
    assert chain.opening is not None
    if public_key and chain.opening.public_key != public_key:
        raise LedgerError(
            f"its key is {chain.opening.public_key or 'none'}, not {public_key}", where=name
        )
    return entries


def _read(lines: Iterable[bytes], name: str) -> tuple[Chain, tuple[Entry, ...]]:
    chain, tally, entries = Chain(name), Tally(name), []
    for line in lines:
        entry = chain.take(line)
        tally.take(entry)
        entries.append(entry)
    if chain.opening is None:
        raise LedgerError("it holds not even a first line", where=name)
    chain.check_signature()
    return chain, tuple(entries)


def _seal(chain: Chain) -> dict[str, str]:
    assert chain.opening is not None
    return {
        "format": _FORMAT,
        "ledger": chain.opening.id,
        "node": chain.opening.node,
        "public_key": chain.opening.public_key,
        "head": chain.head,
        "signature": chain.signature,
    }
