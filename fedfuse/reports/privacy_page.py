"""The privacy report as one HTML page: no script, no network, for screens, phones and paper.

Torch-free. Every text that comes from a file is escaped, and control characters in it are shown as
such; the page's own policy forbids whatever might get past that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

from fedfuse import __version__
from fedfuse.privacy.accounting import shown
from fedfuse.reports import pictures
from fedfuse.reports.assumptions import Verdict
from fedfuse.reports.facts import Facts, releases
from fedfuse.reports.hazards import Answer, hazards, reporting, uncovered
from fedfuse.reports.statement import printable
from fedfuse.reports.wording import attacks, checks, forecast, meaning, odds, short

__all__ = ["page"]

MOST_BARS, MOST_ROWS = 40, 200
COLUMNS = ("q", "σ", "C", "count σ", "steps", "lines")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(sections: Sequence[Facts], *, now: datetime) -> str:
    """The page of `sections`, in their order."""
    return "".join(_page(sections, now))


def _page(sections: Sequence[Facts], now: datetime) -> Iterator[str]:
    css = Path(__file__).with_name("privacy.css").read_text(encoding="utf-8")
    yield (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>Privacy report: {_e(', '.join(one.name for one in sections))}</title>\n"
        f"<style>\n{css}</style>\n</head>\n<body>\n"
        "<h1>Privacy report</h1>\n"
        f'<p class="soft">What was promised about training data, what was spent, and what that '
        f"rests on. Made by fedfuse {__version__} on "
        f'<span class="number">{now:%Y-%m-%d}</span> at {now:%H:%M} UTC.</p>\n'
    )
    if len(sections) > 1:
        yield "<ul>\n"
        for number, one in enumerate(sections):
            mark = "" if one.private else " <strong>NOT PRIVATE</strong>"
            yield f'<li><a href="#part-{number}">{_e(one.name)}</a>, {_kind(one)}{mark}</li>\n'
        yield "</ul>\n"
    for number, one in enumerate(sections):
        yield f'<section id="part-{number}"{"" if one.private else " class=open"}>\n'
        yield from _section(one)
        yield "</section>\n"
    yield ("<footer><p>Figures are upper bounds, rounded up; lower bounds are rounded down.</p>\n")
    if any(one.private for one in sections):
        yield (
            "<p>Check them without the data, on any machine: "
            "<code>fedfuse report verify certificate.json --public-key KEY</code> derives each "
            "epsilon from the releases listed, with a second accountant. With "
            "<code>--ledger LEDGER</code> it also compares the releases with a node's ledger.</p>\n"
        )
    yield "</footer>\n</body>\n</html>\n"


def _section(facts: Facts) -> Iterator[str]:
    yield f"<h2>{_e(facts.name)}</h2>\n"
    yield f'<p class="soft">{_e(_about(facts))}</p>\n'
    if facts.private:
        yield f'<p class="promise">{_e(facts.sentence)}</p>\n'
    else:
        yield (
            '<div class="alarm"><strong>NOT PRIVATE</strong> Nothing is promised about anybody: '
            "updates leave the nodes as they are, and the model may hold any record word for word. "
            "There is no epsilon.</div>\n"
        )
    for problem in facts.problems:
        yield f'<p class="caution bad"><b>Problem:</b> {_e(problem)}.</p>\n'
    for caution in facts.cautions:
        kind = "caution bad" if caution.startswith(("SEEDED", "OVERSPENT")) else "caution"
        yield f'<p class="{kind}">{_e(caution)}</p>\n'
    if facts.detail is not None:
        yield from _statements(facts)
        yield '<h3>In short</h3>\n<dl class="short">\n'
        yield "".join(
            f"<div><dt>{_e(what)}</dt><dd>{_e(text)}</dd></div>\n" for what, text in short(facts)
        )
        yield "</dl>\n"
        yield from _meaning(facts)
        yield from _budget(facts)
        yield from _charts(facts)
        yield from _figures(facts)
    if facts.private:
        yield from _assumptions(facts)
    yield from _answers(
        "Reporting items",
        "Ponomareva et al. 2023, <cite>How to DP-fy ML</cite>, arXiv:2303.00654v3, section 5.3: "
        "what a report of a guarantee should say. The answers are ours.",
        reporting(facts),
    )
    yield from _answers(
        "Hazards",
        "The topics of NIST SP 800-226 (2025), <cite>Guidelines for Evaluating Differential "
        "Privacy Guarantees</cite>, answered for what is reported here. The answers are ours.",
        hazards(facts),
    )
    yield "<h3>Not covered</h3>\n<ul>\n"
    yield "".join(f"<li>{_e(text)}</li>\n" for text in uncovered(facts))
    yield "</ul>\n"
    yield from _released(facts)
    yield from _origin(facts)


def _statements(facts: Facts) -> Iterator[str]:
    yield '<div class="tiles">\n'
    for one in facts.statements:
        figure = "no guarantee" if one.epsilon is None else f"ε = {shown(one.epsilon)}"
        yield (
            f'<div class="tile"><b>{figure}</b><span>against {_e(one.against)}; at δ = '
            f"{facts.delta:g}, for one {_e(one.unit)}, add or remove. {_e(_upper(one.why))}."
            "</span></div>\n"
        )
    yield "</div>\n"


def _meaning(facts: Facts) -> Iterator[str]:
    first, *_, last = meaning(facts)
    yield f"<h3>What it means</h3>\n<p>{_e(odds(facts))}</p>\n<p>{_e(first)}</p>\n"
    yield (
        '<table class="attacks">\n<thead><tr><th class="number">false alarms</th>'
        '<th class="number">guessing finds</th><th class="number">an attacker finds at most</th>'
        "</tr></thead>\n<tbody>\n"
    )
    yield "".join(
        f'<tr><td class="number">{_e(alarms)}</td><td class="number">{_e(alarms)}</td>'
        f'<td class="number"><b>{_e(found)}</b></td></tr>\n'
        for alarms, found in attacks(facts)
    )
    yield f"</tbody></table>\n<p>{_e(last)}</p>\n"


def _budget(facts: Facts) -> Iterator[str]:
    yield "<h3>Budget</h3>\n"
    most = facts.accounts[0].figures.epsilon
    for account in facts.accounts[:MOST_BARS]:
        epsilon, allowed = account.figures.epsilon, account.allowed
        number = shown(epsilon) + ("" if allowed is None else f" of {allowed:g}")
        yield (
            f'<div class="row budget"><div class="name">{_e(account.label)}</div>'
            f'<div class="number">ε {number}</div>'
            f'<div class="line">{pictures.bar(epsilon, allowed, most)}</div></div>\n'
        )
    units = ", ".join(sorted({account.unit for account in facts.accounts}))
    yield (
        f'<p class="why">ε at δ = {facts.delta:g}, for one {units}, add or remove. All bars '
        "have one scale"
        + (
            "; the upright mark is what is allowed"
            if any(account.allowed is not None for account in facts.accounts)
            else ", which ends at the largest"
        )
        + ".</p>\n"
    )
    if len(facts.accounts) > MOST_BARS:
        yield (
            f'<p class="why">{len(facts.accounts) - MOST_BARS} more spent less; the certificate '
            "lists them all.</p>\n"
        )
    yield "".join(f"<p>{_e(text)}</p>\n" for text in forecast(facts))


def _charts(facts: Facts) -> Iterator[str]:
    worst = facts.accounts[0]
    step = "round" if facts.kind == "run" else "release"
    yield f"<h3>In pictures: {_e(worst.label)}, who spent most</h3>\n" + '<div class="charts">\n'
    for picture, caption in (
        (pictures.course(facts), f"What had been spent after each {step}."),
        (
            pictures.attack(facts),
            "However an attacker guesses who was in the data, the point of false alarms and "
            "members found lies on or below the curve.",
        ),
        (pictures.profile(facts), "The same guarantee at every ε: the δ that goes with it."),
        (
            pictures.accountants(facts),
            "The truth for add or remove is not left of the first two, and not right of the claim.",
        ),
    ):
        yield f"<figure>{picture}<figcaption>{_e(caption)}</figcaption></figure>\n"
    yield "</div>\n"


def _figures(facts: Facts) -> Iterator[str]:
    worst = facts.accounts[0]
    yield "<h3>Figures</h3>\n"
    yield (
        f'<p class="why">Of {_e(worst.label)}, at δ = {facts.delta:g}, unit {_e(worst.unit)}; add '
        "or remove, where nothing else is said.</p>\n"
    )
    for name, value, remark in checks(facts):
        yield (
            f'<div class="row figure"><div class="name"><b>{_e(name)}</b></div>'
            f'<div class="number">{_e(value)}</div><div class="line why">{_e(remark)}</div></div>\n'
        )


def _assumptions(facts: Facts) -> Iterator[str]:
    kinds = {Verdict.HELD: "held", Verdict.BROKEN: "broken", Verdict.TRUSTED: "trusted"}
    order = (Verdict.BROKEN, Verdict.TRUSTED, Verdict.HELD)
    yield "<h3>Assumptions, and whether they held</h3>\n" + '<ul class="plain">\n'
    for one in sorted(facts.assumptions, key=lambda one: order.index(one.verdict)):
        known = "No file can show it: " if one.verdict is Verdict.TRUSTED else "Evidence: "
        yield (
            f'<li><span class="badge {kinds[one.verdict]}">{_e(one.verdict.value)}</span>'
            f'{_e(_upper(one.text))}.<div class="why">{known}{_e(one.evidence)}.</div></li>\n'
        )
    yield "</ul>\n"


def _answers(title: str, source: str, answers: Iterable[Answer]) -> Iterator[str]:
    """`source` is ours, and HTML."""
    yield f'<h3>{title}</h3>\n<p class="why">{source}</p>\n<dl>\n'
    yield "".join(f"<dt>{_e(asked)}</dt><dd>{_e(answer)}</dd>\n" for asked, answer in answers)
    yield "</dl>\n"


def _released(facts: Facts) -> Iterator[str]:
    rows = [(account, one) for account in facts.accounts for one in releases(account.mechanisms)]
    if not rows:
        return
    yield (
        "<h3>What was released</h3>\n"
        '<p class="why">Poisson-sampled Gaussian mechanisms: chance q, noise σ in units of the '
        "clip norm C, so many steps in so many lines of the books. Every figure follows from "
        "these; the certificate has all their digits.</p>\n"
        '<table class="released">\n<thead><tr><th>who</th><th>unit</th>'
        + "".join(f'<th class="number">{name}</th>' for name in COLUMNS)
        + "</tr></thead>\n<tbody>\n"
    )
    for account, one in rows[:MOST_ROWS]:
        numbers = (one.sample_rate, one.noise_multiplier, one.clip_norm)
        cells = [f"{number:.6g}" for number in numbers]
        cells += [f"{one.count_noise:.6g}" if one.count_noise else "none"]
        cells += [f"{one.steps:,}", f"{one.lines:,}"]
        yield (
            f'<tr><td class="name">{_e(account.label)}</td>'
            f'<td data-label="unit">{_e(one.unit)}</td>'
            + "".join(
                f'<td class="number" data-label="{name}">{cell}</td>'
                for name, cell in zip(COLUMNS, cells, strict=True)
            )
            + "</tr>\n"
        )
    yield "</tbody></table>\n"
    if len(rows) > MOST_ROWS:
        yield f'<p class="why">And {len(rows) - MOST_ROWS} more, in the certificate.</p>\n'


def _origin(facts: Facts) -> Iterator[str]:
    rows = [(f"sha256 of {name}", digest) for name, digest in facts.hashes]
    for mark in facts.ledgers:
        rows += [
            (f"ledger of {mark.node}", mark.id),
            ("its last line", f"{mark.lines}, hash {mark.head}"),
            ("its key", mark.public_key or "none: its lines are not signed"),
        ]
    if not rows:
        return
    yield '<h3>Where the figures come from</h3>\n<table class="origin">\n<tbody>\n'
    for name, value in rows:
        yield f'<tr><th scope="row">{_e(name)}</th><td><code>{_e(value)}</code></td></tr>\n'
    yield "</tbody></table>\n"


def _about(facts: Facts) -> str:
    outcome = facts.outcome
    if outcome is None:
        return _kind(facts)
    return (
        f"{_kind(facts)}, {outcome.status}: {outcome.done} of {outcome.rounds} rounds, engine "
        f"{outcome.engine}"
    )


def _kind(facts: Facts) -> str:
    return {
        "run": "a simulated run" if facts.simulated else "a run",
        "ledger": "a node's ledger",
        "together": "what they cost together",
    }[facts.kind]


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _e(text: str) -> str:
    """`text` as HTML: escaped, with `words` between backticks as code."""
    safe = escape(printable(text)).replace(" %", "&nbsp;%")
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", safe)
