"""The curve is delta at every epsilon, and its summaries promise no more than it does."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedfuse.errors import PrivacyError
from fedfuse.privacy import accounting
from fedfuse.privacy.profile import (
    LEAST_DELTA,
    Profile,
    _dominates,
    advantage,
    gdp_mu,
    profile,
    true_positives,
)
from fedfuse.privacy.spec import Mechanism, Unit


def mechanism(q: float, sigma: float, steps: int) -> Mechanism:
    return Mechanism(
        unit=Unit.RECORD, sample_rate=q, noise_multiplier=sigma, clip_norm=1.0, steps=steps
    )


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Dong, Roth, Su 2022 (arXiv:1905.02383v3), corollary 2.13."""
    return float(
        stats.norm.cdf(mu / 2 - epsilon / mu)
        - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
    )


FULL = [mechanism(1.0, 5.0, 40)]
FULL_MU = math.sqrt(40) / 5
SAMPLED = [mechanism(0.25, 1.7, 40), mechanism(0.1, 1.0, 60)]
GRID = 1e-3


def test_profile_falls_from_epsilon_zero_to_the_least_delta() -> None:
    curve = profile(SAMPLED, grid=GRID)
    assert curve.epsilons[0] == 0.0
    assert np.all(np.diff(curve.epsilons) > 0)
    assert np.all(np.diff(curve.deltas) <= 0)
    assert 0.1 < curve.deltas[0] < 1
    assert curve.deltas[-1] == pytest.approx(LEAST_DELTA, rel=1e-4)


def test_profile_is_delta_at_each_of_its_points() -> None:
    curve = profile(SAMPLED, grid=GRID)
    for k in range(0, len(curve.epsilons), 50):
        found = accounting.delta(SAMPLED, curve.epsilons[k], grid=GRID)
        assert curve.deltas[k] == pytest.approx(found, rel=1e-6)


def test_profile_of_full_batches_is_the_gaussian_curve() -> None:
    curve = profile(FULL)
    for epsilon, delta in zip(curve.epsilons[::40], curve.deltas[::40], strict=True):
        assert delta == pytest.approx(gaussian_delta(epsilon, FULL_MU), rel=1e-6)


def test_profile_of_nothing_is_one_point() -> None:
    assert profile([]) == Profile((0.0,), (0.0,))
    assert gdp_mu([]) == advantage([]) == 0.0
    assert true_positives([], 0.01) == 0.01


@pytest.mark.parametrize("history", [FULL, [mechanism(1.0, 2.0, 3), mechanism(1.0, 7.0, 11)]])
def test_mu_of_full_batches_is_exact(history: list[Mechanism]) -> None:
    exact = math.sqrt(sum(m.steps / m.noise_multiplier**2 for m in history))
    assert exact <= gdp_mu(history) <= exact * (1 + 1e-9)


def test_mu_near_full_batches_is_near_exact() -> None:
    """The curve's way, which full batches do not take."""
    assert FULL_MU <= gdp_mu([mechanism(1 - 1e-9, 5.0, 40)]) <= FULL_MU * 1.0001


@pytest.mark.parametrize(
    "history", [SAMPLED, [mechanism(0.01, 0.7, 50)], [mechanism(0.5, 3.0, 200)]]
)
def test_mu_is_the_least_whose_curve_is_nowhere_below(history: list[Mechanism]) -> None:
    mu = gdp_mu(history, grid=GRID)
    most = accounting.epsilon(history, LEAST_DELTA, grid=GRID)
    epsilons = np.sort(np.random.default_rng(0).uniform(0, most, 400))
    deltas = accounting.curve(history, list(epsilons), grid=GRID)
    assert all(gaussian_delta(e, mu) >= d - 1e-15 for e, d in zip(epsilons, deltas, strict=True))
    assert any(gaussian_delta(e, 0.995 * mu) < d for e, d in zip(epsilons, deltas, strict=True))


def test_mu_is_right_between_the_points_of_the_curve_too() -> None:
    """Two points of the curve of mu = 1 allow for their chord, which is above it in between."""
    ends = Profile((0.5, 1.0), (gaussian_delta(0.5, 1.0), gaussian_delta(1.0, 1.0)))
    assert _dominates(1.1, ends)
    assert not _dominates(1.0 + 1e-9, ends)
    least = next(mu for mu in np.arange(1, 1.1, 1e-4) if _dominates(mu, ends))
    a = np.exp(np.linspace(0.5, 1.0, 10_001))
    chord = np.interp(a, a[[0, -1]], ends.deltas)

    def over(mu: float) -> float:
        return min(gaussian_delta(math.log(x), mu) - y for x, y in zip(a, chord, strict=True))

    assert over(least) >= -1e-9
    assert over(least - 2e-4) < 0


