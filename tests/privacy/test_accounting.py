"""epsilon agrees with what others compute, composes, and is never below what is certain."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedfuse.errors import PrivacyError
from fedfuse.privacy import accounting, composition, second
from fedfuse.privacy.accounting import Relation
from fedfuse.privacy.composition import merged
from fedfuse.privacy.plan import plan
from fedfuse.privacy.spec import Mechanism, PrivacyConfig, Unit


def mechanism(q: float, sigma: float, steps: int) -> Mechanism:
    return Mechanism(
        unit=Unit.RECORD, sample_rate=q, noise_multiplier=sigma, clip_norm=1.0, steps=steps
    )


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The exact delta of a Gaussian mechanism (Balle and Wang 2018, arXiv:1805.06530v2, thm 8)."""
    return float(
        stats.norm.cdf(mu / 2 - epsilon / mu)
        - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    )


@pytest.mark.parametrize(("sigma", "steps"), [(1.0, 1), (5.0, 40), (2.0, 3)])
def test_full_batches_give_the_exact_gaussian_curve(sigma: float, steps: int) -> None:
    """At q = 1 the composition is one Gaussian with mu = sqrt(steps) / sigma: a closed form."""
    found = accounting.epsilon([mechanism(1.0, sigma, steps)], 1e-5)
    mu = math.sqrt(steps) / sigma
    assert gaussian_delta(found, mu) <= 1e-5 * (1 + 1e-9)
    assert gaussian_delta(found * 0.998, mu) > 1e-5


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "delta", "published"),
    [
        # Abadi et al. 2016 (arXiv:1607.00133v2), section 5.1, moments accountant: eps 1.26 for
        # q = 0.01, sigma = 4, 10,000 steps, delta = 1e-5. PLD may be lower, never higher.
        (0.01, 4.0, 10_000, 1e-5, 1.26),
        # Bu et al. 2020 (arXiv:1911.11607v3), figure 4, moments accountant.
        (256 / 60_000, 1.3, 4_688, 1e-5, 1.34),
        (256 / 60_000, 0.7, 16_407, 1e-5, 8.68),
    ],
)
def test_published_figures_are_upper_bounds(
    q: float, sigma: float, steps: int, delta: float, published: float
) -> None:
    found = accounting.epsilon([mechanism(q, sigma, steps)], delta)
    assert 0.74 * published < found <= published


def test_rdp_gives_the_figures_that_tensorflow_privacy_prints() -> None:
    """compute_dp_sgd_privacy_test.py of TensorFlow Privacy 0.8: 60,000 records in batches of 150,
    sigma = 1.3, 15 epochs; 100,000 in batches of 100, sigma = 1, 30 epochs."""
    assert accounting.epsilon_rdp([mechanism(0.0025, 1.3, 6_000)], 1e-5) == pytest.approx(
        0.7242234026109595
    )
    assert accounting.epsilon_rdp([mechanism(0.001, 1.0, 30_000)], 1e-7) == pytest.approx(
        1.4154988495444842
    )


MIXED = [
    mechanism(float(q), float(sigma), 10)
    for q, sigma in zip(np.linspace(0.05, 0.06, 10), np.linspace(1.6, 1.8, 10), strict=True)
]


@pytest.mark.parametrize(
    ("relation", "history", "epsilon", "published"),
    [
        # Koskela, Jalko, Honkela's fourier-accountant 0.12 (arXiv:1906.03049v3), the values that
        # its own tests expect: it neither rounds up nor knows of dominating pairs.
        (Relation.ADD_OR_REMOVE, [mechanism(0.01, 2.0, 10_000)], 1.0, 0.010224911),
        (Relation.ADD_OR_REMOVE, [mechanism(0.01, 1.0, 10_000)], 1.0, 0.239176395),
        (Relation.ADD_OR_REMOVE, [mechanism(0.02, 2.0, 10_000)], 1.0, 0.149917330),
        (Relation.REPLACE, [mechanism(0.01, 2.0, 10_000)], 1.0, 0.128209386),
        (Relation.REPLACE, [mechanism(0.01, 1.0, 10_000)], 1.0, 0.556809673),
        (Relation.REPLACE, [mechanism(0.02, 2.0, 10_000)], 1.0, 0.511311882),
        (Relation.ADD_OR_REMOVE, MIXED, 1.0, 0.000782401),
        (Relation.REPLACE, MIXED, 1.0, 0.026891239),
    ],
)
def test_delta_agrees_with_the_fourier_accountant(
    relation: Relation, history: list[Mechanism], epsilon: float, published: float
) -> None:
    found = accounting.delta(history, epsilon, relation=relation, grid=2e-4)
    assert published * (1 - 2e-4) <= found <= published * 1.003


