"""The facts of the privacy report, as values: who spent what, and what that promises to whom.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedfuse.config import RunConfig
from fedfuse.errors import PrivacyError
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.reports.assumptions import UNKNOWN_NOISE, WITHIN_LIMITS, Assumption, Verdict
from fedfuse.reports.figures import Detail, Figures, detail, figures, rounds_left
from fedfuse.reports.statement import NOT_PRIVATE, Role, Statement, printable, sentence

__all__ = [
    "Account",
    "Facts",
    "History",
    "LedgerMark",
    "Outcome",
    "Release",
    "detail_of",
    "mixed",
    "ranked",
    "releases",
]

History = tuple[tuple[int, Mechanism], ...]
"""(round, or number of the release, mechanism), in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Lines of the books that agree in all but their steps, which are added."""

    unit: str
    sample_rate: float
    noise_multiplier: float
    clip_norm: float
    count_noise: float
    steps: int
    lines: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What one spender spent: see Role."""

    role: Role
    name: str
    unit: Unit
    history: History
    reserved: int
    """Lines that were reserved and never done; they count."""
    figures: Figures
    allowed: float | None
    """The most that it may spend; None where no limit is known."""
    rounds_left: int | None
    """Rounds like its last that it can still afford; None where no limit is known."""

    @classmethod
    def of(
        cls,
        role: Role,
        name: str,
        history: Sequence[tuple[int, Mechanism]],
        *,
        reserved: int,
        allowed: float | None,
        delta: float,
    ) -> Account:
        """The account of a history that is not empty. Raises PrivacyError."""
        past, ahead = [mechanism for _, mechanism in history], history[-1][1]
        try:
            cost = figures(past, delta)
        except PrivacyError as error:
            raise PrivacyError(error.what, where=printable(name), hint=error.hint) from None
        return cls(
            role=role,
            name=name,
            unit=ahead.unit,
            history=tuple(history),
            reserved=reserved,
            figures=cost,
            allowed=allowed,
            rounds_left=(
                None if allowed is None else rounds_left(past, ahead, epsilon=allowed, delta=delta)
            ),
        )

    @property
    def label(self) -> str:
        """Whose account it is, for people."""
        return f"{self.name}, single updates" if self.role == "update" else self.name

    @property
    def mechanisms(self) -> tuple[Mechanism, ...]:
        """All that it released."""
        return tuple(mechanism for _, mechanism in self.history)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run went, as its files say."""

    status: str
    engine: str
    rounds: int
    done: int
    headline: str
    value: float | None
    baseline: float | None
    """The best constant answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerMark:
    """Which ledger, and up to which line."""

    id: str
    node: str
    head: str
    lines: int
    public_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One section of the report."""

    kind: str
    """"run", "ledger", or "together" for several of a kind on the same data."""
    name: str
    private: bool
    delta: float
    statements: tuple[Statement, ...]
    accounts: tuple[Account, ...]
    """The largest epsilon first."""
    detail: Detail | None
    """Of the first account; None where nothing was spent."""
    assumptions: tuple[Assumption, ...]
    problems: tuple[str, ...]
    """What the files say that cannot be so."""
    data: tuple[str, ...]
    """What names the data: sections that share one add up."""
    outcome: Outcome | None = None
    config: RunConfig | None = None
    ledgers: tuple[LedgerMark, ...] = ()
    hashes: tuple[tuple[str, str], ...] = ()
    """sha256 of a run's files, by name."""

    @property
    def simulated(self) -> bool:
        """Whether it is known that all data was on one machine."""
        return self.kind == "run" and bool(self.data)

    @property
    def seeded(self) -> bool:
        """Whether the noise follows from a seed."""
        return self.private and self.config is not None and bool(self.config.privacy.noise_seed)

    @property
    def sentence(self) -> str:
        """The whole promise."""
        return sentence(self.statements, self.delta) if self.private else NOT_PRIVATE

    @property
    def broken(self) -> tuple[Assumption, ...]:
        """The assumptions that did not hold."""
        return tuple(one for one in self.assumptions if one.verdict is Verdict.BROKEN)

    @property
    def cautions(self) -> tuple[str, ...]:
        """What a reader must know before the figures."""
        found = []
        if self.seeded:
            found.append(
                "SEEDED NOISE: the noise follows from privacy.noise_seed. Whoever knows it can "
                "take the noise off; against them NOTHING is promised."
            )
        if self.private and self.simulated:
            found.append(
                "A simulation: all data was on one machine, and nobody was protected by it. The "
                "figures are what a federation of separate nodes would promise."
            )
        over = [
            account.label
            for account in self.accounts
            if account.allowed is not None and account.figures.epsilon > account.allowed
        ]
        if over:
            found.append(f"OVERSPENT: more than allowed was spent by {', '.join(over)}.")
        told = {WITHIN_LIMITS, UNKNOWN_NOISE}
        if broken := [one.text for one in self.broken if one.text not in told]:
            found.append(f"Did not hold, though the figures rest on it: {'; '.join(broken)}.")
        return tuple(found)


def ranked(accounts: Iterable[Account]) -> tuple[Account, ...]:
    """`accounts`, the largest epsilon first."""
    return tuple(sorted(accounts, key=lambda a: (-a.figures.epsilon, a.role, a.name, a.unit)))


def detail_of(accounts: Sequence[Account], delta: float) -> Detail | None:
    """The detail of the first account, if there is one."""
    return detail(accounts[0].history, delta) if accounts else None


def mixed(accounts: Iterable[Account]) -> tuple[str, ...]:
    """That some were released from under several units, where it is so."""
    units: dict[str, set[Unit]] = {}
    for account in accounts:
        units.setdefault(account.name, set()).add(account.unit)
    names = sorted(name for name, each in units.items() if len(each) > 1)
    if not names:
        return ()
    several = ", ".join(sorted({unit for name in names for unit in units[name]}))
    return (
        f"{', '.join(names)}: released from under several units ({several}), and each figure "
        "leaves out the releases under the others",
    )


def releases(history: Iterable[Mechanism]) -> tuple[Release, ...]:
    """`history` with equal mechanisms merged, in a fixed order."""
    steps: dict[tuple[str, float, float, float, float], list[int]] = {}
    for m in history:
        key = (m.unit.value, m.sample_rate, m.noise_multiplier, m.clip_norm, m.count_noise)
        steps.setdefault(key, []).append(m.steps)
    return tuple(
        Release(
            unit=unit,
            sample_rate=q,
            noise_multiplier=sigma,
            clip_norm=C,
            count_noise=count_noise,
            steps=sum(each),
            lines=len(each),
        )
        for (unit, q, sigma, C, count_noise), each in sorted(steps.items())
    )
