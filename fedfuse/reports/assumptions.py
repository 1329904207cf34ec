"""What a figure takes as given, and whether the run's own files bear it out.

Torch-free. Nothing here is believed because a summary says so: the evidence is the configuration
and the books.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from fedfuse.config import RunConfig
from fedfuse.models.spec import PRETRAINED_KINDS
from fedfuse.privacy.accounting import LEAST_SIGMA
from fedfuse.privacy.spec import Event, Unit

if TYPE_CHECKING:
    from fedfuse.reports.facts import Account

__all__ = [
    "UNKNOWN_NOISE",
    "WITHIN_LIMITS",
    "Assumption",
    "Verdict",
    "of_figures",
    "of_ledger",
    "of_run",
]


UNKNOWN_NOISE = "nobody can know or repeat the noise"
WITHIN_LIMITS = "nobody spent more than allowed"
_SAID = (
    "the valid and test splits belong",
    "the configuration is public and was not",
    "privacy.declared_records =",
    "privacy.declared_subjects =",
    "the noise follows from a seed",
    "no subject has records at two nodes",
    "the server is trusted: it sees",
    "the server looks at nothing but sums",
    "it starts from public weights",
)
"""How declarations of a run begin that have an assumption of their own here."""


class Verdict(StrEnum):
    """What the files say about an assumption."""

    HELD = "held"
    BROKEN = "not held"
    TRUSTED = "on trust"
    """No file can show it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumption:
    """One thing that a figure rests on."""

    text: str
    verdict: Verdict
    evidence: str


def of_run(
    config: RunConfig,
    events: Sequence[Event],
    rows: Sequence[Mapping[str, Any]],
    declared: Iterable[str],
) -> tuple[Assumption, ...]:
    """Those of a private run.

    rows      its lines in metrics.jsonl
    declared  what the run itself said that it takes as given; what is said here already is left out
    """
    found = [
        _noise_source(config),
        _noise(events),
        _sampling(config, events),
        _divisor(config),
        _weights(config),
        _repeated(config),
        _clipping(config, events),
        _interrupted(events),
        _failures(rows),
        *_pretrained(config),
        *(_shares(config, events) if config.privacy.unit == Unit.NODE else ()),
        Assumption(
            text="settings were not chosen by looking at training records",
            verdict=Verdict.TRUSTED,
            evidence="earlier trials on the same data, if any, are releases that these books lack",
        ),
        Assumption(
            text="valid and test records are not to be protected",
            verdict=Verdict.TRUSTED,
            evidence="they belong to the server, which evaluates on them in every round",
        ),
        Assumption(
            text="the books are complete, and were written by whom they should be",
            verdict=Verdict.TRUSTED,
            evidence="a run's books are a plain file; a node's signed ledger is stronger evidence",
        ),
    ]
    found += [
        Assumption(text=text, verdict=Verdict.TRUSTED, evidence="the run says so itself")
        for text in declared
        if not text.startswith(_SAID)
    ]
    return tuple(found)


def of_ledger(*, signed: bool, lines: int, reserved: int) -> tuple[Assumption, ...]:
    """Those of a ledger that could be opened, and so is whole."""
    return (
        Assumption(
            text="the ledger is one whole: no line was changed or taken out by itself",
            verdict=Verdict.HELD,
            evidence=f"each of {_count(lines, 'line')} carries the hash of the one before; who "
            "writes all of them anew leaves no trace in the file",
        ),
        Assumption(
            text="the lines were written by the node",
            verdict=Verdict.TRUSTED,
            evidence=(
                "the last line, which covers all others, is signed with the key that the first "
                "one names; whether that is the node's, only a key known from elsewhere shows"
                if signed
                else "the ledger is not signed: whoever could write the file could write it anew"
            ),
        ),
        Assumption(
            text="no lines are missing at the end",
            verdict=Verdict.TRUSTED,
            evidence="an older copy looks whole; an anchor kept elsewhere tells it apart",
        ),
        Assumption(
            text="what was begun and not finished is charged",
            verdict=Verdict.HELD,
            evidence=f"{_count(reserved, 'reservation')} without a commit; they count as spent",
        ),
        Assumption(
            text="sampling, clipping, noise and divisor were as the lines say",
            verdict=Verdict.TRUSTED,
            evidence="a ledger records mechanisms; how they were run is in each run's own report",
        ),
        Assumption(
            text="nothing else was ever released from the same records",
            verdict=Verdict.TRUSTED,
            evidence="also not under another data set's name, or by another node",
        ),
    )


