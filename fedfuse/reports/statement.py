"""A guarantee in words: how much, about whom, against whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedfuse.privacy.accounting import shown
from fedfuse.privacy.spec import Unit

__all__ = ["NOT_PRIVATE", "RELATION", "Role", "Statement", "printable", "sentence"]

RELATION = "add or remove one unit; of unit node: its data kept, or its update zero"
NOT_PRIVATE = "NOT PRIVATE: nothing is promised about anybody; updates leave the nodes as they are."

Role = str
"""Whose account it is:

node     all that a node of a run released
update   the same where its updates carry a share of the noise only, each taken by itself
model    a run's sums over nodes
dataset  all that was released from a data set of a ledger
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A guarantee, and against whom."""

    against: str
    unit: Unit
    role: Role
    """The largest epsilon of the accounts with this role and unit is the statement's."""
    epsilon: float | None
    """None: nothing is promised against these."""
    why: str


def sentence(statements: Sequence[Statement], delta: float) -> str:
    """All of `statements` in words."""
    if not statements:
        return "Nothing has been released yet."
    return " ".join(_sentence(one, delta) for one in _joined(statements))


def printable(text: str) -> str:
    """`text` for a terminal or a page: names come from elsewhere, and may hold control characters
    that move the cursor or turn the writing round.

    >>> printable("a\\x1b[2Jb")
    'a\ufffd[2Jb'
    """
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _joined(statements: Sequence[Statement]) -> list[Statement]:
    """Statements that differ only in whom they are against, as one."""
    joined: dict[tuple[Unit, Role, float | None], Statement] = {}
    for one in statements:
        key = (one.unit, one.role, one.epsilon)
        if key in joined:
            one = replace(one, against=f"{joined[key].against}, and {one.against}")
        joined[key] = one
    return list(joined.values())


def _sentence(statement: Statement, delta: float) -> str:
    if statement.epsilon is None:
        return f"Nothing is promised against {statement.against}."
    change = statement.unit.change
    if statement.role == "dataset":
        change = change.replace("any one node's training data", "a data set").replace(
            "any one node", "a data set"
        )
    return (
        f"({shown(statement.epsilon)}, {delta:g})-differential privacy for {change}, "
        f"against {statement.against}."
    )
