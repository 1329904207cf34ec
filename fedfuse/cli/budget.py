"""The privacy report, and the verdict on a certificate, as text and as plain values."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedfuse.reports.examination import Claim, Examination
    from fedfuse.reports.facts import Account, Facts

__all__ = ["describe", "findings", "plain", "tree", "verdict"]

WIDTH, INDENT = 100, 13
BAR, MOST_BARS = 24, 12


def describe(facts: Facts) -> Iterator[str]:
    """One section of the report, in lines."""
    from fedfuse.reports.assumptions import Verdict
    from fedfuse.reports.wording import checks, forecast, meaning, odds

    title = facts.name
    if facts.outcome is not None:
        title += f": {facts.outcome.status}, {facts.outcome.done} of {facts.outcome.rounds} rounds"
    yield ""
    yield plain(title)
    if not facts.private:
        yield ""
        yield from _row(
            "privacy",
            "*** NOT PRIVATE ***  Nothing is promised about anybody: updates leave the nodes as "
            "they are. There is no epsilon, and no certificate.",
        )
    else:
        yield from _row("privacy", facts.sentence)
    for problem in facts.problems:
        yield from _row("PROBLEM", problem)
    for caution in facts.cautions:
        yield from _row("CAUTION", caution)
    if facts.accounts:
        yield from _rows("budget", _bars(facts.accounts))
        for text in forecast(facts):
            yield from _row("", text)
        worst = facts.accounts[0]
        yield from _row(
            "figures",
            f"of {worst.label}, at delta = {facts.delta:g}, for one {worst.unit}, add or remove",
        )
        for name, value, remark in checks(facts):
            yield from _row("", f"{name:<18} {value:<18}  {remark}")
        for number, text in enumerate((odds(facts), *meaning(facts))):
            yield from _row("" if number else "meaning", text)
    order = (Verdict.BROKEN, Verdict.TRUSTED, Verdict.HELD)
    ranked = sorted(facts.assumptions, key=lambda one: order.index(one.verdict))
    for number, one in enumerate(ranked):
        mark = "NOT HELD" if one.verdict is Verdict.BROKEN else one.verdict.value
        yield from _row("" if number else "assumptions", f"[{mark}] {one.text}: {one.evidence}")


def _bars(accounts: Sequence[Account]) -> Iterator[str]:
    width = min(max(len(account.label) for account in accounts[:MOST_BARS]), 30)
    most = max(max(a.figures.epsilon, a.allowed or 0.0) for a in accounts)
    for account in accounts[:MOST_BARS]:
        yield _bar(account, width, most)
    if len(accounts) > MOST_BARS:
        yield f"and {len(accounts) - MOST_BARS} more, who spent less"


def _bar(account: Account, width: int, most: float) -> str:
    from fedfuse.privacy.accounting import shown

    epsilon, allowed = account.figures.epsilon, account.allowed
    share = min(epsilon / most, 1.0) if most > 0 and math.isfinite(epsilon) else 1.0
    full = round(share * BAR)
    over = "  OVER" if allowed is not None and epsilon > allowed else ""
    of = "" if allowed is None else f" of {allowed:g}"
    name = plain(account.label)
    name = name if len(name) <= width else f"{name[: width - 1]}…"
    return f"{name:<{width}}  {'#' * full}{'.' * (BAR - full)}  epsilon {shown(epsilon)}{of}{over}"


def _rows(name: str, texts: Iterator[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield f"{'' if number else name:<{INDENT}}{text}"


def _row(name: str, text: str) -> Iterator[str]:
    """`name` in the left column, `text` wrapped in the right one."""
    yield from textwrap.wrap(
        plain(text),
        width=WIDTH,
        initial_indent=f"{name:<{INDENT - 1}} ",
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )


def verdict(found: Examination, path: Path) -> Iterator[str]:
    """What was found of a certificate, in lines; the faults themselves are for stderr."""
    tree = found.tree
    yield from _row(
        "certificate", f"{path}, of {tree['time']}, by fedfuse {tree['fedfuse']} as it says"
    )
    yield from _row("signature", _signature(found))
    for section in tree["sections"]:
        yield from _row("statement", f"{section['name']}: {section['statement']}")
    for number, text in enumerate(_claims(found)):
        yield from _row("" if number else "checked", text)
    for number, note in enumerate(found.notes):
        yield from _row("" if number else "note", note)
    faults = len(found.faults)
    yield from _row(
        "verdict",
        "it holds"
        if not faults
        else f"IT DOES NOT HOLD: {faults} fault{'' if faults == 1 else 's'}",
    )


def _claims(found: Examination) -> Iterator[str]:
    """What is claimed, and what the second accountant says; equal claims in one line."""
    from fedfuse.privacy.accounting import shown
    from fedfuse.reports.wording import floor

    equal: dict[tuple[str, str, float, float], list[Claim]] = {}
    for claim in found.claims:
        key = (claim.section, claim.unit, claim.delta, claim.epsilon)
        equal.setdefault(key, []).append(claim)
    for (section, unit, delta, epsilon), claims in equal.items():
        others = f" and {len(claims) - 1} more" if len(claims) > 1 else ""
        low, high = min(one.lower for one in claims), max(one.upper for one in claims)
        yield (
            f"{section}: {claims[0].account}{others}: epsilon = {shown(epsilon)} at delta = "
            f"{delta:g}, unit {unit}; the second accountant: {floor(low)} to {shown(high)}"
        )


def _signature(found: Examination) -> str:
    key = found.tree["public_key"]
    if found.pinned:
        return f"good, of the key asked for, {key}"
    if found.signed:
        return f"good, of the key inside, {key}"
    return "BAD" if key or found.tree["signature"] else "none"


def findings(found: Examination) -> dict[str, Any]:
    """What was found of a certificate, as plain values."""
    return {
        "holds": not found.faults,
        "signed": found.signed,
        "pinned": found.pinned,
        "public_key": found.tree["public_key"],
        "faults": found.faults,
        "notes": found.notes,
        "claims": [asdict(claim) for claim in found.claims],
    }


def tree(facts: Facts) -> dict[str, Any]:
    """The facts as plain values; a figure that is not finite is null."""
    from fedfuse.reports.facts import releases
    from fedfuse.reports.statement import RELATION

    found: dict[str, Any] = {
        "kind": facts.kind,
        "name": facts.name,
        "private": facts.private,
        "statement": facts.sentence,
        "problems": list(facts.problems),
        "cautions": list(facts.cautions),
        "outcome": asdict(facts.outcome) if facts.outcome else None,
        "files": dict(facts.hashes),
    }
    if facts.private:
        found |= {
            "delta": facts.delta,
            "neighbouring_relation": RELATION,
            "statements": [asdict(one) for one in facts.statements],
            "accounts": [
                {
                    "role": account.role,
                    "name": account.name,
                    "unit": account.unit,
                    "allowed": account.allowed,
                    "rounds_left": account.rounds_left,
                    "reserved": account.reserved,
                    **asdict(account.figures),
                    "releases": [asdict(one) for one in releases(account.mechanisms)],
                }
                for account in facts.accounts
            ],
            "of_the_first_account": asdict(facts.detail) if facts.detail else None,
            "assumptions": [asdict(one) for one in facts.assumptions],
            "ledgers": [asdict(mark) for mark in facts.ledgers],
        }
    return dict(_finite(found))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def plain(text: str) -> str:
    """`text` without what a terminal would stumble on."""
    from fedfuse.reports.statement import printable

    return printable(text)