@pytest.mark.parametrize(
    ("relation", "published"),
    [(Relation.ADD_OR_REMOVE, 0.9658229985), (Relation.REPLACE, 1.8493437502)],
)
def test_epsilon_agrees_with_the_fourier_accountant(relation: Relation, published: float) -> None:
    found = accounting.epsilon(MIXED, 1e-3, relation=relation, grid=2e-4)
    assert published <= found <= published * 1.0005


def random_history(seed: int) -> list[Mechanism]:
    """What up to four runs with settings of their own leave in the books, an entry a round."""
    rng = np.random.default_rng(seed)
    history = []
    for _ in range(int(rng.integers(1, 5))):
        q, sigma = float(rng.uniform(0.01, 0.6)), float(rng.uniform(1.2, 4))
        rounds = int(rng.integers(1, 12))
        history += [mechanism(q, sigma, int(rng.integers(1, 8)))] * rounds
    return history


def written_out(history: list[Mechanism], delta: float, grid: float) -> float:
    """epsilon as dp-accounting's documentation says, an event after the other."""
    other = PLDAccountant(value_discretization_interval=grid)
    for m in history:
        event = PoissonSampledDpEvent(m.sample_rate, GaussianDpEvent(m.noise_multiplier))
        other.compose(ComposedDpEvent([SelfComposedDpEvent(event, m.steps)]))
    return float(other.get_epsilon(delta))


def by_kind(history: list[Mechanism]) -> list[Mechanism]:
    """dp-accounting takes seconds for an entry a round."""
    return [replace(m, steps=m.steps * history.count(m)) for m in dict.fromkeys(history)]


HISTORIES = pytest.mark.parametrize(
    "seeds", [range(20), pytest.param(range(20, 200), marks=pytest.mark.slow)], ids=["few", "all"]
)


@HISTORIES
def test_two_hundred_random_histories_agree_with_dp_accounting_written_out(seeds: range) -> None:
    """On one grid, where the rest is the order in which floating-point sums are taken."""
    for seed in seeds:
        history = random_history(seed)
        expected = written_out(by_kind(history), 1e-5, accounting.CALIBRATION_GRID)
        found = accounting.epsilon(history, 1e-5, grid=accounting.CALIBRATION_GRID)
        assert found == pytest.approx(expected, rel=1e-9), f"seed {seed}"


@pytest.mark.slow
def test_random_histories_agree_with_opacus() -> None:
    """Both RDP accounts stand above the statement, and differ by the orders that they try."""
    for seed in range(0, 200, 4):
        history = random_history(seed)
        opacus = accounting.epsilon_opacus(history, 1e-5)
        statement = accounting.epsilon(history, 1e-5, grid=accounting.CALIBRATION_GRID)
        assert 0.65 * opacus <= statement <= opacus, f"seed {seed}"
        assert opacus == pytest.approx(accounting.epsilon_rdp(history, 1e-5), rel=0.03)


@pytest.mark.slow
def test_random_histories_lie_between_bounds_that_owe_dp_accounting_nothing() -> None:
    for seed in range(0, 200, 4):
        history = random_history(seed)
        low, high = second.bounds(merged(history), 1e-5)
        found = accounting.epsilon(history, 1e-5, grid=accounting.CALIBRATION_GRID)
        assert low <= found <= 1.01 * high, f"seed {seed}"


