"""What mechanisms cost together: epsilon by PLD (the statement), by RDP and by Opacus (checks).

Torch-free. Input is always the mechanisms themselves (q, sigma, steps), never a summed epsilon,
so that rounds, runs and settings compose.

Guarantees
    Unit: that of the mechanisms, which must be one and the same in a call.
    Neighbouring relation: `Relation`; add-or-remove-one unless said otherwise.
    Sensitivity: C, already divided out: only noise_multiplier counts. (Mechanism's promise is that
    a count released beside the sum is inside it.)
    Not covered: whatever is released besides the mechanisms given; settings (q, sigma, steps) that
    were chosen after a look at what earlier mechanisms gave out (fully adaptive composition, Rogers
    et al. 2016, arXiv:1605.08294v1). What a mechanism computes may depend on all before it.

Sources
    PLD: Koskela et al. 2020 (arXiv:1906.03049v3); Doroshenko et al. 2022 (arXiv:2207.04380v3),
    algorithm 1, as in dp-accounting 0.6, pessimistic estimate: an upper bound of the true epsilon,
    up to the rounding of its floating-point transforms (tests compare with other ways).
    RDP: Mironov, Talwar, Zhang 2019 (arXiv:1908.10530v1), section 3.3, for Poisson sampling;
    conversion by Canonne, Kamath, Steinke 2020 (arXiv:2004.00010v5), proposition 12.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from decimal import ROUND_CEILING
from functools import lru_cache

from fedfuse.errors import PrivacyError
from fedfuse.privacy.composition import (
    Counts,
    Relation,
    affordable,
    fewer,
    full_batches,
    gaussian_delta,
    gaussian_epsilon,
    loss,
    merged,
)
from fedfuse.privacy.search import border, farthest, rounded
from fedfuse.privacy.spec import Mechanism, Unit

__all__ = [
    "CALIBRATION_GRID",
    "LEAST_SIGMA",
    "MOST_STEPS",
    "STATEMENT_GRID",
    "Relation",
    "calibrate",
    "curve",
    "delta",
    "epsilon",
    "epsilon_below",
    "epsilon_opacus",
    "epsilon_rdp",
    "largest_rate",
    "most_steps",
    "shown",
    "within",
]

STATEMENT_GRID = 1e-4
"""Width of the privacy-loss grid behind every number that is printed as a claim."""
CALIBRATION_GRID = 1e-3
"""A coarser grid for search; pessimistic too, so what it allows the fine grid allows."""

LEAST_SIGMA = 0.3
"""Less noise than this is refused: it hides next to nothing, and its account takes minutes."""
MOST_STEPS = 10_000_000
"""`most_steps` looks no further."""


def epsilon(
    mechanisms: Iterable[Mechanism],
    delta: float,
    *,
    grid: float = STATEMENT_GRID,
    relation: Relation = Relation.ADD_OR_REMOVE,
) -> float:
    """Upper bound on epsilon at `delta` for all `mechanisms` run on the same records.

    No mechanism gives 0; a bound that no finite number gives is ``inf``. Where the loss would take
    too many cells of `grid` a coarser grid is taken, and beyond that RDP: always an upper bound.
    Full batches alone have a closed form.

    Doroshenko et al. 2022 (arXiv:2207.04380v3), algorithm 1 (PLD by connecting the dots), composed
    by FFT; the pairs in `composition` say for which mechanisms.

    >>> from fedfuse.privacy.spec import Unit
    >>> one = Mechanism(unit=Unit.RECORD, sample_rate=0.01, noise_multiplier=1.0, clip_norm=1.0,
    ...                 steps=1000)
    >>> round(epsilon([one], 1e-5, grid=1e-3), 2)
    1.83
    >>> round(epsilon([one], 1e-5, grid=1e-3, relation=Relation.REPLACE), 2)
    2.84
    """
    return _epsilon_pld(fewer(merged(mechanisms)), _checked(delta), grid, relation)


def delta(
    mechanisms: Iterable[Mechanism],
    epsilon: float,
    *,
    grid: float = STATEMENT_GRID,
    relation: Relation = Relation.ADD_OR_REMOVE,
) -> float:
    """Upper bound on delta at `epsilon` >= 0: the other way round from `epsilon`.

    The hockey-stick divergence E[(1 - exp(epsilon - L))_+] of the same composed loss L.
    """
    return curve(mechanisms, [epsilon], grid=grid, relation=relation)[0]


def curve(
    mechanisms: Iterable[Mechanism],
    epsilons: Sequence[float],
    *,
    grid: float = STATEMENT_GRID,
    relation: Relation = Relation.ADD_OR_REMOVE,
) -> tuple[float, ...]:
    """`delta` at each of `epsilons`, which must be >= 0 and in rising order."""
    counts = fewer(merged(mechanisms))
    if any(not (math.isfinite(epsilon) and epsilon >= 0) for epsilon in epsilons):
        raise PrivacyError(f"epsilon = {list(epsilons)}, but it must be numbers from 0 on")
    if not counts:
        return (0.0,) * len(epsilons)
    width = affordable(counts, grid, relation)
    if width is None:
        mu = full_batches(counts, relation)
        return tuple(float(gaussian_delta(epsilon, mu)) for epsilon in epsilons)
    whole = loss(counts, width, relation)
    if len(epsilons) == 1:  # exact to the last digit, where the other way sums up
        found = [whole.get_delta_for_epsilon(epsilons[0])]
    else:
        found = whole.get_delta_for_epsilon(list(epsilons))
    return tuple(min(max(float(value), 0.0), 1.0) for value in found)


def epsilon_below(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """Lower bound on epsilon at `delta`, the check from below: losses are rounded down.

    Rounding costs up to half a grid cell in each step: close for hundreds of steps, loose for tens
    of thousands, where `fedfuse.privacy.second.bounds` is the closer one.
    """
    counts = merged(mechanisms)
    if not counts:
        return 0.0
    width = affordable(counts, STATEMENT_GRID, Relation.ADD_OR_REMOVE)
    if width is None:
        mu = full_batches(tuple(c for c in counts if c[0] == 1), Relation.ADD_OR_REMOVE)
        return gaussian_epsilon(_checked(delta), mu) * (1 - 1e-8)
    # dp-accounting adds the mass that it truncates, 1e-15 in each composition, from above here too.
    slack = 1e-13 * len(counts)
    found = loss(counts, width, below=True).get_epsilon_for_delta(_checked(delta) + slack)
    return max(float(found), 0.0)


def epsilon_rdp(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The same by Renyi differential privacy: looser, and computed along another way.

    Mironov, Talwar, Zhang 2019 (arXiv:1908.10530v1), section 3.3; converted by Canonne, Kamath,
    Steinke 2020 (arXiv:2004.00010v5), proposition 12.
    """
    return _epsilon_rdp(fewer(merged(mechanisms)), _checked(delta))


