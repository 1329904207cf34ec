"""What figures mean, in words that terminal and page share."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fedfuse.privacy.accounting import STATEMENT_GRID, shown
from fedfuse.privacy.profile import LEAST_DELTA
from fedfuse.privacy.spec import Unit
from fedfuse.reports.assumptions import Verdict
from fedfuse.reports.facts import Facts
from fedfuse.reports.figures import ALARMS, FARTHEST

__all__ = [
    "attacks",
    "checks",
    "floor",
    "forecast",
    "meaning",
    "odds",
    "percent",
    "short",
    "verdicts",
    "weight",
]

Check = tuple[str, str, str]
"""(name, figure, what it is)."""

_PROTECTED = {
    Unit.RECORD: "Each single record of a node's training data; of a person with several records, "
    "each one, but not all together.",
    Unit.SUBJECT: "Each person: all records of one subject at a node, together.",
    Unit.NODE: "Each node: all its training data, together.",
}
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
            "shares no code with the first; truth is between",
        ),
        (
            "Gaussian DP",
            f"μ = {shown(figures.mu)}",
            f"all pairs with δ ≥ {LEAST_DELTA:g} at once; not the claim",
        ),
        (
            "replace one",
            f"ε = {shown(more.replace)}",
            "where one unit takes another's place",
        ),
    )


def short(facts: Facts) -> tuple[tuple[str, str], ...]:
    """What the first screen must say, as (what, text), of the account that spent most."""
    if facts.detail is None:
        return ()
    worst, more = facts.accounts[0], facts.detail
    spent, allowed = worst.figures.epsilon, worst.allowed
    share = "" if allowed is None else f" of {allowed:g} allowed ({percent(spent / allowed)})"
    alarms = ALARMS[1]
    low, high = worst.figures.second
    return (
        ("Protected", _PROTECTED[worst.unit]),
        ("How strongly", f"ε = {shown(spent)} at δ = {facts.delta:g}. {weight(spent)}"),
        (
            "For an attacker",
            f"With {percent(alarms)} false alarms, at most {percent(more.true_positives(alarms))} "
            f"of those in the data are found; guessing finds {percent(alarms)}.",
        ),
        (
            "Budget",
            f"Spent most by {worst.label}: {shown(spent)}{share}. {' '.join(forecast(facts))}",
        ),
        ("Assumptions", f"{verdicts(facts)}."),
        (
            "Checked",
            f"A second accountant, written apart from the first, puts ε between {floor(low)} and "
            f"{shown(high)}.",
        ),
    )


def verdicts(facts: Facts) -> str:
    """How many assumptions held."""
    count = dict.fromkeys(Verdict, 0)
    for one in facts.assumptions:
        count[one.verdict] += 1
    return (
        f"{count[Verdict.HELD]} held, {count[Verdict.TRUSTED]} rest on trust, "
        f"{count[Verdict.BROKEN]} did not hold"
    )


def weight(epsilon: float) -> str:
    """How much an epsilon promises: the tiers of Ponomareva et al. 2023."""
    if epsilon <= 1:
        return "At most 1: a strong guarantee (Ponomareva et al. 2023)."
    if epsilon <= 10:
        return (
            "Between 1 and 10: reasonable (Ponomareva et al. 2023), and no proof against an "
            "attacker who knows all the rest."
        )
    return "Above 10: taken by itself it promises little (Ponomareva et al. 2023)."


def odds(facts: Facts) -> str:
    """The definition, with the figures of the account that spent most."""
    if facts.detail is None:
        return ""
    worst = facts.accounts[0]
    epsilon = worst.figures.epsilon
    times = f"{math.ceil(math.exp(epsilon) * 100) / 100:.4g}" if epsilon < 5 else _powers(epsilon)
    return (
        f"Whatever may come out, its probability with one {_THINGS[worst.unit]} in the data is at "
        f"most {times} times (e to the {shown(epsilon)}) that without it, plus δ = "
        f"{facts.delta:g}; and the other way round. Smaller is safer; with ε = 0 and δ = 0 nothing "
        "at all could be told."
    )


def attacks(facts: Facts) -> tuple[tuple[str, str], ...]:
    """(false alarms, members found at most) in percent: guessing finds as many as false alarms."""
    if facts.detail is None:
        return ()
    found = facts.detail.true_positives
    return tuple((percent(alarms), percent(found(alarms))) for alarms in ALARMS)


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


def _powers(epsilon: float) -> str:
    """e to the epsilon, rounded up to three digits.

    >>> _powers(8.0), _powers(100.0)
    ('2,990', '2.69e+43')
    """
    digits = math.floor(epsilon / math.log(10)) - 2
    value = math.ceil(math.exp(epsilon - digits * math.log(10)))
    return f"{value * 10**digits:,}" if 0 <= digits < 7 else f"{value / 100:.2f}e+{digits + 2:02d}"


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
    for alarms, found in attacks(facts):
        yield (
            f"With at most {alarms} false alarms, the attacker finds at most {found} of those that "
            f"were in the data; guessing finds {alarms}."
        )
    right = percent((1 + more.advantage) / 2)
    yield (
        f"Where in and out are equally likely beforehand, the attacker is right at most {right} of "
        "the time; a coin is right 50 %. This bounds every attack, known or not, and says nothing "
        "of how well a real one does."
    )