def test_opacus_fed_step_by_step_agrees() -> None:
    """Its accountant object, as its engine uses it: a step after the other, settings changing."""
    from opacus.accountants import RDPAccountant

    history = [mechanism(0.25, 1.7, 40), mechanism(0.05, 1.1, 60), mechanism(0.25, 1.7, 20)]
    other = RDPAccountant()
    for m in history:
        for _ in range(m.steps):
            other.step(noise_multiplier=m.noise_multiplier, sample_rate=m.sample_rate)
    assert accounting.epsilon_opacus(history, 1e-5) == pytest.approx(other.get_epsilon(1e-5))


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_agree_with_dp_accounting_entry_by_entry(seed: int) -> None:
    history = random_history(seed)
    expected = written_out(history, 1e-6, accounting.CALIBRATION_GRID)
    found = accounting.epsilon(history, 1e-6, grid=accounting.CALIBRATION_GRID)
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_random_history_agrees_with_dp_accounting_on_the_fine_grid() -> None:
    history = [mechanism(0.3, 1.4, 25), mechanism(0.07, 0.9, 40)]
    expected = written_out(history, 1e-5, accounting.STATEMENT_GRID)
    assert accounting.epsilon(history, 1e-5) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.25, 1.6, 80), (0.02, 0.9, 500)])
def test_checks_stand_above_the_statement(q: float, sigma: float, steps: int) -> None:
    one = [mechanism(q, sigma, steps)]
    statement = accounting.epsilon(one, 1e-5)
    assert statement <= accounting.epsilon_rdp(one, 1e-5) <= 1.25 * statement
    assert accounting.epsilon_opacus(one, 1e-5) == pytest.approx(
        accounting.epsilon_rdp(one, 1e-5), rel=0.01
    )


def test_epsilon_is_not_below_what_a_test_of_one_step_shows() -> None:
    """One step's true trade-off by quadrature: P = (1-q) N(0) + q N(1) against Q = N(0)."""
    q, sigma, delta = 0.3, 0.8, 1e-5
    x = np.linspace(-12, 13, 400_001)
    null = stats.norm.pdf(x, 0, sigma)
    other = (1 - q) * null + q * stats.norm.pdf(x, 1, sigma)

    def largest_delta(eps: float) -> float:
        return max(
            float(np.trapezoid(np.clip(a - math.exp(eps) * b, 0, None), x))
            for a, b in ((other, null), (null, other))
        )

    found = accounting.epsilon([mechanism(q, sigma, 1)], delta)
    assert largest_delta(found) <= delta * 1.0001
    assert largest_delta(found - 0.01) > delta


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float, cell: float) -> float:
    """The larger delta of both directions, of two densities on a lattice."""
    return max(
        float(np.clip(a - math.exp(epsilon) * b, 0, None).sum() * cell) for a, b in ((p, q), (q, p))
    )


