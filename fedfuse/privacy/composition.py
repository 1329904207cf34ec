"""The privacy loss of mechanisms together, as dp-accounting composes it, on a grid it can afford.

The pairs that are composed, with N(m) = Normal(m, sigma^2) and C = 1:

    add or remove   (1-q) N(0) + q N(1)   against  N(0), and the reverse; the larger figure counts
    replace         (1-q) N(0) + q N(-1)  against  (1-q) N(0) + q N(1)

Why each dominates one step on any two neighbours, in any dimension. The others' sample is the same
on both sides, so by joint convexity of the hockey-stick divergence it may be fixed: the sum is then
N(m) without the unit, and N(m + g), for the replacing unit N(m + h), with it; |g|, |h| <= 1. Take
any set A, and a = N(m)(A). By the lemma of Neyman and Pearson N(m + g)(A) and N(m + h)(A) lie
between Phi(Phi^-1(a) - 1/sigma) and Phi(Phi^-1(a) + 1/sigma). So P(A) - e^eps Q(A) is at most what
a half-line of N(0)-measure a gives for the pair above, for every eps. Pairs that dominate for every
eps compose, adaptively too: Zhu, Dong, Wang 2022 (arXiv:2106.08567v3), theorem 10. (What fails for
other samplings, Lebeda et al. 2024, arXiv:2405.20769v2, is that the worst pair of one step need
not dominate for every eps.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from functools import lru_cache
from typing import Any

from fedfuse.errors import PrivacyError
from fedfuse.privacy.spec import Mechanism, Unit

__all__ = [
    "Counts",
    "Relation",
    "affordable",
    "fewer",
    "full_batches",
    "gaussian_delta",
    "gaussian_epsilon",
    "loss",
    "merged",
]

MOST_KINDS = 64
"""More kinds of (q, sigma) than this are rounded, pessimistically, until no more are left."""
MOST_CELLS = 6_000_000
"""Where all steps' losses, one of each kind, take more grid cells than this, or one composed loss
takes twice as many, the grid is coarser, and still pessimistic."""

Counts = tuple[tuple[float, float, int], ...]
"""(q, sigma, steps) with equal (q, sigma) merged, sorted: composition does not depend on order."""


class Relation(StrEnum):
    """How two neighbouring data sets differ, in one unit."""

    ADD_OR_REMOVE = "add-or-remove-one"
    REPLACE = "replace-one"
    """The unit is there in both, with other content. Never smaller than add-or-remove-one."""


def merged(mechanisms: Iterable[Mechanism]) -> Counts:
    """The mechanisms as (q, sigma, steps), equal kinds added up: all that their cost depends on.

    Raises PrivacyError where they protect different units: a figure for records and one for
    subjects do not add up to a figure for either.
    """
    total: dict[tuple[float, float], int] = {}
    units: set[Unit] = set()
    for mechanism in mechanisms:
        key = (mechanism.sample_rate, mechanism.noise_multiplier)
        total[key] = total.get(key, 0) + mechanism.steps
        units.add(mechanism.unit)
    if len(units) > 1:
        raise PrivacyError(
            f"mechanisms that protect different units ({', '.join(sorted(units))}) in one account",
            hint="account for each unit by itself",
        )
    return tuple(sorted((q, sigma, steps) for (q, sigma), steps in total.items()))


def fewer(counts: Counts) -> Counts:
    """`counts` with at most MOST_KINDS kinds: beyond that q is rounded up and sigma down.

    Both only add to the cost. Less noise: the noisier output is made from the other by adding
    noise. A larger q: with q' < q the step is a mixture of that with q, and of one that never sees
    the unit; divergences are jointly convex.
    """
    few, notch = counts, 1.01
    while len(few) > MOST_KINDS:
        total: dict[tuple[float, float], int] = {}
        for q, sigma, steps in counts:
            up = max(q, min(1.0, notch ** math.ceil(math.log(q, notch) - 1e-9)))
            down = min(sigma, notch ** math.floor(math.log(sigma, notch) + 1e-9))
            total[up, down] = total.get((up, down), 0) + steps
        few = tuple(sorted((q, sigma, steps) for (q, sigma), steps in total.items()))
        notch **= 1.25
    return few


@lru_cache(maxsize=2)
def loss(
    counts: Counts,
    grid: float,
    relation: Relation = Relation.ADD_OR_REMOVE,
    below: bool = False,
) -> Any:
    """dp-accounting's PrivacyLossDistribution of all of `counts`, not empty, composed.

    Full batches are one Gaussian together, with mu^2 = sum steps / sigma^2 (Dong, Roth, Su 2022,
    arXiv:1905.02383v3, corollary 3.3).
    """
    parts = [
        _times(_step(q, sigma, grid, relation, below), steps) for q, sigma, steps in _parts(counts)
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.compose(part)
    return whole


def _times(step: Any, steps: int) -> Any:
    """`step` composed with itself. dp-accounting 0.6 computes (cells of a step) ** steps as a whole
    number first, which takes minutes for millions of steps: so those go in batches."""
    batch = 100_000
    if steps <= batch:
        return step.self_compose(steps)
    whole = step.self_compose(batch).self_compose(steps // batch)
    return whole.compose(step.self_compose(steps % batch)) if steps % batch else whole


def _parts(counts: Counts) -> Counts:
    full = sum(steps / sigma**2 for q, sigma, steps in counts if q == 1)
    sampled = tuple(count for count in counts if count[0] < 1)
    return ((1.0, full**-0.5, 1), *sampled) if full else sampled


@lru_cache(maxsize=16)
def _step(q: float, sigma: float, grid: float, relation: Relation, below: bool) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    neighbours = {
        Relation.ADD_OR_REMOVE: NeighboringRelation.ADD_OR_REMOVE_ONE,
        Relation.REPLACE: NeighboringRelation.REPLACE_ONE,
    }
    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma,
        value_discretization_interval=grid,
        sampling_prob=q,
        pessimistic_estimate=not below,
        use_connect_dots=not below,
        neighboring_relation=neighbours[relation],
    )


def affordable(counts: Counts, grid: float, relation: Relation) -> float | None:
    """`grid`, or the next coarser one that the loss's width allows; None: not even 1000 times.

    None too where every batch is full: that has a closed form.
    """
    if all(q == 1 for q, _, _ in counts):
        return None
    widths = [_widths(*count, relation) for count in _parts(counts)]
    for factor in (1, 10, 100, 1000):
        single = sum(one for one, _ in widths) / (grid * factor)
        composed = max(all_steps for _, all_steps in widths) / (grid * factor)
        if single <= MOST_CELLS and composed <= 2 * MOST_CELLS:
            return grid * factor
    return None


def _widths(q: float, sigma: float, steps: int, relation: Relation) -> tuple[float, float]:
    """About how wide the loss is that dp-accounting keeps of one step, and of all of them.

    For planning only. It cuts by Chernoff's bound at 1e-15, at orders from 1 to 20 / (one step's).
    """
    import numpy as np

    x = np.linspace(-1 - 11 * sigma, 1 + 11 * sigma, 2001)
    stay = math.log1p(-q) if q < 1 else -math.inf
    null, there = -(x**2) / (2 * sigma**2), -((x - 1) ** 2) / (2 * sigma**2)
    upper = np.logaddexp(stay + null, math.log(q) + there)
    loss = upper - (upper[::-1] if relation is Relation.REPLACE else null)
    weight = np.exp(upper - np.logaddexp.reduce(upper))
    one = float(np.ptp(loss))
    variance = float(weight @ (loss - weight @ loss) ** 2)
    order = min(max(math.sqrt(70 / max(steps * variance, 1e-300)), 1 / one), 20 / one)
    return one, min(steps * one, steps * order * variance + 70 / order)


def full_batches(counts: Counts, relation: Relation) -> float:
    """mu of the Gaussian that `counts` are where every batch is full; else it dominates them."""
    change = 2 if relation is Relation.REPLACE else 1
    return change * math.sqrt(sum(steps / sigma**2 for _, sigma, steps in counts))


def gaussian_delta(epsilon: Any, mu: float) -> Any:
    """delta at `epsilon`, a number or an array, of N(mu, 1) against N(0, 1).

    Balle and Wang 2018 (arXiv:1805.06530v2), theorem 8; Dong, Roth, Su 2022 (arXiv:1905.02383v3),
    corollary 2.13.
    """
    import numpy as np
    from scipy.special import log_ndtr, ndtr

    second = np.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))
    return np.maximum(ndtr(mu / 2 - epsilon / mu) - second, 0.0)


def gaussian_epsilon(delta: float, mu: float) -> float:
    """The least epsilon >= 0 with `gaussian_delta` <= `delta`, rounded up."""
    if mu == 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, mu
    while gaussian_delta(high, mu) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, mu) > delta else (low, middle)
    return high
