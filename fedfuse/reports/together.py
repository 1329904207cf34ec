"""What several runs, or several ledgers, cost together where they are on the same data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from fedfuse.privacy.spec import Unit
from fedfuse.reports import assumptions
from fedfuse.reports.facts import Account, Facts, detail_of, mixed, ranked
from fedfuse.reports.statement import Role, Statement

__all__ = ["together"]

WHY = "the releases of all of them together, taken to be of the same data"
SERVERS = "whoever sees a node's updates in all of them"
PUBLIC = "whoever gets the models"


def together(sections: Sequence[Facts]) -> tuple[Facts, ...]:
    """What sections of one kind that name the same data cost together, for each such data.

    Runs are on the same data where their fingerprints agree; ledgers where a data set has the same
    name in several. Of different deltas the smallest is taken. One section without a promise leaves
    none to all of them.
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
    what = ", ".join(section.name for section in same) if kind == "run" else data
    private = all(section.private for section in same)
    by_unit: dict[Unit, list[Sequence[Account]]] = {}
    for section in same if private else ():
        for unit in {account.unit for account in section.accounts}:
            theirs = [
                a for a in section.accounts if a.unit is unit and (kind == "run" or a.name == data)
            ]
            by_unit.setdefault(unit, []).append(theirs)
    accounts = ranked(a for each in by_unit.values() for a in _joined(each, delta))
    unguarded = {one.unit: one for s in same for one in s.statements if one.epsilon is None}
    return Facts(
        kind="together",
        name=f"{len(same)} {kind}s on the same data: {what}",
        private=private,
        delta=delta,
        statements=tuple(
            one
            for unit in sorted(by_unit)
            for one in _statements(unit, accounts, unguarded.get(unit))
        ),
        accounts=accounts,
        detail=detail_of(accounts, delta),
        assumptions=(
            *(assumptions.of_figures(accounts) if accounts else ()),
            *(
                replace(one, text=f"{section.name}: {one.text}")
                for section in same
                for one in (section.broken if private else ())
            ),
        ),
        problems=mixed(accounts),
        data=(data,),
        ledgers=tuple(mark for section in same for mark in section.ledgers),
    )


def _joined(sections: Sequence[Sequence[Account]], delta: float) -> Iterable[Account]:
    """The accounts of sections, of one unit, composed by whose they are."""
    roles = {account.role for section in sections for account in section}
    each: dict[tuple[Role, str], list[Account]] = {}
    for section in sections:
        own = {(account.role, account.name): account for account in section}
        for (role, name), account in own.items():
            each.setdefault((role, name), []).append(account)
            # Whoever sees single updates in one run sees those of the others, which carry all
            # their noise.
            if role == "node" and "update" in roles and ("update", name) not in own:
                each.setdefault(("update", name), []).append(account)
    sums_only = all(any(a.role == "model" for a in section) for section in sections)
    for (role, name), accounts in each.items():
        if role == "model" and not sums_only:
            continue  # a node's own figure holds for whoever gets the models
        yield Account.of(
            role,
            name,
            list(enumerate((m for account in accounts for m in account.mechanisms), 1)),
            reserved=sum(account.reserved for account in accounts),
            allowed=None,
            delta=delta,
        )


def _statements(
    unit: Unit, accounts: Iterable[Account], unguarded: Statement | None
) -> Iterable[Statement]:
    """`unguarded`: what one of the sections said of those against whom it promises nothing."""
    most: dict[Role, float] = {}
    for account in accounts:
        if account.unit is unit:
            most[account.role] = max(account.figures.epsilon, most.get(account.role, 0.0))

    def statement(against: str, role: Role) -> Statement:
        return Statement(against=against, unit=unit, role=role, epsilon=most[role], why=WHY)

    if "dataset" in most:
        yield statement("whoever sees all that was released from the data set", "dataset")
        return
    yield unguarded or statement(SERVERS, "update" if "update" in most else "node")
    yield statement(
        PUBLIC, "model" if most.get("model", most["node"] + 1) <= most["node"] else "node"
    )