def densities(q: float, sigma: float, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    null = stats.norm.pdf(x, 0, sigma)
    return (1 - q) * null + q * stats.norm.pdf(x, 1, sigma), null


@pytest.mark.parametrize(("first", "second"), [((0.3, 0.8), (0.3, 0.8)), ((0.5, 1.0), (0.1, 0.7))])
def test_delta_of_two_steps_is_that_of_a_quadrature_of_both(
    first: tuple[float, float], second: tuple[float, float]
) -> None:
    x = np.linspace(-9, 10, 2401)
    (p1, q1), (p2, q2) = densities(*first, x), densities(*second, x)
    cell = (x[1] - x[0]) ** 2
    history = [mechanism(*first, 1), mechanism(*second, 1)]
    for epsilon in (0.0, 0.5, 2.0, 5.0):
        exact = hockey_stick(np.outer(p1, p2), np.outer(q1, q2), epsilon, cell)
        found = accounting.delta(history, epsilon)
        assert exact * (1 - 1e-6) <= found <= exact * (1 + 1e-3)
        swapped = max(  # what forgets one direction is too low: the reverse pair counts
            float(np.clip(np.outer(q1, q2) - math.exp(epsilon) * np.outer(p1, p2), 0, None).sum())
            * cell,
            0.0,
        )
        assert swapped <= found


@pytest.mark.parametrize("seed", range(6))
def test_no_two_units_are_told_apart_better_than_replace_one_says(seed: int) -> None:
    """One step, a unit of gradient g replaced by one of gradient h, any g and h in the unit disc:
    densities on a plane. (On a line, g = 1 against h = -1 is the pair that is composed.)"""
    rng = np.random.default_rng(seed)
    q, sigma = float(rng.uniform(0.05, 0.95)), float(rng.uniform(0.6, 2))
    axis = np.linspace(-1 - 7 * sigma, 1 + 7 * sigma, 501)
    x, y = np.meshgrid(axis, axis)

    def density(center: np.ndarray) -> np.ndarray:
        return stats.norm.pdf(x, center[0], sigma) * stats.norm.pdf(y, center[1], sigma)

    g, h = (v / max(np.linalg.norm(v), 1) for v in rng.normal(0, 1.5, (2, 2)))
    cell = (axis[1] - axis[0]) ** 2
    none = density(np.zeros(2))
    p, r = ((1 - q) * none + q * density(v) for v in (g, h))
    worst, other = ((1 - q) * none + q * density(np.array(v)) for v in ([1.0, 0], [-1.0, 0]))
    for epsilon in (0.0, 0.3, 1.0, 2.5):
        allowed = accounting.delta([mechanism(q, sigma, 1)], epsilon, relation=Relation.REPLACE)
        assert hockey_stick(p, r, epsilon, cell) <= allowed * (1 + 1e-4) + 1e-12
        reached = hockey_stick(worst, other, epsilon, cell)
        assert reached == pytest.approx(allowed, rel=2e-3, abs=1e-9)


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.25, 1.7, 40), (0.02, 0.8, 300), (1.0, 4, 9)])
def test_replace_one_costs_at_least_add_or_remove_one(q: float, sigma: float, steps: int) -> None:
    history = [mechanism(q, sigma, steps)]
    one = accounting.epsilon(history, 1e-5, grid=1e-3)
    assert one < accounting.epsilon(history, 1e-5, grid=1e-3, relation=Relation.REPLACE)


def test_replace_one_at_full_batches_is_a_gaussian_of_twice_the_sensitivity() -> None:
    found = accounting.epsilon([mechanism(1.0, 5.0, 10)], 1e-5, relation=Relation.REPLACE)
    mu = 2 * math.sqrt(10) / 5
    assert gaussian_delta(found, mu) == pytest.approx(1e-5, rel=1e-6)


def test_replace_one_near_full_batches_is_near_it() -> None:
    """The grid's way, as there is no closed form at q < 1."""
    history = [mechanism(1 - 1e-9, 5.0, 10)]
    found = accounting.epsilon(history, 1e-5, relation=Relation.REPLACE)
    assert gaussian_delta(found, 2 * math.sqrt(10) / 5) == pytest.approx(1e-5, rel=1e-3)


def losses(history: list[Mechanism], size: int, seed: int) -> np.ndarray:
    """Draws of the privacy loss of all of `history`, the unit being there."""
    rng = np.random.default_rng(seed)
    total = np.zeros(size)
    for m in history:
        q, sigma = m.sample_rate, m.noise_multiplier
        for _ in range(m.steps):
            x = rng.normal(0, sigma, size) + (rng.random(size) < q)
            total += np.log1p(q * np.expm1((2 * x - 1) / (2 * sigma**2)))
    return total


def test_delta_is_not_below_what_drawn_losses_show() -> None:
    """A lower bound on delta that fails by chance once in 10^6, Hoeffding: the mean of
    (1 - exp(eps - L))_+ less sqrt(log(10^6) / 2n). An account of 5 % more noise is caught."""
    history = [mechanism(0.3, 1.0, 12), mechanism(0.15, 1.5, 15)]
    draws = losses(history, 200_000, seed=5)
    slack = math.sqrt(math.log(1e6) / (2 * len(draws)))
    caught = 0
    for epsilon in (0.5, 1.0, 2.0):
        certain = float(np.clip(-np.expm1(epsilon - draws), 0, None).mean()) - slack
        found = accounting.delta(history, epsilon, grid=1e-3)
        assert certain <= found <= certain + 2.5 * slack
        noisier = [mechanism(m.sample_rate, m.noise_multiplier * 1.05, m.steps) for m in history]
        caught += accounting.delta(noisier, epsilon, grid=1e-3) < certain
    assert caught == 3


