"""The second accountant's bounds hold, are close, and owe nothing to the first."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedfuse.errors import PrivacyError
from fedfuse.privacy import accounting, second
from fedfuse.privacy.spec import Mechanism, Unit

Counts = list[tuple[float, float, int]]


def history(counts: Counts) -> list[Mechanism]:
    return [
        Mechanism(
            unit=Unit.RECORD, sample_rate=q, noise_multiplier=sigma, clip_norm=1.0, steps=steps
        )
        for q, sigma, steps in counts
    ]


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Balle and Wang 2018 (arXiv:1805.06530v2), theorem 8."""
    return float(
        stats.norm.cdf(mu / 2 - epsilon / mu)
        - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    )


TABLE: list[tuple[Counts, float]] = [
    ([(0.25, 1.7, 160)], 1e-5),
    ([(0.01, 1.0, 10_000)], 1e-5),
    ([(0.25, 1.7, 160), (0.1, 1.0, 300), (0.5, 3.0, 40)], 1e-5),
    ([(0.5, 0.6, 12), (1.0, 6.0, 20)], 1e-6),
    ([(0.02, 0.9, 500)], 1e-9),
    ([(0.3, 0.8, 1)], 1e-4),
    ([(0.9, 4.0, 30)], 1e-3),
    ([(0.05, 2.0, 2_000)], 0.05),
]


@pytest.mark.parametrize(("counts", "delta"), TABLE)
def test_bounds_are_close_and_hold_the_statement(counts: Counts, delta: float) -> None:
    low, high = second.bounds(counts, delta)
    statement = accounting.epsilon(history(counts), delta)
    assert 0 < low < high <= low * 1.001
    assert low <= statement <= high * 1.001


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"),
    [(1.0, 1, 1e-5), (5.0, 40, 1e-10), (2.0, 3, 0.3), (0.3, 1, 1e-5), (10.0, 1000, 1e-12)],
)
def test_bounds_hold_the_exact_epsilon_of_full_batches(
    sigma: float, steps: int, delta: float
) -> None:
    """delta falls in epsilon, so the exact epsilon lies between where it is above and below."""
    low, high = second.bounds([(1.0, sigma, steps)], delta)
    mu = math.sqrt(steps) / sigma
    assert gaussian_delta(low, mu) >= delta >= gaussian_delta(high, mu)
    assert high <= low * 1.001


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0, 4.0])
def test_delta_bounds_hold_the_exact_delta_of_full_batches(epsilon: float) -> None:
    low, high = second.delta_bounds([(1.0, 2.0, 3)], epsilon)
    exact = gaussian_delta(epsilon, math.sqrt(3) / 2)
    assert low <= exact <= high <= 1.02 * low


@pytest.mark.parametrize("counts", [[(0.3, 0.8, 2)], [(0.5, 1.0, 1), (0.1, 0.7, 1)]])
def test_delta_bounds_hold_a_quadrature_of_both_steps(counts: Counts) -> None:
    (q1, s1, _), (q2, s2, _) = (counts * 2)[:2]
    x = np.linspace(-9, 10, 2401)
    null = np.outer(stats.norm.pdf(x, 0, s1), stats.norm.pdf(x, 0, s2))
    there = np.outer(
        (1 - q1) * stats.norm.pdf(x, 0, s1) + q1 * stats.norm.pdf(x, 1, s1),
        (1 - q2) * stats.norm.pdf(x, 0, s2) + q2 * stats.norm.pdf(x, 1, s2),
    )
    cell = (x[1] - x[0]) ** 2
    for epsilon in (0.0, 0.3, 2.0, 5.0):
        exact = max(
            float(np.clip(a - math.exp(epsilon) * b, 0, None).sum() * cell)
            for a, b in ((there, null), (null, there))
        )
        low, high = second.delta_bounds(counts, epsilon)
        assert low <= exact * (1 + 1e-6)
        assert exact * (1 - 1e-6) <= high <= 1.03 * exact


def test_each_direction_is_bounded_by_itself() -> None:
    """The bounds on the loss of adding a unit, where it is the smaller one, hold a quadrature."""
    q, sigma, epsilon = 0.4, 0.9, 0.2
    x = np.linspace(-10, 11, 400_001)
    null = stats.norm.pdf(x, 0, sigma)
    there = (1 - q) * null + q * stats.norm.pdf(x, 1, sigma)
    for side, (p, r) in {1: (there, null), -1: (null, there)}.items():
        exact = float(np.trapezoid(np.clip(p - math.exp(epsilon) * r, 0, None), x))
        plan = second._plan([(q, sigma, 1)], side, epsilon=epsilon)
        low, high = second._compose([(q, sigma, 1)], side, plan).deltas(epsilon)
        assert low <= exact <= high <= 1.01 * exact
        assert low >= 0.9 * exact


def test_coarse_grids_widen_the_bounds_and_do_not_break_them() -> None:
    """The proof does not ask for a fine grid: at 3, 10 and 30 times the planned width the exact
    epsilon still lies between."""
    counts: Counts = [(1.0, 6.0, 60)]
    mu, delta, widths = math.sqrt(60) / 6, 1e-5, []
    plan = second._plan(counts, 1, delta=delta)
    for factor in (1, 3, 10, 30):
        wider = replace(plan, width=plan.width * factor)
        low, high = second._compose(counts, 1, wider).epsilons(delta)
        assert gaussian_delta(low, mu) >= delta >= gaussian_delta(high, mu)
        widths.append(high - low)
    assert widths == sorted(widths)
    assert widths[-1] > 5 * widths[0]