@pytest.mark.parametrize(("q", "sigma", "steps"), [(0.01, 0.7, 50), (0.25, 1.7, 40)])
def test_mu_is_above_that_of_the_central_limit_theorem(q: float, sigma: float, steps: int) -> None:
    """Bu et al. 2020 (arXiv:1911.11607v3), corollary 4: what Opacus's GDP accountant takes."""
    limit = q * math.sqrt(steps * math.expm1(sigma**-2))
    assert gdp_mu([mechanism(q, sigma, steps)], grid=GRID) > 1.02 * limit


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1, 0.5, 0.9])
def test_true_positives_of_a_gaussian_are_those_of_its_best_test(rate: float) -> None:
    """Neyman and Pearson: Phi(Phi^-1(rate) + mu)."""
    best = float(stats.norm.cdf(stats.norm.ppf(rate) + FULL_MU))
    assert best <= true_positives(FULL, rate) <= best * 1.001


def test_advantage_of_a_gaussian_is_that_of_its_best_test() -> None:
    assert advantage(FULL) == pytest.approx(2 * stats.norm.cdf(FULL_MU / 2) - 1, rel=1e-9)


def test_no_threshold_on_drawn_losses_beats_the_bound_and_the_best_comes_near() -> None:
    """The likelihood-ratio attack on drawn outputs. Each rate of 10^5 draws is off by more than
    0.009 once in 10^6 (Dvoretzky, Kiefer, Wolfowitz). An account of 25 % more noise is caught."""
    rng, size = np.random.default_rng(3), 100_000
    scores = []
    for present in (True, False):
        total = np.zeros(size)
        for m in SAMPLED:
            q, sigma = m.sample_rate, m.noise_multiplier
            for _ in range(m.steps):
                x = rng.normal(0, sigma, size) + (rng.random(size) < q) * present
                total += np.log1p(q * np.expm1((2 * x - 1) / (2 * sigma**2)))
        scores.append(np.sort(total))

    def excess(curve: Profile) -> list[float]:
        found = []
        for rate in (0.01, 0.05, 0.2, 0.5):
            threshold = scores[1][int((1 - rate) * size)]
            hits = 1 - np.searchsorted(scores[0], threshold) / size
            found.append(hits - 0.009 - true_positives(curve, rate + 0.009))
        return found

    curve = profile(SAMPLED, grid=GRID)
    assert -0.05 < max(excess(curve)) <= 0
    noisier = [mechanism(m.sample_rate, 1.25 * m.noise_multiplier, m.steps) for m in SAMPLED]
    assert max(excess(profile(noisier, grid=GRID))) > 0


CURVES = {sigma: profile([mechanism(0.3, sigma, 10)], grid=2e-3) for sigma in (0.8, 1.5, 3.0)}


@given(sigma=st.sampled_from(sorted(CURVES)), rates=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@settings(deadline=None, max_examples=200)
def test_true_positives_rise_and_are_at_most_the_advantage_above(
    sigma: float, rates: tuple[float, float]
) -> None:
    low, high = sorted(rates)
    curve = CURVES[sigma]
    below, above = true_positives(curve, low), true_positives(curve, high)
    assert below <= above <= 1
    assert high <= above <= high + advantage(curve) + 1e-12
    assert below == pytest.approx(true_positives(curve, low))


def test_nothing_is_gained_where_delta_is_zero() -> None:
    even = Profile((0.0,), (0.0,))
    assert true_positives(even, 0.3) == 0.3
    assert true_positives(Profile((math.log(2),), (0.0,)), 0.3) == pytest.approx(0.6)
    assert true_positives(Profile((math.log(2),), (0.0,)), 0.8) == pytest.approx(0.9)
    assert true_positives(Profile((0.0,), (0.1,)), 0.3) == pytest.approx(0.4)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan])
def test_false_positive_rate_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(PrivacyError, match="false_positive_rate"):
        true_positives(FULL, rate)


def test_profile_opens_without_torch() -> None:
    code = "import sys, fedfuse.privacy.profile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