@pytest.mark.parametrize("relation", list(Relation))
def test_delta_and_epsilon_undo_each_other(relation: Relation) -> None:
    history = [mechanism(0.2, 1.1, 30), mechanism(0.05, 0.8, 7)]
    for target in (1e-3, 1e-6):
        epsilon = accounting.epsilon(history, target, grid=1e-3, relation=relation)
        found = accounting.delta(history, epsilon, grid=1e-3, relation=relation)
        assert found == pytest.approx(target, rel=1e-6)


def test_curve_is_delta_at_each_point() -> None:
    history = [mechanism(0.2, 1.1, 30)]
    epsilons = [0.0, 0.4, 1.0, 3.0]
    points = accounting.curve(history, epsilons, grid=1e-3)
    assert points == pytest.approx([accounting.delta(history, e, grid=1e-3) for e in epsilons])
    assert accounting.curve([], epsilons) == (0.0,) * 4


def test_statement_lies_between_the_checks_from_both_sides() -> None:
    history = [mechanism(0.25, 1.6, 60), mechanism(0.4, 2.0, 20)]
    below, found = accounting.epsilon_below(history, 1e-5), accounting.epsilon(history, 1e-5)
    assert 0.998 * found <= below < 0.9999 * found
    assert accounting.epsilon_below([], 1e-5) == 0.0
    full = [mechanism(1.0, 2.0, 3)]
    assert accounting.epsilon_below(full, 1e-5) == pytest.approx(accounting.epsilon(full, 1e-5))


def test_mechanisms_of_two_units_are_not_one_account() -> None:
    other = Mechanism(
        unit=Unit.SUBJECT, sample_rate=0.1, noise_multiplier=1.0, clip_norm=1.0, steps=1
    )
    with pytest.raises(PrivacyError, match="record, subject"):
        accounting.epsilon([mechanism(0.1, 1.0, 1), other], 1e-5)


def test_a_hundred_thousand_entries_are_one_kind() -> None:
    entries = [mechanism(0.001, 1.0, 1)] * 100_000
    one = accounting.epsilon([mechanism(0.001, 1.0, 100_000)], 1e-5, grid=1e-3)
    assert accounting.epsilon(entries, 1e-5, grid=1e-3) == one


def test_hundreds_of_kinds_are_rounded_to_few_that_cost_no_less() -> None:
    rng = np.random.default_rng(0)
    kinds = merged(
        [mechanism(float(rng.uniform(0.1, 0.2)), float(rng.uniform(2, 3)), 1) for _ in range(200)]
    )
    few = composition.fewer(kinds)
    assert len(few) <= composition.MOST_KINDS < len(kinds)
    assert sum(steps for _, _, steps in few) == 200
    exact, rounded = second.bounds(kinds, 1e-5), second.bounds(few, 1e-5)
    assert exact[1] <= rounded[1] <= 1.15 * exact[1]


def test_few_kinds_are_left_as_they_are() -> None:
    kinds = merged([mechanism(0.1 + k / 1000, 1.0, 1) for k in range(composition.MOST_KINDS)])
    assert composition.fewer(kinds) == kinds