def test_a_narrow_window_widens_the_bounds_and_does_not_break_them() -> None:
    """What leaves the window of the FFT comes back in at the other end: it is bounded."""
    counts: Counts = [(1.0, 6.0, 60)]
    mu, delta = math.sqrt(60) / 6, 1e-5
    plan = second._plan(counts, 1, delta=delta)
    for share in (0.6, 0.4):
        half = (plan.high - plan.low) / 2 * share
        narrow = replace(plan, low=plan.mean - half, high=plan.mean + half)
        low, high = second._compose(counts, 1, narrow).epsilons(delta)
        assert gaussian_delta(low, mu) >= delta >= gaussian_delta(high, mu)


def test_a_short_grid_widens_the_bounds_and_does_not_break_them() -> None:
    """A step's loss beyond the grid is counted as a break of privacy."""
    counts: Counts = [(1.0, 6.0, 60)]
    mu, delta = math.sqrt(60) / 6, 1e-5
    plan = second._plan(counts, 1, delta=delta)
    for tail in (1e-9, 1e-8, 3e-8):
        low, high = second._compose(counts, 1, replace(plan, tail=tail)).epsilons(delta)
        assert gaussian_delta(low, mu) >= delta >= gaussian_delta(high, mu)


def test_both_directions_are_asked_and_the_larger_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def epsilons(self: second._Composed, delta: float) -> tuple[float, float]:
        asked[len(asked)] = self
        return (2.0, 2.0001) if len(asked) == 2 else (1.0, 1.0001)

    monkeypatch.setattr(second._Composed, "epsilons", epsilons)
    low, high = second.bounds([(0.3, 1.0, 5)], 1e-5)
    assert len(asked) == 2
    assert asked[0].losses[-1] > asked[1].losses[-1]  # what is added shows less
    assert (low, high) == pytest.approx((2.0, 2.0001), rel=1e-5)


@given(
    counts=st.lists(
        st.tuples(st.floats(1e-3, 1.0), st.floats(0.4, 10.0), st.integers(1, 500)),
        min_size=1,
        max_size=3,
    ),
    delta=st.sampled_from([1e-2, 1e-5, 1e-8]),
)
@settings(deadline=None, max_examples=30)
def test_lower_bound_is_never_above_the_first_accountants_upper_bound(
    counts: Counts, delta: float
) -> None:
    low, high = second.bounds(counts, delta)
    assert 0 <= low <= high < math.inf
    assert low <= accounting.epsilon(history(counts), delta, grid=2e-3)


@given(q=st.floats(0.01, 1.0), sigma=st.floats(0.6, 5.0), steps=st.integers(1, 500))
@settings(deadline=None, max_examples=15)
def test_bounds_of_epsilon_and_of_delta_agree(q: float, sigma: float, steps: int) -> None:
    counts = [(q, sigma, steps)]
    low, high = second.bounds(counts, 1e-5)
    assert second.delta_bounds(counts, high)[0] <= 1e-5 * (1 + 1e-6)
    assert second.delta_bounds(counts, low)[1] >= 1e-5 * (1 - 1e-6) or low == 0


def test_bounds_of_nothing_are_zero() -> None:
    assert second.bounds([], 1e-5) == (0.0, 0.0)
    assert second.delta_bounds([], 0.0) == (0.0, 0.0)


def test_a_delta_that_costs_nothing_gives_zero() -> None:
    low, high = second.bounds([(0.001, 5.0, 100)], 1e-3)
    assert low == high == 0.0


def test_order_and_splitting_of_counts_do_not_matter() -> None:
    one = second.bounds([(0.2, 1.0, 30), (0.1, 2.0, 5)], 1e-6)
    other = second.bounds([(0.1, 2.0, 5), (0.2, 1.0, 10), (0.2, 1.0, 20)], 1e-6)
    assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize(
    "count", [(0.0, 1.0, 1), (1.1, 1.0, 1), (0.5, 0.05, 1), (0.5, math.inf, 1), (0.5, 1.0, 0)]
)
def test_what_cannot_be_accounted_for_is_refused(count: tuple[float, float, int]) -> None:
    with pytest.raises(PrivacyError, match="cannot be accounted for"):
        second.bounds([count], 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_delta_out_of_range_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        second.bounds([(0.5, 1.0, 1)], delta)


def test_second_needs_neither_torch_nor_dp_accounting() -> None:
    code = (
        "import sys; from fedfuse.privacy.second import bounds; bounds([(0.25, 1.7, 160)], 1e-5);"
        "sys.exit(any(name in sys.modules for name in ('torch', 'dp_accounting', 'opacus')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("epsilon", [0.0, 1.5, 4.0])
def test_quicker_bounds_on_delta_are_wider_and_hold(epsilon: float) -> None:
    counts = [(0.05, 0.9, 20), (0.25, 1.5, 12)]
    low, high = second.delta_bounds(counts, epsilon)
    wider = second.delta_bounds(counts, epsilon, tolerance=1e-3)
    assert wider[0] <= high
    assert low <= wider[1]
    assert wider[1] - wider[0] > high - low
