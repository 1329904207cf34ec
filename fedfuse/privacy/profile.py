"""What a history costs at every epsilon at once, and what that leaves to an attacker. Torch-free.

A single (epsilon, delta) is one point of a curve. The curve is the claim; `gdp_mu` and what an
attacker's test can reach are summaries of it.

Guarantees
    Unit, neighbouring relation (add-or-remove-one), sensitivity: as in `accounting`. All figures
    are upper bounds: of delta, of mu, of a true positive rate.
    Not covered: points of the curve with delta < LEAST_DELTA.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fedfuse.errors import PrivacyError
from fedfuse.privacy import accounting
from fedfuse.privacy.accounting import Relation
from fedfuse.privacy.composition import full_batches, gaussian_delta, merged
from fedfuse.privacy.spec import Mechanism

__all__ = ["LEAST_DELTA", "Profile", "advantage", "gdp_mu", "profile", "true_positives"]

LEAST_DELTA = 1e-10
"""The curve ends here: smaller deltas drown in the rounding of floating-point transforms."""
_POINTS = 257
_POINTS_MU = 2049


@dataclass(frozen=True, slots=True)
class Profile:
    """The curve: `deltas[i]` bounds delta at `epsilons[i]`; from epsilon 0 on, delta falling."""

    epsilons: tuple[float, ...]
    deltas: tuple[float, ...]


def profile(mechanisms: Iterable[Mechanism], *, grid: float = accounting.STATEMENT_GRID) -> Profile:
    """The (epsilon, delta) curve of all `mechanisms` together, down to LEAST_DELTA.

    Evenly spaced in epsilon. Nothing run: the one point (0, 0).
    """
    return _curve(tuple(mechanisms), grid, _POINTS)


def gdp_mu(mechanisms: Iterable[Mechanism], *, grid: float = accounting.STATEMENT_GRID) -> float:
    """The least mu, rounded up, with mu-GDP's delta(epsilon) nowhere below that of `mechanisms`.

    A summary of the curve over delta >= LEAST_DELTA (Gomez et al. 2025, arXiv:2503.10945v2), and
    not the claim: mu-GDP of the mechanism itself would need every delta. Where all batches are full
    it is exact, sqrt(sum steps / sigma^2). It comes from the composed curve, never from the central
    limit theorem, which understates (and so does Opacus's GDP accountant, by up to 6 times).
    """
    history = tuple(mechanisms)
    counts = merged(history)
    if all(q == 1 for q, _, _ in counts):
        exact = full_batches(counts, Relation.ADD_OR_REMOVE)
        return exact * (1 + 1e-12)
    curve = _curve(history, grid, _POINTS_MU)
    low, high = 0.0, 1.0
    while not _dominates(high, curve):
        low, high = high, 2 * high
        if high > 1e6:
            raise PrivacyError("no mu describes this history", hint="it has next to no noise")
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _dominates(middle, curve) else (middle, high)
    return high


def true_positives(source: Profile | Iterable[Mechanism], false_positive_rate: float) -> float:
    """The best true positive rate that any attacker reaches at `false_positive_rate`.

    The attacker tells whether the unit was in the training data, knowing everything else, with any
    test of all that was released: Kairouz, Oh, Viswanath 2015 (arXiv:1311.0776v4), theorem 2.1.
    Both directions of the curve are used:

        TPR <= e^eps FPR + delta        1 - FPR <= e^eps (1 - TPR) + delta
    """
    f = false_positive_rate
    if not 0 <= f <= 1:
        raise PrivacyError(f"false_positive_rate = {f}, but it must lie between 0 and 1")
    curve = source if isinstance(source, Profile) else profile(source)
    best = 1.0
    for epsilon, delta in zip(curve.epsilons, curve.deltas, strict=True):
        if f == 0 or epsilon < 700:
            best = min(best, (math.exp(epsilon) * f if f else 0.0) + delta)
        best = min(best, 1 - math.exp(-epsilon) * (1 - delta - f))
    return max(best, f)


def advantage(source: Profile | Iterable[Mechanism]) -> float:
    """The most by which any attacker's true positive rate exceeds the false one: delta at 0."""
    curve = source if isinstance(source, Profile) else profile(source)
    return curve.deltas[0]


def _curve(history: tuple[Mechanism, ...], grid: float, points: int) -> Profile:
    most = accounting.epsilon(history, LEAST_DELTA, grid=grid)
    if not math.isfinite(most):
        raise PrivacyError(
            f"no finite epsilon keeps delta = {LEAST_DELTA:g}", hint="it has next to no noise"
        )
    epsilons = [most * k / (points - 1) for k in range(points)] if most else [0.0]
    deltas = list(accounting.curve(history, epsilons, grid=grid))
    for k in range(1, len(deltas)):  # rounding may lift the last digits
        deltas[k] = min(deltas[k], deltas[k - 1])
    return Profile(tuple(epsilons), tuple(deltas))


def _dominates(mu: float, curve: Profile) -> bool:
    """Whether the curve of mu-GDP is nowhere below that of `curve`, between its points too.

    delta is convex in a = e^eps (a supremum of lines in a), so between two points it is at most
    their chord. The GDP curve is convex too, with slope -Phi(-mu/2 - eps/mu): it is nearest to the
    chord, or furthest below it, where that is the chord's slope.
    """
    import numpy as np
    from scipy.special import ndtri_exp

    epsilons, deltas = np.array(curve.epsilons), np.array(curve.deltas)
    if np.any(gaussian_delta(epsilons, mu) < deltas):
        return False
    start, width = epsilons[:-1], np.diff(epsilons)
    slope = np.diff(deltas) / np.expm1(width)  # in units of e^-start
    with np.errstate(divide="ignore", invalid="ignore"):
        steepest = -mu * (ndtri_exp(np.minimum(np.log(-slope) - start, 0)) + mu / 2)
    inside = np.clip(np.nan_to_num(steepest, nan=0.0), start, epsilons[1:])
    chord = deltas[:-1] + slope * np.expm1(inside - start)
    return bool(np.all(gaussian_delta(inside, mu) >= chord))
