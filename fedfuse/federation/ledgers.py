"""A folder with the ledger of each simulated node, so that simulations on the same data compose."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from fedfuse.config import RunConfig
from fedfuse.errors import LedgerError, PrivacyError
from fedfuse.privacy.ledger import Ledger

__all__ = ["check_ledgers", "ledger_name", "open_ledgers"]


def check_ledgers(folder: Path, config: RunConfig) -> None:
    """Raises PrivacyError where `config` makes releases that no ledger may hold."""
    if not config.private:
        raise PrivacyError(
            'ledgers hold what a promise costs, but privacy.unit = "none" promises nothing',
            where=str(folder),
            hint="leave --ledgers out, or take a unit",
        )
    if config.privacy.noise_seed:
        raise PrivacyError(
            "noise from a seed can be removed, so a ledger must not hold it as a release",
            where=str(folder),
            hint="leave --ledgers or privacy.noise_seed out",
        )


def open_ledgers(folder: Path, nodes: Sequence[str]) -> tuple[Path, ...]:
    """The ledger of each of `nodes` in `folder`: all new where the folder is, else all there.

    Raises LedgerError where one is missing or cannot be trusted: it is never made anew, since
    that would be a new budget.
    """
    paths = tuple(folder / ledger_name(node) for node in nodes)
    if not folder.exists() or not any(folder.iterdir()):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise LedgerError(f"cannot make it: {error.strerror}", where=str(folder)) from None
        for path, node in zip(paths, nodes, strict=True):
            Ledger.create(path, node=node)
        return paths
    for path, node in zip(paths, nodes, strict=True):
        if not path.is_file():
            raise LedgerError(
                f"it has ledgers, but none of node {node!r} ({path.name})",
                where=str(folder),
                hint="restore it; a folder of its own is for data that nothing was spent on",
            )
        Ledger.open(path)
    return paths


def ledger_name(node: str) -> str:
    """The name of the file with the ledger of `node`, without surprises in it.

    >>> ledger_name("ward 7/b")
    'ward-7-b.d24ec1.ledger'
    """
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", node).strip("-")[:60]
    return f"{plain}.{hashlib.sha256(node.encode()).hexdigest()[:6]}.ledger"