def epsilon_opacus(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The same by Opacus's own RDP accountant. Loads torch; for the report's comparison only.

    Mironov, Talwar, Zhang 2019 (arXiv:1908.10530v1), section 3.3; converted by Balle et al. 2020
    (arXiv:1905.09982), theorem 21, as Opacus 1.6 says.
    """
    from opacus.accountants.analysis import rdp

    counts = fewer(merged(mechanisms))
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
    """The smallest sigma of four digits with which `within` allows `steps` steps.

    Never below LEAST_SIGMA. A run without a sigma of its own takes this one, and `fedfuse plan`
    prints it.
    Raises PrivacyError where no sigma up to 1e6 is enough.
    """
    _positive(epsilon)
    _checked(delta)

    def cost(log_precision: float) -> float:
        """On the coarse grid, which is cheap and never too low; rises as noise falls."""
        return _epsilon_pld(_kind(sample_rate, math.exp(-log_precision), steps), delta, coarse)

    def fine(sigma: float) -> float:
        return _figure(_kind(sample_rate, sigma, steps), epsilon, delta)

    coarse, least = CALIBRATION_GRID, -math.log(LEAST_SIGMA)
    low, high = 0.0, math.log(2)
    while cost(low) > epsilon:
        low, high = low - math.log(2), low
        if low < -math.log(1e6):
            raise PrivacyError(
                f"no noise gives epsilon = {epsilon} at delta = {delta}",
                hint="take a larger epsilon, fewer rounds or a smaller privacy.sample_rate",
            )
    while cost(high) <= epsilon:
        if high == least:
            return LEAST_SIGMA
        low, high = high, min(high + math.log(2), least)
    found = border(cost, epsilon, low, high, 1e-3)
    # What the coarse grid adds hardly changes from here to where the fine one stands at epsilon.
    added = cost(found) - _epsilon_pld(
        _kind(sample_rate, math.exp(-found), steps), delta, STATEMENT_GRID
    )
    if cost(high) > epsilon + added:
        found = border(cost, epsilon + added, found, high, 1e-5)
    near = rounded(math.exp(-found), 4, ROUND_CEILING)
    return max(farthest(near, lambda sigma: fine(sigma) <= epsilon, way=-1), LEAST_SIGMA)


def most_steps(epsilon: float, delta: float, sample_rate: float, noise_multiplier: float) -> int:
    """The most steps at `sample_rate` and `noise_multiplier` that `within` allows.

    Looks no further than MOST_STEPS. Raises PrivacyError where not even one step is allowed.
    """
    _positive(epsilon)

    def figure(steps: float) -> float:
        return _figure(((sample_rate, noise_multiplier, int(steps)),), epsilon, delta)

    def coarse(steps: float) -> float:
        counts = ((sample_rate, noise_multiplier, int(steps)),)
        return _epsilon_pld(counts, delta, CALIBRATION_GRID)

    if not _within(_kind(sample_rate, noise_multiplier, 1), epsilon, delta):
        raise PrivacyError(
            f"one step at sample_rate = {sample_rate} with noise_multiplier = {noise_multiplier} "
            f"costs more than epsilon = {epsilon} at delta = {delta}",
            hint="take more noise, a smaller sample rate or a larger epsilon",
        )
    low, high = 1, 2
    while high <= MOST_STEPS and coarse(high) <= epsilon:
        low, high = high, 2 * high
    if coarse(low) <= epsilon < coarse(high):
        low = int(border(coarse, epsilon, low, high, 1))
    # From what the coarse grid allows, which is cheap and never too much, to what the fine does.
    ahead = max(low // 1000, 1)
    while low + ahead <= MOST_STEPS and figure(low + ahead) <= epsilon:
        low, ahead = low + ahead, 2 * ahead
    if low + ahead > MOST_STEPS:
        if figure(MOST_STEPS) <= epsilon:
            return MOST_STEPS
        ahead = MOST_STEPS - low
    return int(border(figure, epsilon, low, low + ahead, 1))


def largest_rate(epsilon: float, delta: float, noise_multiplier: float, steps: int) -> float:
    """The largest sample rate, to 0.1 %, at which `within` allows `steps` steps.

    Raises PrivacyError where none is allowed, which is where noise_multiplier < LEAST_SIGMA.
    """
    _positive(epsilon)
    if _within(_kind(1.0, noise_multiplier, steps), epsilon, delta):
        return 1.0
    # A step differs with chance q at most, so this keeps (0, delta), however little noise there is.
    least = _checked(delta) / (2 * steps)
    if not _within(_kind(least, noise_multiplier, steps), epsilon, delta):
        raise PrivacyError(
            f"no sample rate gives epsilon = {epsilon} with noise_multiplier = {noise_multiplier}",
            hint=f"take a noise_multiplier of {LEAST_SIGMA} or more",
        )

    def figure(log_rate: float) -> float:
        return _figure(((math.exp(log_rate), noise_multiplier, steps),), epsilon, delta)

    def coarse(log_rate: float) -> float:
        counts = ((math.exp(log_rate), noise_multiplier, steps),)
        return _epsilon_pld(counts, delta, CALIBRATION_GRID)

    low, ahead = math.log(least), 1e-3
    if coarse(low) <= epsilon < coarse(0.0):
        low = border(coarse, epsilon, low, 0.0, 1e-3)
    while low + ahead < 0 and figure(low + ahead) <= epsilon:
        low, ahead = low + ahead, 2 * ahead
    return math.exp(border(figure, epsilon, low, min(low + ahead, 0.0), 1e-3))


def within(mechanisms: Iterable[Mechanism], epsilon: float, delta: float) -> bool:
    """Whether all `mechanisms` together cost at most `epsilon` at `delta`.

    Answers of the coarse grid are taken when they say yes (it is pessimistic); a no is checked
    on the fine grid. Absurd requests are answered with no at once. Cached: asking in every round
    costs nothing after the first.
    """
    return _within(fewer(merged(mechanisms)), epsilon, delta)


def shown(epsilon: float) -> str:
    """`epsilon` for people: two digits behind the point, never rounded down.

    >>> shown(7.9912), shown(8.0), shown(0.001)
    ('8.00', '8.00', '0.01')
    """
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}" if math.isfinite(epsilon) else "inf"


@lru_cache(maxsize=4096)
def _epsilon_pld(
    counts: Counts, delta: float, grid: float, relation: Relation = Relation.ADD_OR_REMOVE
) -> float:
    if not counts:
        return 0.0
    width = affordable(counts, grid, relation)
    if width is not None:
        return float(loss(counts, width, relation).get_epsilon_for_delta(delta))
    above = gaussian_epsilon(delta, full_batches(counts, relation))
    if relation is Relation.ADD_OR_REMOVE and any(q < 1 for q, _, _ in counts):
        with suppress(ValueError, ArithmeticError):
            above = min(above, _epsilon_rdp(counts, delta))
    return above


def _within(counts: Counts, epsilon: float, delta: float) -> bool:
    return _figure(counts, epsilon, delta) <= epsilon


def _figure(counts: Counts, epsilon: float, delta: float) -> float:
    """An upper bound on epsilon, no closer than it takes to compare it with `epsilon`."""
    if any(sigma < LEAST_SIGMA for _, sigma, _ in counts):
        return math.inf
    # RDP overstates by a factor of 4.4 at the most (measured); far beyond that the answer is no,
    # and a request made to keep the accountant busy is answered at once.
    try:
        found = _epsilon_rdp(counts, _checked(delta))
    except (ValueError, ArithmeticError):
        return math.inf
    if not found <= 10 * epsilon + 10:  # also where it is NaN
        return math.inf
    for grid in (CALIBRATION_GRID, STATEMENT_GRID):
        if found > epsilon:
            found = min(found, _epsilon_pld(counts, delta, grid))
    return found


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


def _kind(sample_rate: float, noise_multiplier: float, steps: int) -> Counts:
    """The three as Counts, checked as a Mechanism checks them."""
    one = Mechanism(
        unit=Unit.RECORD,
        sample_rate=sample_rate,
        noise_multiplier=noise_multiplier,
        clip_norm=1.0,
        steps=steps,
    )
    return merged([one])


def _checked(delta: float) -> float:
    if not 0 < delta < 1:
        raise PrivacyError(f"delta = {delta}, but it must lie between 0 and 1")
    return delta


def _positive(epsilon: float) -> None:
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise PrivacyError(f"epsilon = {epsilon}, but it must be a positive number")