def of_figures(accounts: Sequence[Account]) -> tuple[Assumption, ...]:
    """Whether budgets were kept, and accountants agree; nothing where nothing was spent."""
    if not accounts:
        return ()
    bounds = [
        (account.name, account.figures.epsilon, account.figures.second) for account in accounts
    ]
    apart = [name for name, epsilon, (low, _) in bounds if not epsilon >= low]
    loose = [name for name, epsilon, (_, high) in bounds if epsilon > 1.02 * high]
    limited = [account for account in accounts if account.allowed is not None]
    over = [a.name for a in limited if a.allowed is not None and a.figures.epsilon > a.allowed]
    found = [
        Assumption(
            text="a second accountant, written apart from the first, finds no claim too small",
            verdict=Verdict.BROKEN if apart else Verdict.HELD,
            evidence=(
                f"the claim of {', '.join(apart)} is below what is certain"
                if apart
                else f"{_count(len(bounds), 'claim')} at or above the lower bound"
                + (f"; more than 2 % above the upper one: {', '.join(loose)}" if loose else "")
            ),
        )
    ]
    if limited:
        found.append(
            Assumption(
                text=WITHIN_LIMITS,
                verdict=Verdict.BROKEN if over else Verdict.HELD,
                evidence=(
                    f"above their limit: {', '.join(over)}"
                    if over
                    else f"{_count(len(limited), 'account')} within the limit"
                ),
            )
        )
    return tuple(found)


def _noise_source(config: RunConfig) -> Assumption:
    seeded = bool(config.privacy.noise_seed)
    return Assumption(
        text=UNKNOWN_NOISE,
        verdict=Verdict.BROKEN if seeded else Verdict.HELD,
        evidence=(
            "privacy.noise_seed is set: whoever knows the seed can compute the noise and remove it"
            if seeded
            else "privacy.noise_seed is empty: noise comes from the operating system's entropy"
        ),
    )


def _noise(events: Sequence[Event]) -> Assumption:
    least = min((event.noise_multiplier for event in events), default=0.0)
    return Assumption(
        text="every release carries noise worth the name",
        verdict=Verdict.HELD if not events or least >= LEAST_SIGMA else Verdict.BROKEN,
        evidence=(
            f"the least sigma in {_count(len(events), 'line')} of the books is {least:.4g} C; "
            f"below {LEAST_SIGMA} C a node refuses"
            if events
            else "nothing has been released"
        ),
    )


def _sampling(config: RunConfig, events: Sequence[Event]) -> Assumption:
    if config.privacy.unit == Unit.NODE:
        sampled = any(event.sample_rate != 1 for event in events)
        return Assumption(
            text="no gain is claimed from drawing nodes at random",
            verdict=Verdict.BROKEN if sampled else Verdict.HELD,
            evidence="every line of the books has q = 1"
            if not sampled
            else "some lines of the books have q < 1, though nodes are not Poisson-sampled",
        )
    declared = config.privacy.sample_rate
    rates = sorted({event.sample_rate for event in events} or {declared})
    listed = ", ".join(f"{rate:g}" for rate in rates[:5]) + (", ..." if len(rates) > 5 else "")
    agrees = rates == [declared]
    return Assumption(
        text=f"each {config.privacy.unit} is drawn on its own with the declared chance q "
        "(Poisson sampling), empty batches included",
        verdict=Verdict.HELD if agrees else Verdict.BROKEN,
        evidence=f"config.toml declares q = {declared:g}; the books have "
        f"{f'q = {listed}' if events else 'no line yet'}. "
        "That the sampler draws so is held by fedfuse's tests, not by this file",
    )


def _divisor(config: RunConfig) -> Assumption:
    unit = Unit(config.privacy.unit)
    if unit is Unit.NODE:
        return Assumption(
            text="no size of anybody's data is used or told",
            verdict=Verdict.HELD,
            evidence="the unit is the node: its clipped update is released whole, divided by "
            "nothing private",
        )
    name = "declared_subjects" if unit is Unit.SUBJECT else "declared_records"
    declared = int(getattr(config.privacy, name))
    return Assumption(
        text="the divisor of a step's sum is public",
        verdict=Verdict.HELD if declared else Verdict.BROKEN,
        evidence=(
            f"privacy.{name} = {declared} is in config.toml"
            if declared
            else f"privacy.{name} was not declared: the simulation took the nodes' mean size, "
            "rounded to one digit, which the figures do not charge"
        ),
    )


def _weights(config: RunConfig) -> Assumption:
    equal = config.federation.weighting == "equal"
    return Assumption(
        text="no count of anybody's data weighs the updates",
        verdict=Verdict.HELD if equal else Verdict.BROKEN,
        evidence=f"federation.weighting = {config.federation.weighting!r}",
    )


def _repeated(config: RunConfig) -> Assumption:
    unit, privacy = Unit(config.privacy.unit), config.privacy
    if unit is Unit.SUBJECT:
        return Assumption(
            text="all records of a subject are on one node, under one name",
            verdict=Verdict.TRUSTED,
            evidence="a simulation refuses a manifest that says otherwise; a person under two "
            "names is two subjects, and the figures add up",
        )
    if unit is Unit.NODE:
        return Assumption(
            text="a person's records are on one node",
            verdict=Verdict.TRUSTED,
            evidence="who is on several nodes is protected by none of the figures alone",
        )
    return Assumption(
        text="a person has one record",
        verdict=Verdict.BROKEN if privacy.records_are_units else Verdict.TRUSTED,
        evidence=(
            "privacy.records_are_units is set: where a person has k records, the figure holds for "
            "one of them, not for the person"
            if privacy.records_are_units
            else "a manifest in which a subject repeats is refused; one that names no subjects "
            "shows nothing: each record then counts as a person"
        ),
    )