@pytest.mark.parametrize(
    ("q", "sigma", "steps", "grid"),
    [
        (0.5, 1.0, 20_000, 1e-4),  # a coarser grid
        (0.5, 0.5, 2_000, 1e-8),  # no grid at all: RDP
        (0.9, 0.4, 2_000, 1e-8),  # no grid at all: as if every batch were full
    ],
)
def test_what_no_grid_holds_is_answered_from_above(
    q: float, sigma: float, steps: int, grid: float
) -> None:
    found = accounting.epsilon([mechanism(q, sigma, steps)], 1e-5, grid=grid)
    assert second.bounds([(q, sigma, steps)], 1e-5)[0] <= found
    assert found <= accounting.epsilon([mechanism(1.0, sigma, steps)], 1e-5) < math.inf
    delta = accounting.delta([mechanism(q, sigma, steps)], found * 0.99, grid=grid)
    assert second.delta_bounds([(q, sigma, steps)], found * 0.99)[0] <= delta <= 1


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.3, 0.4, 10**6), (0.5, 0.02, 1_000)])
def test_absurd_histories_have_an_answer(q: float, sigma: float, steps: int) -> None:
    full = accounting.epsilon([mechanism(1.0, sigma, steps)], 1e-5)
    assert 0 < accounting.epsilon([mechanism(q, sigma, steps)], 1e-5) <= full < math.inf


def test_millions_of_steps_are_composed_in_batches() -> None:
    whole = accounting.epsilon([mechanism(1e-4, 1.0, 250_000)], 1e-5, grid=1e-3)
    event = SelfComposedDpEvent(PoissonSampledDpEvent(1e-4, GaussianDpEvent(1.0)), 250_000)
    other = PLDAccountant(value_discretization_interval=1e-3)
    other.compose(event)
    assert whole == pytest.approx(other.get_epsilon(1e-5), rel=1e-6)


def test_composition_over_rounds_is_not_the_last_round() -> None:
    rounds = [mechanism(0.25, 1.5, 4)] * 20
    whole = accounting.epsilon(rounds, 1e-5)
    assert whole == pytest.approx(accounting.epsilon([mechanism(0.25, 1.5, 80)], 1e-5))
    assert whole > 2 * accounting.epsilon(rounds[-1:], 1e-5)


def test_order_of_events_does_not_matter() -> None:
    a, b = mechanism(0.2, 1.0, 3), mechanism(0.5, 2.0, 5)
    assert accounting.epsilon([a, b, a], 1e-6) == accounting.epsilon([a, a, b], 1e-6)


def test_nothing_run_costs_nothing() -> None:
    assert accounting.epsilon([], 1e-5) == accounting.epsilon_rdp([], 1e-5) == 0.0
    assert accounting.epsilon_opacus([], 1e-5) == 0.0


@pytest.mark.parametrize(
    ("epsilon", "q", "steps"),
    [
        (8.0, 0.25, 80),
        (1.0, 0.05, 300),
        (0.1, 0.5, 5),
        pytest.param(20.0, 0.1, 40, marks=pytest.mark.slow),
    ],
)
def test_calibrated_sigma_keeps_the_promise_and_no_more(
    epsilon: float, q: float, steps: int
) -> None:
    sigma = accounting.calibrate(epsilon, 1e-5, q, steps)
    assert accounting.epsilon([mechanism(q, sigma, steps)], 1e-5) <= epsilon
    assert accounting.epsilon([mechanism(q, sigma * 0.98, steps)], 1e-5) > epsilon


def test_within_is_exact_about_one_step_more() -> None:
    sigma = accounting.calibrate(8.0, 1e-5, 0.25, 80)
    assert accounting.within([mechanism(0.25, sigma, 80)], 8.0, 1e-5)
    assert not accounting.within([mechanism(0.25, sigma, 81)], 8.0, 1e-5)


@pytest.mark.parametrize(
    ("epsilon", "q", "sigma"), [(8.0, 0.25, 1.7), (1.0, 0.01, 1.0), (3.0, 1.0, 20.0)]
)
def test_most_steps_are_within_and_one_more_is_not(epsilon: float, q: float, sigma: float) -> None:
    steps = accounting.most_steps(epsilon, 1e-5, q, sigma)
    assert accounting.within([mechanism(q, sigma, steps)], epsilon, 1e-5)
    assert not accounting.within([mechanism(q, sigma, steps + 1)], epsilon, 1e-5)


def test_most_steps_stop_at_their_limit() -> None:
    assert accounting.most_steps(8.0, 1e-5, 1e-5, 5.0) == accounting.MOST_STEPS


