"""What figures mean, in words that terminal and page share."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fedfuse.privacy.accounting import STATEMENT_GRID, shown
from fedfuse.privacy.profile import LEAST_DELTA
from fedfuse.privacy.spec import Unit
from fedfuse.reports.facts import Facts
from fedfuse.reports.figures import ALARMS, FARTHEST

__all__ = ["checks", "floor", "forecast", "meaning", "percent"]

Check = tuple[str, str, str]
"""(name, figure, what it is)."""

_THINGS = {
    Unit.RECORD: "record",
    Unit.SUBJECT: "person",
    Unit.NODE: "node",
}


def checks(facts: Facts) -> tuple[Check, ...]:
    """The figures of the account that spent most, the claim first."""
    if facts.detail is None:
        return ()
    figures, more = facts.accounts[0].figures, facts.detail
    low, high = figures.second
    return (
        (
            "PLD",
            f"ε = {shown(figures.epsilon)}",
            f"the claim: from above, grid {STATEMENT_GRID:g}",
        ),
        ("RDP", f"ε = {shown(figures.rdp)}", "check from above: looser, computed another way"),
        (
            "PLD, rounded down",
            f"ε ≥ {floor(more.below)}",
            "check from below: no true figure is less",
        ),
        (
            "second accountant",
            f"ε = {floor(low)} to {shown(high)}",
            "shares no code with the first; truth in between",
        ),
        (
            "Gaussian DP",
            f"μ = {shown(figures.mu)}",
            f"all (ε, δ) pairs with δ ≥ {LEAST_DELTA:g} at once; a summary, not the claim",
        ),
        (
            "replace one",
            f"ε = {shown(more.replace)}",
            "where one unit takes another's place",
        ),
    )


def meaning(facts: Facts) -> tuple[str, ...]:
    """What an attacker can do at most, in sentences."""
    return tuple(_meaning(facts))


def forecast(facts: Facts) -> tuple[str, ...]:
    """When the budget ends, at the pace of the last round."""
    known = [a for a in facts.accounts if a.rounds_left is not None]
    if not known:
        return ("No limit is known for these, so none runs out.",) if facts.accounts else ()
    least = min(known, key=lambda a: a.rounds_left or 0)
    left = least.rounds_left or 0
    who = "every node" if least.role == "node" else "everybody"
    if left == 0:
        pace = f"{least.label} cannot afford one more round like its last"
        return (f"Forecast: the budget has ended. {pace}.",)
    rounds = f"at least {left:,}" if left >= FARTHEST else f"{left:,}"
    more = "round" if left == 1 else "rounds"
    return (
        f"Forecast: at the pace of the last round, {who} can afford {rounds} more {more}; "
        f"{least.label} is the first to end.",
    )


def percent(share: float) -> str:
    """A share in percent, rounded up, as it is a bound from above.

    >>> percent(0.01), percent(0.90912), percent(1.0)
    ('1 %', '91 %', '100 %')
    """
    value = 100 * share
    digits = 0 if value >= 10 else 1 if value >= 1 else 2
    return f"{math.ceil(round(value * 10**digits, 6)) / 10**digits:g} %"


def floor(epsilon: float) -> str:
    """A lower bound for people: two digits behind the point, never rounded up.

    >>> floor(7.9999), floor(8.0)
    ('7.99', '8.00')
    """
    if not math.isfinite(epsilon):
        return "inf"
    return f"{math.floor(epsilon * 100 + 1e-9) / 100:.2f}"


def _meaning(facts: Facts) -> Iterator[str]:
    if facts.detail is None:
        return
    worst, more = facts.accounts[0], facts.detail
    thing = _THINGS[worst.unit]
    seen = "the model" if worst.role == "model" else "everything that was released"
    yield (
        f"Take an attacker who sees {seen}, knows everything else, and wants to know of one "
        f"{thing} whether it was in the training data. Of {worst.label}, who spent most:"
    )
    for alarms in ALARMS:
        found = more.true_positives(alarms)
        yield (
            f"With at most {percent(alarms)} false alarms, the attacker finds at most "
            f"{percent(found)} of those that were in the data; guessing finds {percent(alarms)}."
        )
    right = percent((1 + more.advantage) / 2)
    yield (
        f"Where in and out are equally likely beforehand, the attacker is right at most {right} of "
        "the time; a coin is right 50 %. This bounds every attack, known or not, and says nothing "
        "of how well a real one does."
    )
