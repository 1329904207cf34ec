"""epsilon agrees with what others compute, composes, and is never below what is certain."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant
from scipy import stats

from fedfuse.errors import PrivacyError
from fedfuse.privacy import accounting
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
    ],
)
def test_published_figures_are_upper_bounds(
    q: float, sigma: float, steps: int, delta: float, published: float
) -> None:
    found = accounting.epsilon([mechanism(q, sigma, steps)], delta)
    assert 0.75 * published < found <= published


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_agree_with_dp_accounting_written_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    history = [
        mechanism(
            float(rng.uniform(0.01, 0.6)), float(rng.uniform(0.8, 3)), int(rng.integers(1, 20))
        )
        for _ in range(int(rng.integers(1, 4)))
    ]
    other = PLDAccountant(value_discretization_interval=1e-3)
    for m in history:
        event = PoissonSampledDpEvent(m.sample_rate, GaussianDpEvent(m.noise_multiplier))
        other.compose(ComposedDpEvent([SelfComposedDpEvent(event, m.steps)]))
    expected = other.get_epsilon(1e-5)
    assert accounting.epsilon(history, 1e-5, grid=1e-3) == pytest.approx(expected, rel=1e-6)


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
    ("epsilon", "q", "steps"), [(8.0, 0.25, 80), (1.0, 0.05, 300), (0.1, 0.5, 5), (20.0, 0.1, 40)]
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


def test_books_open_without_torch() -> None:
    code = (
        "import sys; from fedfuse.privacy.accounting import epsilon; from fedfuse.privacy.spec "
        "import *; epsilon([Mechanism(unit=Unit.RECORD, sample_rate=.1, noise_multiplier=1., "
        "clip_norm=1., steps=2)], 1e-5, grid=1e-3); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
