"""Shapley values keep their axioms, agree with all orders written out, and errors are honest."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.use.shapley import coalitions, exact, sampled

Games = st.tuples(st.integers(0, 6), st.integers(0, 10_000))


def game(players: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=1 << players)


def by_all_orders(values: np.ndarray) -> np.ndarray:
    """Every order of coming in, written out."""
    players = len(values).bit_length() - 1
    gains = np.zeros(players)
    orders = list(permutations(range(players)))
    for order in orders:
        inside = 0
        for m in order:
            gains[m] += values[inside | 1 << m] - values[inside]
            inside |= 1 << m
    return gains / len(orders)


@settings(max_examples=40, deadline=None)
@given(Games)
def test_it_is_the_mean_over_all_orders(which: tuple[int, int]) -> None:
    values = game(*which)
    np.testing.assert_allclose(exact(values), by_all_orders(values), atol=1e-12)


@given(Games)
def test_efficiency(which: tuple[int, int]) -> None:
    values = game(*which)
    assert exact(values).sum() == pytest.approx(values[-1] - values[0], abs=1e-9)


@given(st.integers(1, 5), st.integers(0, 10_000))
def test_dummies_have_nothing(players: int, seed: int) -> None:
    """The last player adds nothing, the one before it adds 3 to all that come."""
    rest = game(players, seed)
    values = np.concatenate([rest, rest + 3, rest, rest + 3])
    *others, adder, dummy = exact(values)
    assert dummy == pytest.approx(0, abs=1e-9)
    assert adder == pytest.approx(3)
    np.testing.assert_allclose(others, exact(rest), atol=1e-9)


@given(st.integers(2, 6), st.integers(0, 10_000))
def test_symmetry(players: int, seed: int) -> None:
    rows, values = coalitions(players), game(players, seed)
    swapped = rows.copy()
    swapped[:, [0, 1]] = rows[:, [1, 0]]
    places = (swapped << np.arange(players)).sum(1)
    same = values + values[places]
    found = exact(same)
    assert found[0] == pytest.approx(found[1], abs=1e-9)


def test_drawn_orders_sum_up_and_are_as_far_off_as_they_say() -> None:
    players, off = 9, []
    values = game(players, 1)
    true = exact(values)

    def value(rows: np.ndarray) -> np.ndarray:
        return values[(rows << np.arange(players)).sum(1)]

    for seed in range(40):
        found, error = sampled(value, players, 50, np.random.default_rng(seed))
        assert found.sum() == pytest.approx(values[-1] - values[0])
        off.append((found - true) / error)
    spread = np.array(off)
    # 360 scores of about the standard normal: their deviation is 1 within 0.15, at 4 sigma.
    assert 0.85 < spread.std() < 1.2
    assert abs(spread.mean()) < 0.22
    assert sampled(value, players, 1, np.random.default_rng(0))[1].tolist() == [np.inf] * players
