"""What several runs, or several ledgers, cost together where they are on the same data."""

from __future__ import annotations

from collections.abc import Sequence

from fedfuse.privacy.spec import Unit
from fedfuse.reports import assumptions
from fedfuse.reports.facts import Account, Facts, detail_of, mixed, ranked
from fedfuse.reports.statement import Role, Statement

__all__ = ["together"]

_AGAINST = {
    "node": "whoever sees all updates of a node",
    "update": "whoever sees all updates of a node",
    "model": "whoever gets the models",
    "dataset": "whoever sees all that was released from the data set",
}


def together(sections: Sequence[Facts]) -> tuple[Facts, ...]:
    """What sections of one kind that name the same data cost together, for each such data.

    Runs are on the same data where their fingerprints agree; ledgers where a data set has the same
    name in several. Of different deltas the smallest is taken.
    """
    found = []
    for kind in ("run", "ledger"):
        shared: dict[str, list[Facts]] = {}
        for section in sections:
            for data in section.data if section.kind == kind else ():
                shared.setdefault(data, []).append(section)
        found += [_together(kind, data, same) for data, same in shared.items() if len(same) > 1]
    return tuple(found)


def _together(kind: str, data: str, same: Sequence[Facts]) -> Facts:
    delta = min(section.delta for section in same)
    histories: dict[tuple[Role, str, Unit], list[Account]] = {}
    for section in same:
        for account in section.accounts:
            if kind == "run" or account.name == data:
                histories.setdefault((account.role, account.name, account.unit), []).append(account)
    accounts = ranked(
        Account.of(
            role,
            name,
            [(n, m) for n, m in enumerate((m for a in each for m in a.mechanisms), 1)],
            reserved=sum(a.reserved for a in each),
            allowed=None,
            delta=delta,
        )
        for (role, name, _), each in histories.items()
    )
    what = "runs" if kind == "run" else "ledgers"
    private = all(section.private for section in same)
    server = [s for section in same for s in section.statements if s.epsilon is None]
    return Facts(
        kind="together",
        name=f"{len(same)} {what} on the same data"
        + (f": {data}" if kind == "ledger" else f" ({', '.join(s.name for s in same)})"),
        private=private,
        delta=delta,
        statements=(*server[:1], *_statements(accounts)) if private else (),
        accounts=accounts if private else (),
        detail=detail_of(accounts, delta) if private else None,
        assumptions=assumptions.of_figures(accounts) if private else (),
        problems=mixed(accounts),
        data=(data,),
        ledgers=tuple(mark for section in same for mark in section.ledgers),
    )


def _statements(accounts: Sequence[Account]) -> tuple[Statement, ...]:
    most: dict[tuple[Unit, Role], float] = {}
    for account in accounts:
        key = (account.unit, account.role)
        most[key] = max(account.figures.epsilon, most.get(key, 0.0))
    return tuple(
        Statement(
            against=_AGAINST[role],
            unit=unit,
            role=role,
            epsilon=epsilon,
            why="the releases of all of them together, taken to be of the same data",
        )
        for (unit, role), epsilon in sorted(most.items())
        # Where updates carry a share of the noise, a node's own figure is about no single update.
        if not (role == "node" and (unit, "update") in most)
    )
