"""The figures of one history of mechanisms: the claim, and each check of it.

Torch-free. Mechanisms go in, never an epsilon. Equal histories are computed once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fedfuse.errors import PrivacyError
from fedfuse.privacy import accounting, second
from fedfuse.privacy.accounting import LEAST_SIGMA, Relation
from fedfuse.privacy.profile import Profile, advantage, gdp_mu, profile, true_positives
from fedfuse.privacy.spec import Mechanism

__all__ = ["ALARMS", "CURVE_GRID", "Detail", "Figures", "detail", "figures", "rounds_left"]

ALARMS = (0.001, 0.01, 0.1)
"""The false-alarm rates that the report puts into words."""
CURVE_GRID = accounting.CALIBRATION_GRID
"""Of mu and the profile: coarser than the claim's, and from above all the same."""
POINTS = 40
"""A course of many rounds is shown at this many of them."""
FARTHEST = 1_000_000
"""A forecast looks no further."""
MOST_EPSILON = 1000.0
"""Above this there is no report: it would give a figure to what protects nobody."""
_RATES = (0.0, 1e-4, 1e-3, 3e-3, 0.01, 0.02, 0.035, 0.05, 0.075, *(n / 20 for n in range(2, 21)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a history costs, at one delta."""

    epsilon: float
    """By PLD on the statement's grid: an upper bound, and the claim."""
    rdp: float
    """By Renyi differential privacy: looser, from above."""
    second: tuple[float, float]
    """The second accountant's bounds: the true epsilon lies between them."""
    mu: float
    """Of the Gaussian mechanism that hides no more: all (epsilon, delta) pairs in one number."""
    profile: Profile
    """The (epsilon, delta) pairs that hold all together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """What is computed of one history alone, as it takes longer."""

    below: float
    """By PLD with losses rounded down: the true epsilon is no smaller."""
    replace: float
    """Epsilon where one unit is replaced by another."""
    advantage: float
    """True positives less false alarms, at most, of any attacker who guesses membership."""
    attack: tuple[tuple[float, float], ...]
    """(false alarms, true positives at most), from 0 to 1."""
    course: tuple[tuple[int, float], ...]
    """(round, epsilon up to then): upper bounds by the second accountant; the last is the claim."""

    def true_positives(self, alarms: float) -> float:
        """The most true positives at one of ALARMS."""
        return dict(self.attack)[alarms]


def figures(history: Iterable[Mechanism], delta: float) -> Figures:
    """The figures of `history`, which must not be empty.

    Raises PrivacyError where it hides next to nothing, or cannot be accounted for.
    """
    past = _merged(history)
    quietest = min((m.noise_multiplier for m in past if m.sample_rate < 1), default=LEAST_SIGMA)
    if quietest < LEAST_SIGMA:
        raise PrivacyError(
            f"NOT PRIVATE: a release has sigma = {quietest:g}, and below {LEAST_SIGMA:g} noise "
            "hides next to nothing",
            hint="take what was released for the records themselves",
        )
    try:
        rough = accounting.epsilon_rdp(past, delta)
        if rough <= MOST_EPSILON:
            return _figures(past, delta)
    except (ArithmeticError, ValueError):
        rough = math.inf
    raise PrivacyError(
        f"NOT PRIVATE: epsilon = {rough:.6g} at delta = {delta:g} protects nobody; above "
        f"{MOST_EPSILON:g} there is no report",
        hint="take what was released for the records themselves",
    )


def detail(history: Sequence[tuple[int, Mechanism]], delta: float) -> Detail:
    """The rest, of a history whose mechanisms are numbered by round. Raises PrivacyError."""
    past = _merged(mechanism for _, mechanism in history)
    curve, rates = _figures(past, delta).profile, sorted({*_RATES, *ALARMS})
    return Detail(
        below=accounting.epsilon_below(past, delta),
        replace=accounting.epsilon(past, delta, relation=Relation.REPLACE),
        advantage=advantage(curve),
        attack=tuple((rate, true_positives(curve, rate)) for rate in rates),
        course=_course(history, delta),
    )


def rounds_left(
    history: Iterable[Mechanism], ahead: Mechanism, *, epsilon: float, delta: float
) -> int:
    """How many more rounds of `ahead` the budget allows, up to FARTHEST.

    Looked for with the second accountant, which is quick, and confirmed as a node decides it.
    """
    past = _merged(history)

    def allowed(rounds: int) -> bool:
        more = dataclasses.replace(ahead, steps=ahead.steps * rounds)
        if rounds > FARTHEST:
            return False
        try:
            cost = second.bounds(kinds([*past, more]), delta)[1]
        except ArithmeticError:
            return False
        # Next to no loss at all drowns in the second accountant's rounding.
        return cost <= epsilon or (
            cost == math.inf and accounting.within([*past, more], epsilon, delta)
        )

    low, high = 0, 1
    while allowed(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    while low and not accounting.within(
        [*past, dataclasses.replace(ahead, steps=ahead.steps * low)], epsilon, delta
    ):
        low = min(low - 1, int(low * 0.999))
    return low


def _merged(history: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """`history` with the steps of mechanisms that cost the same added up, in a fixed order."""
    total: dict[tuple[str, float, float], tuple[Mechanism, int]] = {}
    for mechanism in history:
        key = (mechanism.unit.value, mechanism.sample_rate, mechanism.noise_multiplier)
        total[key] = mechanism, mechanism.steps + total.get(key, (mechanism, 0))[1]
    return tuple(
        Mechanism(
            unit=one.unit,
            sample_rate=one.sample_rate,
            noise_multiplier=one.noise_multiplier,
            clip_norm=1.0,
            steps=steps,
        )
        for _, (one, steps) in sorted(total.items())
    )


def kinds(history: Iterable[Mechanism]) -> list[tuple[float, float, int]]:
    """(q, sigma, steps) of each kind, as the second accountant takes them."""
    return [(m.sample_rate, m.noise_multiplier, m.steps) for m in _merged(history)]


@lru_cache(maxsize=256)
def _figures(past: tuple[Mechanism, ...], delta: float) -> Figures:
    return Figures(
        epsilon=accounting.epsilon(past, delta),
        rdp=accounting.epsilon_rdp(past, delta),
        second=second.bounds(kinds(past), delta),
        mu=gdp_mu(past, grid=CURVE_GRID),
        profile=profile(past, grid=CURVE_GRID),
    )


def _course(
    history: Sequence[tuple[int, Mechanism]], delta: float
) -> tuple[tuple[int, float], ...]:
    numbers = sorted({number for number, _ in history})
    step = max(1, -(-len(numbers) // POINTS))
    whole = _figures(_merged(mechanism for _, mechanism in history), delta).epsilon
    course = [
        # What the whole costs bounds each beginning of it too.
        (number, min(second.bounds(kinds(m for n, m in history if n <= number), delta)[1], whole))
        for number in numbers[:-1:step]
    ]
    return (*course, (numbers[-1], whole))
