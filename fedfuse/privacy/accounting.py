"""What mechanisms cost together: epsilon by PLD (the statement), by RDP and by Opacus (checks).

Torch-free. Input is always the mechanisms themselves (q, sigma, steps), never a summed epsilon,
so that rounds, runs and settings compose.

Neighbouring relation everywhere: add or remove one record.

Sources
    PLD: Koskela et al. 2020 (arXiv:1906.03049v3); Doroshenko et al. 2022 (arXiv:2207.04380v3),
    as in dp-accounting 0.6, pessimistic estimate: an upper bound of the true epsilon.
    RDP: Mironov, Talwar, Zhang 2019 (arXiv:1908.10530v1) for Poisson sampling; conversion by
    Canonne, Kamath, Steinke 2020 (arXiv:2004.00010v5), proposition 12.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from functools import lru_cache

from fedfuse.errors import PrivacyError
from fedfuse.privacy.spec import Mechanism

__all__ = [
    "CALIBRATION_GRID",
    "LEAST_SIGMA",
    "STATEMENT_GRID",
    "calibrate",
    "epsilon",
    "epsilon_opacus",
    "epsilon_rdp",
    "shown",
    "within",
]

STATEMENT_GRID = 1e-4
"""Width of the privacy-loss grid behind every number that is printed as a claim."""
CALIBRATION_GRID = 1e-3
"""A coarser grid for search; pessimistic too, so what it allows the fine grid allows."""

LEAST_SIGMA = 0.3
"""Less noise than this is refused: it hides next to nothing, and its account takes minutes."""

Counts = tuple[tuple[float, float, int], ...]
"""(q, sigma, steps) with equal (q, sigma) merged, sorted: composition does not depend on order."""


def epsilon(
    mechanisms: Iterable[Mechanism], delta: float, *, grid: float = STATEMENT_GRID
) -> float:
    """Upper bound on epsilon at `delta` for all `mechanisms` run on the same records.

    No mechanism gives 0; a bound that no finite number gives is ``inf``.

    >>> from fedfuse.privacy.spec import Unit
    >>> one = Mechanism(unit=Unit.RECORD, sample_rate=0.01, noise_multiplier=1.0, clip_norm=1.0,
    ...                 steps=1000)
    >>> round(epsilon([one], 1e-5, grid=1e-3), 2)
    1.83
    """
    return _epsilon_pld(_merged(mechanisms), _checked(delta), grid)


def epsilon_rdp(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The same by Renyi differential privacy: looser, and computed along another way."""
    return _epsilon_rdp(_merged(mechanisms), _checked(delta))


def epsilon_opacus(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The same by Opacus's own RDP accountant. Loads torch; for the report's comparison only."""
    from opacus.accountants.analysis import rdp

    counts = _merged(mechanisms)
    if not counts:
        return 0.0
    orders = [1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64))
    total = sum(
        rdp.compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=orders)
        for q, sigma, steps in counts
    )
    value, _ = rdp.get_privacy_spent(orders=orders, rdp=total, delta=_checked(delta))
    return float(value)


def calibrate(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """The smallest sigma, to 0.1 %, with which `steps` steps at `sample_rate` cost <= `epsilon`.

    Found on the coarse grid from above, so that the fine grid's statement stays within `epsilon`;
    never below LEAST_SIGMA.
    Raises PrivacyError where no sigma up to 1e6 is enough.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(f"epsilon = {epsilon}, but it must be a positive number")

    def cost(sigma: float) -> float:
        return _epsilon_pld(((sample_rate, sigma, steps),), _checked(delta), CALIBRATION_GRID)

    low = high = 1.0
    while cost(high) > epsilon:
        low, high = high, high * 2
        if high > 1e6:
            raise PrivacyError(
                f"no noise gives epsilon = {epsilon} at delta = {delta}",
                hint="take a larger epsilon, fewer rounds or a smaller privacy.sample_rate",
            )
    while low == high or cost(low) <= epsilon:
        low, high = max(low / 2, LEAST_SIGMA), low
        if low == high:
            return high
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if cost(middle) > epsilon else (low, middle)
    return high


def within(mechanisms: Iterable[Mechanism], epsilon: float, delta: float) -> bool:
    """Whether all `mechanisms` together cost at most `epsilon` at `delta`.

    Answers of the coarse grid are taken when they say yes (it is pessimistic); a no is checked
    on the fine grid. Absurd requests are answered with no at once. Cached: asking in every round
    costs nothing after the first.
    """
    counts = _merged(mechanisms)
    if any(sigma < LEAST_SIGMA for _, sigma, _ in counts):
        return False
    # RDP overstates by a factor of 4.4 at the most (measured); far beyond that the answer is no,
    # and a request made to keep the accountant busy is answered at once.
    try:
        above = _epsilon_rdp(counts, _checked(delta))
    except (ValueError, ArithmeticError):
        return False
    if not above <= 10 * epsilon + 10:  # also where it is NaN
        return False
    return above <= epsilon or (
        _epsilon_pld(counts, _checked(delta), CALIBRATION_GRID) <= epsilon
        or _epsilon_pld(counts, _checked(delta), STATEMENT_GRID) <= epsilon
    )


def shown(epsilon: float) -> str:
    """`epsilon` for people: two digits behind the point, never rounded down.

    >>> shown(7.9912), shown(8.0), shown(0.001)
    ('8.00', '8.00', '0.01')
    """
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}" if math.isfinite(epsilon) else "inf"


def _merged(mechanisms: Iterable[Mechanism]) -> Counts:
    total: dict[tuple[float, float], int] = {}
    for mechanism in mechanisms:
        key = (mechanism.sample_rate, mechanism.noise_multiplier)
        total[key] = total.get(key, 0) + mechanism.steps
    return tuple(sorted((q, sigma, steps) for (q, sigma), steps in total.items()))


def _checked(delta: float) -> float:
    if not 0 < delta < 1:
        raise PrivacyError(f"delta = {delta}, but it must lie between 0 and 1")
    return delta


@lru_cache(maxsize=4096)
def _epsilon_pld(counts: Counts, delta: float, grid: float) -> float:
    if not counts:
        return 0.0
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=grid,
    )
    accountant.compose(_event(counts))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=1024)
def _epsilon_rdp(counts: Counts, delta: float) -> float:
    if not counts:
        return 0.0
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
    # It warns of fractional orders whose series it drops: the minimum over the rest still holds.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        accountant.compose(_event(counts))
    finally:
        logger.setLevel(level)
    return float(accountant.get_epsilon(delta))


def _event(counts: Counts) -> object:
    """The mechanisms as dp-accounting writes them."""
    from dp_accounting import (
        ComposedDpEvent,
        GaussianDpEvent,
        PoissonSampledDpEvent,
        SelfComposedDpEvent,
    )

    return ComposedDpEvent(
        [
            SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps)
            for q, sigma, steps in counts
        ]
    )
