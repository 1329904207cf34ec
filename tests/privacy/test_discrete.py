"""Discrete Gaussian noise is of its law, and a sum of it costs what the books say.

False alarms: streams have fixed secrets, so each test gives the same answer every time; for a fresh
secret a bound would fail once in 100,000 runs.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedfuse.errors import PrivacyError
from fedfuse.privacy.discrete import LEAST_SIGMA, MOST_SIGMA, deviation, discrete_gaussian
from fedfuse.privacy.noise import NoiseStream


def law(sigma: float, reach: int) -> np.ndarray:
    """P(Z = z) for z from -reach to reach."""
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2.0 * sigma**2))
    return np.asarray(weights / weights.sum())


def of_law(drawn: np.ndarray, sigma: float) -> bool:
    """Chi-square against the law, in cells with 10 expected or more; false alarm 1 in 100,000."""
    reach = math.ceil(8 * sigma)
    expected = law(sigma, reach) * len(drawn)
    found = np.bincount(np.clip(drawn, -reach, reach) + reach, minlength=2 * reach + 1)
    cells = expected >= 10
    statistic = float(((found - expected)[cells] ** 2 / expected[cells]).sum())
    degrees = int(cells.sum()) - 1
    bound = degrees * (1 - 2 / (9 * degrees) + 4.27 * math.sqrt(2 / (9 * degrees))) ** 3
    return statistic < bound


@pytest.mark.parametrize("sigma", [1, 2, 3, 16])
def test_draws_are_of_the_discrete_gaussian_law(sigma: int) -> None:
    drawn = discrete_gaussian(60_000, sigma, NoiseStream(b"d" * 32, "noise"))
    assert of_law(drawn, sigma)


@pytest.mark.parametrize("factor", [2 / 3, 0.95, 1.05, 1.5])
def test_draws_of_another_sigma_are_rejected(factor: float) -> None:
    drawn = discrete_gaussian(60_000, 16, NoiseStream(b"d" * 32, "noise"))
    assert not of_law(drawn, 16 * factor)


def test_the_largest_sigma_stays_in_range() -> None:
    n = 20_000
    drawn = discrete_gaussian(n, MOST_SIGMA, NoiseStream(b"e" * 32, "noise")) / MOST_SIGMA
    assert abs(float(drawn.mean())) < 4.5 / math.sqrt(n)
    assert abs(float(np.square(drawn).mean()) - 1) < 4.5 * math.sqrt(2 / n)
    assert abs(float((drawn**4).mean()) - 3) < 4.5 * math.sqrt(96 / n)


def test_a_stream_gives_the_same_noise_and_another_does_not() -> None:
    first = discrete_gaussian(100, 50, NoiseStream(b"a" * 32, "noise"))
    assert (first == discrete_gaussian(100, 50, NoiseStream(b"a" * 32, "noise"))).all()
    assert (first != discrete_gaussian(100, 50, NoiseStream(b"b" * 32, "noise"))).any()


@pytest.mark.parametrize("sigma", [0, -1, MOST_SIGMA + 1])
def test_a_sigma_out_of_range_is_refused(sigma: int) -> None:
    with pytest.raises(PrivacyError):
        discrete_gaussian(1, sigma, NoiseStream(b"a" * 32, "noise"))


def test_shares_add_up_to_what_is_declared_and_the_slack() -> None:
    for total, shares in ((64.0, 1), (1000.0, 4), (12345.6, 7), (2.0**20, 100)):
        sigma = deviation(total, shares)
        assert shares * sigma**2 - 16 >= total**2 > shares * (sigma - 1) ** 2 - 16
    for total, shares in ((0.0, 1), (LEAST_SIGMA / 2, 1), (100.0, 100), (2.0**25, 1)):
        with pytest.raises(PrivacyError, match="steps of the lattice"):
            deviation(total, shares)


@pytest.mark.parametrize("shares", [1, 2, 5])
def test_a_sum_of_shares_costs_no_more_than_the_gaussian_that_is_accounted(shares: int) -> None:
    """delta(epsilon) of the sum's own law, added up exactly, against the Gaussian's formula.

    The law of the sum by convolution, an update of `move` steps or none, both directions.
    """
    total, move = 40.0, 40
    sigma = deviation(total, shares)
    one = law(sigma, 12 * sigma)
    together = one
    for _ in range(shares - 1):
        together = np.convolve(together, one)
    moved = np.concatenate([np.zeros(move), together])
    there = np.concatenate([together, np.zeros(move)])
    for epsilon in (0.25, 1.0, 2.0, 4.0):
        mu = move / total
        gaussian = _phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * _phi(-mu / 2 - epsilon / mu)
        for p, q in ((there, moved), (moved, there)):
            exact = float(np.maximum(p - math.exp(epsilon) * q, 0).sum())
            assert exact <= gaussian * (1 + 1e-9) + 1e-14
            assert exact > 0.5 * gaussian - 1e-14


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))
