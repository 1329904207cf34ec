"""What holds of a certificate: signature, figures, and the ledger it speaks of.

Torch-free, and without dp-accounting: each epsilon is derived anew by the second accountant, which
shares no code with the one that made the claim.

What it shows
    Without a key from elsewhere: that the figures fit the releases that are listed.
    With one: that its holder listed them. That they are all there were, only a ledger shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedfuse.errors import LedgerError, PrivacyError
from fedfuse.privacy import second, signing
from fedfuse.privacy.composition import Counts, gaussian_delta
from fedfuse.privacy.spec import Event, Unit
from fedfuse.reports.certificate import PURPOSE, Tree, parse, signed_part
from fedfuse.reports.statement import RELATION, Statement, sentence

__all__ = ["Claim", "Examination", "examine"]

ODD = 1.02
"""A claim this many times what would do is odd, though it misleads nobody to their harm."""
SAMPLED = 4
"""About as many points of a profile are derived anew, and the one where mu has least room."""
LEAST_DELTA = 1e-10
"""A profile ends here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claimed epsilon, and the second accountant's bounds for what was released."""

    section: str
    account: str
    unit: str
    delta: float
    epsilon: float
    lower: float
    upper: float


@dataclass(slots=True, kw_only=True)
class Examination:
    """What was found."""

    tree: Tree
    signed: bool = False
    """By the holder of the key inside."""
    pinned: bool = False
    """And that key is the one that was asked for."""
    faults: list[str] = field(default_factory=list)
    """Empty where the certificate holds."""
    notes: list[str] = field(default_factory=list)
    """True, and good to know."""
    claims: list[Claim] = field(default_factory=list)


def examine(
    data: bytes, *, where: str, public_key: str = "", ledger: Path | None = None
) -> Examination:
    """What holds of the certificate in `data`.

    public_key  in hexadecimal digits: nobody else's signature will do
    ledger      the releases must be those of this file

    Raises CertificateError where it is none at all.
    """
    found = Examination(tree=parse(data, where=where))
    _signature(found, public_key)
    for section in found.tree["sections"]:
        _figures(found, section)
        _statements(found, section)
        _admitted(found, section)
    if not found.tree["sections"]:
        found.faults.append("it says nothing: it has no section")
    if ledger is not None:
        _ledger(found, ledger)
    return found


def _signature(found: Examination, wanted: str) -> None:
    key, signature = found.tree["public_key"], found.tree["signature"]
    if not key and not signature:
        if wanted:
            found.faults.append("it is not signed, though a key was asked for")
        else:
            found.notes.append("UNSIGNED: anybody can have written it")
        return
    found.signed = signing.verify(key, signed_part(found.tree), signature, purpose=PURPOSE)
    if not found.signed:
        found.faults.append(
            "the signature is not that of the key inside: it was changed after it was signed, "
            "or its signature was taken off"
        )
    elif wanted and key != wanted:
        found.faults.append(f"it is signed by another key, {key}")
    elif wanted:
        found.pinned = True
    else:
        found.notes.append(
            "its key came with it: that shows that nothing was changed since, not who signed; "
            "--public-key asks for a key that you know"
        )


def _figures(found: Examination, section: Tree) -> None:
    """Each account's figures against bounds from its releases."""
    delta = section["delta"]
    if not 0 < delta < 1:
        found.faults.append(f"{_name(section)}: delta = {delta} is none")
        return
    seen = set()
    for account in section["accounts"]:
        who = _name(section, account)
        key = (account["role"], account["name"], account["unit"])
        if key in seen:
            found.faults.append(f"{who}: there are two accounts of this name")
        seen.add(key)
        try:
            counts = _counts(account)
            lower, upper = _bounds(counts, delta)
            wrong = list(_curve(account, counts))
        except (PrivacyError, ArithmeticError, ValueError, MemoryError) as error:
            found.faults.append(f"{who}: its releases cannot be accounted for: {_line(error)}")
            continue
        found.claims.append(
            Claim(
                section=section["name"],
                account=account["name"],
                unit=account["unit"],
                delta=delta,
                epsilon=account["epsilon"],
                lower=lower,
                upper=upper,
            )
        )
        for name in ("epsilon", "epsilon_rdp"):
            if not account[name] >= lower:
                wrong.append(
                    f"{name} = {account[name]:.6g} is claimed, but what was released costs at "
                    f"least {lower:.6g} at delta = {delta:g}"
                )
        found.faults += [f"{who}: {text}" for text in wrong]
        if account["epsilon"] > ODD * upper:
            found.notes.append(
                f"{who}: odd: epsilon = {account['epsilon']:.6g} is claimed, {upper:.6g} would do"
            )