def _clipping(config: RunConfig, events: Sequence[Event]) -> Assumption:
    norms = sorted({event.clip_norm for event in events} or {config.privacy.clip_norm})
    if any(event.count_noise for event in events):
        charged = all(event.count_noise > 0 for event in events)
        return Assumption(
            text="what the clip norm learns from data is charged",
            verdict=Verdict.HELD if charged else Verdict.BROKEN,
            evidence="C follows a private count, which "
            + ("each line's sigma covers" if charged else "some lines' sigma does not cover"),
        )
    return Assumption(
        text="the clip norm is public",
        verdict=Verdict.HELD if norms == [config.privacy.clip_norm] else Verdict.BROKEN,
        evidence=f"C = {config.privacy.clip_norm:g} in config.toml; the books have "
        + (f"C = {', '.join(f'{norm:g}' for norm in norms[:5])}" if events else "no line yet"),
    )


def _interrupted(events: Sequence[Event]) -> Assumption:
    reserved = sum(event.status != "spent" for event in events)
    return Assumption(
        text="what was begun and not finished is charged",
        verdict=Verdict.HELD,
        evidence=(
            f"{_count(reserved, 'line')} of the books stayed reserved; they count as spent"
            if reserved
            else "no line of the books is merely reserved; it would count as spent"
        ),
    )


def _failures(rows: Sequence[Mapping[str, Any]]) -> Assumption:
    found = [row.get("failures") for row in rows]
    failures = sum(len(each) for each in found if isinstance(each, dict))
    return Assumption(
        text="answers that failed are charged",
        verdict=Verdict.HELD,
        evidence=(
            f"{_count(failures, 'answer')} failed; the round's line is in the books all the same"
            if failures
            else f"no answer failed in {_count(len(rows), 'round')}"
        ),
    )


def _pretrained(config: RunConfig) -> Iterable[Assumption]:
    encoder = config.model.encoder
    for kind in PRETRAINED_KINDS:
        if encoder.pretrained(kind):
            digest = getattr(encoder, f"{kind}_sha256")
            yield Assumption(
                text=f"the {kind} encoder starts from public weights; what they were trained on is "
                "outside this promise",
                verdict=Verdict.TRUSTED if digest else Verdict.BROKEN,
                evidence=(
                    f"{getattr(encoder, kind)}, digest {digest}, is in config.toml, and each node "
                    f"compares it; {_TUNED[encoder.tuning]}. That no training record was among "
                    "what they were trained on, no file can show"
                    if digest
                    else "config.toml holds no digest of them: nodes may have had different ones"
                ),
            )


_TUNED = {
    "frozen": "none of them is trained or sent",
    "lora": "they stay as they are, and low-rank additions to them are trained and noised",
    "full": "they are trained and noised from there",
}


def _shares(config: RunConfig, events: Sequence[Event]) -> Iterable[Assumption]:
    if config.privacy.noise_by == "server":
        yield Assumption(
            text="the server clips, adds the noise, and keeps the updates to itself",
            verdict=Verdict.TRUSTED,
            evidence='privacy.noise_by = "server": updates reach it without noise',
        )
        return
    answered: dict[int, int] = {}
    for event in events:
        answered[event.round] = answered.get(event.round, 0) + (event.status == "spent")
    least, shares = min((n for n in answered.values() if n), default=0), config.privacy.noise_nodes
    enough = least >= shares or not any(answered.values())
    yield Assumption(
        text="enough nodes answered in each round to make the noise whole",
        verdict=Verdict.HELD if enough else Verdict.BROKEN,
        evidence=f"at least {_count(least, 'node')} in each round that was not broken off; "
        f"{shares} make it whole",
    )
    yield Assumption(
        text="every node that answered added its share of the noise, and tells nobody",
        verdict=Verdict.TRUSTED,
        evidence="the model's figure counts the noise of all that answered; nodes that put their "
        "shares together can take them off again",
    )
    if config.federation.secure_aggregation:
        yield Assumption(
            text="the server sees only sums: updates travel under masks",
            verdict=Verdict.TRUSTED,
            evidence="federation.secure_aggregation = true; it holds as long as few nodes work "
            "together with the server, and in a simulation all of them are on one machine",
        )
    elif shares > 1:
        yield Assumption(
            text="the server looks at nothing but sums",
            verdict=Verdict.TRUSTED,
            evidence="single updates carry a share of the noise: what they tell is stated apart",
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