def test_most_steps_where_one_is_too_much_is_an_error() -> None:
    with pytest.raises(PrivacyError, match="one step"):
        accounting.most_steps(0.1, 1e-5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("epsilon", "sigma", "steps"), [(8.0, 1.7, 160), (1.0, 1.0, 500), (0.05, 2.0, 3)]
)
def test_largest_rate_is_within_and_a_larger_one_is_not(
    epsilon: float, sigma: float, steps: int
) -> None:
    rate = accounting.largest_rate(epsilon, 1e-5, sigma, steps)
    assert accounting.within([mechanism(rate, sigma, steps)], epsilon, 1e-5)
    assert not accounting.within([mechanism(rate * 1.003, sigma, steps)], epsilon, 1e-5)


def test_largest_rate_is_all_where_all_is_allowed() -> None:
    assert accounting.largest_rate(8.0, 1e-5, 10.0, 5) == 1.0


def test_no_rate_is_allowed_with_next_to_no_noise() -> None:
    with pytest.raises(PrivacyError, match="no sample rate"):
        accounting.largest_rate(1.0, 1e-5, 0.1, 5)


@given(
    q=st.floats(0.005, 0.5),
    sigma=st.floats(1.0, 4.0),
    steps=st.integers(1, 60),
    delta=st.sampled_from([1e-3, 1e-5, 1e-7]),
)
@settings(deadline=None, max_examples=25)
def test_more_noise_fewer_steps_and_smaller_rates_cost_less(
    q: float, sigma: float, steps: int, delta: float
) -> None:
    def cost(*of: float) -> float:
        return accounting.epsilon([mechanism(of[0], of[1], int(of[2]))], delta, grid=2e-3)

    most = cost(q, sigma, steps) * (1 + 1e-9) + 1e-9
    assert cost(q, sigma * 1.1, steps) <= most
    assert cost(q * 0.9, sigma, steps) <= most
    assert steps == 1 or cost(q, sigma, steps - 1) <= most


def test_plan_refuses_a_sigma_that_breaks_the_promise() -> None:
    with pytest.raises(PrivacyError, match="does not keep epsilon"):
        plan(PrivacyConfig(noise_multiplier=0.5), steps=80)


@pytest.mark.parametrize(
    ("q", "sigma", "steps"), [(1.0, 1e-9, 1_000_000), (1.0, 0.31, 1_000_000), (1.0, 0.2, 1)]
)
def test_absurd_requests_are_answered_with_no(q: float, sigma: float, steps: int) -> None:
    assert not accounting.within([mechanism(q, sigma, steps)], 8.0, 1e-5)


def test_plan_of_no_unit_promises_nothing() -> None:
    assert plan(PrivacyConfig(unit="none"), steps=80) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sample_rate", 0.0),
        ("sample_rate", 1.5),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", math.nan),
        ("clip_norm", math.inf),
        ("steps", 0),
    ],
)
def test_mechanism_out_of_range_is_refused(field: str, value: float) -> None:
    good = {"sample_rate": 0.1, "noise_multiplier": 1.0, "clip_norm": 1.0, "steps": 1}
    with pytest.raises(PrivacyError, match=field):
        Mechanism(unit=Unit.RECORD, **(good | {field: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0])
def test_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        accounting.epsilon([mechanism(0.1, 1.0, 1)], delta)


@pytest.mark.parametrize("epsilon", [-0.1, math.nan, math.inf])
def test_epsilon_out_of_range_is_refused(epsilon: float) -> None:
    with pytest.raises(PrivacyError, match="epsilon"):
        accounting.delta([mechanism(0.1, 1.0, 1)], epsilon)


def test_books_open_without_torch() -> None:
    code = (
        "import sys; from fedfuse.privacy.accounting import epsilon; from fedfuse.privacy.spec "
        "import *; epsilon([Mechanism(unit=Unit.RECORD, sample_rate=.1, noise_multiplier=1., "
        "clip_norm=1., steps=2)], 1e-5, grid=1e-3); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
