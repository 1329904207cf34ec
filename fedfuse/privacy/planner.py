"""A run planned before it starts: of epsilon, delta, rounds, sample rate and sigma, the open one.

Torch-free; looks at no data, only at numbers that are public anyway.

Guarantees
    Unit, neighbouring relation, sensitivity: as in `accounting`, for one node that takes part in
    every round; that nodes may be drawn at random is not claimed as a gain.
    A solved value is rounded to the side that costs less privacy, and checked again as rounded,
    with `accounting.within`, which is what a node decides by.
    `Plan.spent` is the statement, on its fine grid. `Plan.by_round` may be from the coarse one:
    upper bounds too.
    Not covered: whether the numbers were chosen by looking at the data.

| solved      | rounded           | ends at                      |
|-------------|-------------------|------------------------------|
| epsilon     | up, two decimals  |                              |
| delta       | up, three digits  | LEAST_DELTA, MOST_DELTA      |
| rounds      | down              | accounting.MOST_STEPS steps  |
| sample_rate | down, four digits | 1                            |
| sigma       | up, four digits   | accounting.LEAST_SIGMA       |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR
from typing import Any

from fedfuse.errors import PrivacyError
from fedfuse.privacy import accounting
from fedfuse.privacy.profile import LEAST_DELTA, gdp_mu
from fedfuse.privacy.search import farthest, rounded
from fedfuse.privacy.spec import Mechanism, Unit

__all__ = ["LEAST_DELTA", "MOST_DELTA", "OPEN", "Plan", "Terms", "figure", "make_plan"]

OPEN = ("epsilon", "delta", "rounds", "sample_rate", "sigma")
"""Which of the terms can be solved for."""

COARSE_ENOUGH, FINE_POINTS = 1.003, 25
"""Epsilon by round is from the coarse grid where that overstates the whole run by no more than the
one, else from the fine one, at no more points than the other, as it is slower."""
MOST_DELTA = 0.1
"""With more, one unit in ten could be published as it is; a configuration refuses it too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What is public about a run, before it starts."""

    unit: Unit = Unit.RECORD
    epsilon: float = 8.0
    """The most that any node may spend, at `delta`."""
    delta: float = 1e-5
    rounds: int = 40
    sample_rate: float = 0.25
    """q; 1 with unit "node", where each round counts in full."""
    sigma: float = 1.0
    """The noise multiplier."""
    local_steps: int = 4
    """Steps a round; 1 with unit "node", whose one release is the round's update."""
    units: int | None = None
    """The public number of units that a step draws from: a node's records or subjects, with unit
    "node" the nodes. None: not known."""
    clip_norm: float = 1.0
    """C. Neither a cost nor a ratio depends on it."""
    parameters: int = 100_000
    """How many are trained."""
    nodes: int = 1
    """Over how many updates the server averages."""
    noise_shared: int = 1
    """Unit "node": over how many updates the noise of one sum is shared out."""

    @property
    def steps(self) -> int:
        """Of one node in the whole run."""
        return self.rounds * self.local_steps

    @property
    def expected_batch(self) -> float | None:
        """By what a step's sum is divided: q x units; 1 with unit "node"; None: not known."""
        if self.unit is Unit.NODE:
            return 1.0
        return None if self.units is None else self.units * self.sample_rate

    def mechanism(self, rounds: int | None = None) -> Mechanism:
        """What one node runs in that many rounds, by default in all. Raises PrivacyError."""
        return Mechanism(
            unit=self.unit,
            sample_rate=self.sample_rate,
            noise_multiplier=self.sigma,
            clip_norm=self.clip_norm,
            steps=self.steps if rounds is None else rounds * self.local_steps,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Terms of which one was solved, and what they cost."""

    terms: Terms
    solved: str
    """Which of OPEN."""
    at_end: bool
    """The solved value stands at the end of its range, so that less than epsilon is spent."""
    kept: bool
    """What a node answers to the terms: `accounting.within`."""
    spent: float
    """Epsilon of all rounds: the statement."""
    spent_rdp: float
    """The check."""
    spent_next: float
    """Epsilon with one more round, on the statement's grid."""
    mu: float | None
    """Of the Gaussian mechanism that hides no more; None where none describes the run."""
    by_round: tuple[tuple[int, float], ...]
    """(round, epsilon up to then), upper bounds; the last is `spent`."""
    grid_by_round: float
    """The grid behind all of them but the last."""

    @property
    def noise_of_step(self) -> float | None:
        """The norm of a step's noise against C, the most that its signal can be; None: not known.

        sigma C sqrt(d) / (b sqrt(m)), over C. A step's sum has noise of standard deviation sigma C
        in each of d coordinates, sqrt(d) times that in norm; it is divided by the expected batch b
        (Abadi et al. 2016, arXiv:1607.00133v2, algorithm 1); m independent noises are averaged.
        """
        terms, batch = self.terms, self.terms.expected_batch
        if batch is None:
            return None
        noises = terms.nodes * terms.noise_shared
        return terms.sigma * math.sqrt(terms.parameters) / (batch * math.sqrt(noises))

    @property
    def noise_of_run(self) -> float | None:
        """The same of all T steps added up, at a constant learning rate: noise_of_step / sqrt(T).

        The noise of T steps is sqrt(T) times that of one; their signal is at most T times C, where
        all of it points one way. Of the settings it depends on sigma / (q sqrt(T)) alone, the total
        amount of noise (Sander et al. 2023, arXiv:2210.03403v2). Above 1, the noise has moved the
        weights farther than the data can have done.
        """
        ratio = self.noise_of_step
        return None if ratio is None else ratio / math.sqrt(self.terms.steps)


def make_plan(terms: Terms, *, solve: str, points: int = 10) -> Plan:
    """`terms` with the one of OPEN that `solve` names found, and epsilon at about `points` rounds.

    What `terms` says of that one is not looked at.
    Raises PrivacyError where no value of it keeps the promise.
    """
    value, at_end = _SOLVERS[solve](terms)
    changes: dict[str, Any] = {solve: value}
    terms = replace(terms, **changes)
    whole = [terms.mechanism()]
    spent = accounting.epsilon(whole, terms.delta)
    by_round, grid = _by_round(terms, spent, points)
    return Plan(
        terms=terms,
        solved=solve,
        at_end=at_end,
        kept=_kept(terms),
        spent=spent,
        spent_rdp=accounting.epsilon_rdp(whole, terms.delta),
        spent_next=accounting.epsilon([terms.mechanism(terms.rounds + 1)], terms.delta),
        mu=_mu(terms.mechanism(), spent),
        by_round=by_round,
        grid_by_round=grid,
    )


def figure(epsilon: float) -> str:
    """`epsilon` for people, never rounded down: as `accounting.shown`, below 1 with four decimals.

    >>> figure(7.9912), figure(0.04985)
    ('8.00', '0.0499')
    """
    if not 0 < epsilon < 1:
        return accounting.shown(epsilon)
    return f"{math.ceil(epsilon * 1e4 - 1e-9) / 1e4:.4f}"


def _solve_epsilon(terms: Terms) -> tuple[float, bool]:
    spent = accounting.epsilon([terms.mechanism()], terms.delta)
    if not math.isfinite(spent):
        raise PrivacyError("no finite epsilon holds for this run", hint="take more noise")
    return max(float(accounting.shown(spent)), 0.01), False


def _solve_delta(terms: Terms) -> tuple[float, bool]:
    found = accounting.delta([terms.mechanism()], terms.epsilon)
    if found <= LEAST_DELTA:
        return LEAST_DELTA, True
    if found > MOST_DELTA:
        raise PrivacyError(
            f"epsilon = {terms.epsilon:g} is kept only with delta = {found:.3g}, which promises "
            "next to nothing",
            hint="take a larger epsilon, more noise or fewer rounds",
        )
    return float(rounded(found, 3, ROUND_CEILING)), False


def _solve_rounds(terms: Terms) -> tuple[int, bool]:
    _refuse_little_noise(terms)
    most = accounting.most_steps(terms.epsilon, terms.delta, terms.sample_rate, terms.sigma)
    if most < terms.local_steps:
        raise PrivacyError(
            f"epsilon = {terms.epsilon:g} allows {most} steps, but one round has "
            f"{terms.local_steps}",
            hint="take more noise, fewer steps a round or a larger epsilon",
        )
    return most // terms.local_steps, most == accounting.MOST_STEPS


def _solve_sample_rate(terms: Terms) -> tuple[float, bool]:
    _refuse_little_noise(terms)
    found = accounting.largest_rate(terms.epsilon, terms.delta, terms.sigma, terms.steps)
    if found >= 1:
        return 1.0, True

    def allowed(rate: float) -> bool:
        return rate < 1 and _kept(replace(terms, sample_rate=rate))

    return farthest(rounded(found, 4, ROUND_FLOOR), allowed, way=1), False


def _solve_sigma(terms: Terms) -> tuple[float, bool]:
    found = accounting.calibrate(terms.epsilon, terms.delta, terms.sample_rate, terms.steps)
    return found, found <= accounting.LEAST_SIGMA


_SOLVERS: dict[str, Callable[[Terms], tuple[float, bool]]] = {
    "epsilon": _solve_epsilon,
    "delta": _solve_delta,
    "rounds": _solve_rounds,
    "sample_rate": _solve_sample_rate,
    "sigma": _solve_sigma,
}
"""Each gives the value, rounded, and whether it is the end of its range."""


def _refuse_little_noise(terms: Terms) -> None:
    if terms.sigma < accounting.LEAST_SIGMA:
        raise PrivacyError(
            f"sigma = {terms.sigma:g}, but nodes refuse less than {accounting.LEAST_SIGMA:g}, "
            "whatever the rest",
            hint="take more noise, or solve for sigma",
        )


def _kept(terms: Terms) -> bool:
    return accounting.within([terms.mechanism()], terms.epsilon, terms.delta)


def _mu(mechanism: Mechanism, spent: float) -> float | None:
    if spent > 100:  # the curve is 0 or 1 all along, in floating point
        return None
    try:
        return gdp_mu([mechanism], grid=accounting.CALIBRATION_GRID)
    except PrivacyError:
        return None


def _by_round(
    terms: Terms, spent: float, points: int
) -> tuple[tuple[tuple[int, float], ...], float]:
    """Epsilon after each of `points` even strides and after all rounds, and the grid it is from."""
    if terms.sigma < accounting.LEAST_SIGMA:  # a slow account of what no node runs
        points = 1
    grid = accounting.CALIBRATION_GRID
    if accounting.epsilon([terms.mechanism()], terms.delta, grid=grid) > COARSE_ENOUGH * spent:
        grid, points = accounting.STATEMENT_GRID, min(points, FINE_POINTS)
    stride = -(-terms.rounds // points)
    # Fewer rounds cost no more than all of them: the figure of all bounds each.
    first = [
        (n, min(accounting.epsilon([terms.mechanism(n)], terms.delta, grid=grid), spent))
        for n in range(stride, terms.rounds, stride)
    ]
    return (*first, (terms.rounds, spent)), grid