def _counts(account: Tree) -> Counts:
    """(q, sigma, steps) of an account. Raises PrivacyError where a release is none."""
    counts: dict[tuple[float, float], int] = {}
    if not account["releases"]:
        raise PrivacyError("there are none")
    for release in account["releases"]:
        if release["unit"] != account["unit"]:
            raise PrivacyError(f"one is about unit {release['unit']!r}")
        if release["lines"] < 1:
            raise PrivacyError("one is of no line")
        fields = {name: value for name, value in release.items() if name != "lines"}
        mechanism = Event(node="", round=0, status="spent", **fields).mechanism
        key = (mechanism.sample_rate, mechanism.noise_multiplier)
        counts[key] = counts.get(key, 0) + mechanism.steps
    return tuple(sorted((q, sigma, steps) for (q, sigma), steps in counts.items()))


def _curve(account: Tree, counts: Counts) -> Iterator[str]:
    """What is wrong with an account's profile and mu: some points of the curve, derived anew."""
    pairs, mu = account["profile"], account["gdp_mu"]
    if any(len(pair) != 2 or pair[0] < 0 for pair in pairs):
        yield "its profile is none"
        return
    sampled = pairs[: len(pairs) * 3 // 4 + 1 : max(1, len(pairs) // SAMPLED)]
    if mu is not None and mu > 0 and pairs:  # where mu has least room is where it would lie
        tight = min(pairs, key=lambda pair: gaussian_delta(pair[0], mu) / max(pair[1], LEAST_DELTA))
        sampled = [*sampled, tight]
    for epsilon, delta in sampled:
        least = _least_delta(counts, epsilon)
        if not delta >= least:
            yield (
                f"delta = {delta:.3g} is claimed at epsilon = {epsilon:.6g}, but it is at least "
                f"{least:.3g}"
            )
        if mu is not None and not (mu > 0 and gaussian_delta(epsilon, mu) >= least):
            yield (
                f"gdp_mu = {mu:.6g} is claimed, but at epsilon = {epsilon:.6g} that is less than "
                "was released"
            )
            return


@lru_cache(maxsize=1024)
def _least_delta(counts: Counts, epsilon: float) -> float:
    return second.delta_bounds(counts, epsilon)[0]


@lru_cache(maxsize=1024)
def _bounds(counts: Counts, delta: float) -> tuple[float, float]:
    return second.bounds(counts, delta)


def _statements(found: Examination, section: Tree) -> None:
    """Each statement against the accounts that it is about."""
    most: dict[tuple[str, str], float] = {}
    for account in section["accounts"]:
        key = (account["role"], account["unit"])
        most[key] = max(account["epsilon"], most.get(key, 0.0))
    if most and not section["statements"]:
        found.faults.append(f"{_name(section)}: it states nothing about what was spent")
    for one in section["statements"]:
        known = most.get((one["role"], one["unit"]), 0.0)
        if one["epsilon"] is not None and one["epsilon"] != known:
            found.faults.append(
                f"{_name(section)}: epsilon = {one['epsilon']:.6g} is stated, but the accounts "
                f"it is about say {known:.6g}"
            )
        if one["epsilon"] is None:
            found.notes.append(f"{_name(section)}: nothing is promised against {one['against']}")
    if section["neighbouring_relation"] != RELATION:
        found.faults.append(f"{_name(section)}: its figures are about: {RELATION}")
    if section["statement"] != _sentence(section):
        found.faults.append(f"{_name(section)}: its statement is not what its figures say")


def _sentence(section: Tree) -> str:
    """The statement in words, as the figures have it."""
    try:
        statements = [
            Statement(**(one | {"unit": Unit(one["unit"])})) for one in section["statements"]
        ]
    except ValueError:
        return ""
    return sentence(statements, section["delta"])


def _admitted(found: Examination, section: Tree) -> None:
    """What the certificate itself says that a reader should not miss."""
    found.notes += [f"{_name(section)}: {problem}" for problem in section["problems"]]
    found.notes += [
        f"{_name(section)}: not held: {one['text']}: {one['evidence']}"
        for one in section["assumptions"]
        if one["verdict"] != "held" and one["verdict"] != "on trust"
    ]
    found.notes += [
        f"{_name(section, account)}: more was spent than the {account['allowed']:g} allowed"
        for account in section["accounts"]
        if account["allowed"] is not None and account["epsilon"] > account["allowed"]
    ]


# ---- against a ledger

Sums = dict[tuple[object, ...], tuple[int, int]]
"""Of each kind of release: steps and lines."""


def _ledger(found: Examination, path: Path) -> None:
    from fedfuse.privacy.ledger import Ledger

    try:
        ledger = Ledger.open(path)
        entries = tuple(ledger.entries())
    except LedgerError as error:
        found.faults.append(f"the ledger does not hold: {' '.join(str(error).split())}")
        return
    spoken = False
    for section in found.tree["sections"]:
        for mark in section["ledgers"]:
            if mark["id"] != ledger.id:
                continue
            spoken = True
            lines = mark["lines"]
            if not 0 < lines <= len(entries) or entries[lines - 1].hash != mark["head"]:
                found.faults.append(
                    f"{_name(section)}: its last line of the ledger, {lines}, is not in this one: "
                    "one of the two was written anew, or the ledger lost lines"
                )
                continue
            if mark["node"] != ledger.node or mark["public_key"] != ledger.public_key:
                found.faults.append(f"{_name(section)}: the ledger is of another node, or key")
            if section["kind"] == "ledger":
                found.faults += _differences(section, entries[:lines])
            later = sum(entry.mechanism is not None for entry in entries[lines:])
            if later:
                found.notes.append(
                    f"{_name(section)}: {later} releases came later: its figures are as of line "
                    f"{lines} of {len(entries)}"
                )
        for account in section["accounts"] if section["kind"] == "run" else ():
            if (account["role"], account["name"]) == ("node", ledger.node):
                spoken = True
                found.faults += _missing(section, account, entries)
    if not spoken:
        found.faults.append("nothing in it is about this ledger")


def _differences(section: Tree, entries: Iterable[Any]) -> Iterator[str]:
    """Where a section's accounts are not what these lines of the ledger add up to."""
    said = {
        (account["name"], account["unit"]): _sums(account["releases"])
        for account in section["accounts"]
    }
    booked = _booked(entries, lambda entry: (entry.dataset, entry.mechanism.unit.value))
    for key in sorted({*said, *booked}):
        if said.get(key) != booked.get(key):
            yield (
                f"{_name(section)}: {key[0]}: its releases of unit {key[1]} are not those of the "
                "ledger"
            )


def _missing(section: Tree, account: Tree, entries: Iterable[Any]) -> Iterator[str]:
    """Releases of a run that the node's ledger does not have."""
    booked = _booked(entries, lambda entry: None).get(None, {})
    for key, (steps, lines) in _sums(account["releases"]).items():
        there = booked.get(key, (0, 0))
        if steps > there[0] or lines > there[1]:
            yield f"{_name(section, account)}: the ledger has fewer such releases"
            return


def _booked(entries: Iterable[Any], key_of: Callable[[Any], Any]) -> dict[Any, Sums]:
    booked: dict[Any, Sums] = {}
    for entry in entries:
        m = entry.mechanism
        if m is None:
            continue
        sums = booked.setdefault(key_of(entry), {})
        key = (m.unit.value, m.sample_rate, m.noise_multiplier, m.clip_norm, m.count_noise)
        steps, lines = sums.get(key, (0, 0))
        sums[key] = steps + m.steps, lines + 1
    return booked


def _sums(releases: Iterable[Mapping[str, Any]]) -> Sums:
    sums: Sums = {}
    for r in releases:
        key = (
            r["unit"],
            r["sample_rate"],
            r["noise_multiplier"],
            r["clip_norm"],
            r["count_noise"],
        )
        steps, lines = sums.get(key, (0, 0))
        sums[key] = steps + r["steps"], lines + r["lines"]
    return sums


def _name(section: Tree, account: Tree | None = None) -> str:
    return section["name"] if account is None else f"{section['name']}: {account['name']}"


def _line(error: Exception) -> str:
    return " ".join(str(getattr(error, "what", error)).split())[:200]
