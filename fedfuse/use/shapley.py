"""Shapley values of a game: how much each player adds, on average over all orders of coming in.

Here players are a record's modalities and the value of a coalition is what the model says where
only those are there. Efficiency: the values sum to v(all) - v(nobody). Symmetry: who adds the same
everywhere has the same. Dummy: who adds nothing anywhere has 0 (Shapley 1953; Lundberg and Lee
2017, arXiv:1705.07874v2, section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from math import factorial

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_EXACT", "coalitions", "exact", "sampled"]

Array = NDArray[np.float64]
Coalitions = NDArray[np.bool_]

MOST_EXACT = 6
"""Up to so many players all coalitions are looked at; above, orders are drawn."""


def coalitions(players: int) -> Coalitions:
    """(2^M, M): row k has the players whose bits are set in k."""
    bits = np.arange(1 << players)[:, None] >> np.arange(players)
    return np.asarray(bits % 2 == 1)


def exact(values: Array) -> Array:
    """(2^M,), the value of each of `coalitions(M)` -> (M,): equation 8 of Lundberg and Lee 2017."""
    players = len(values).bit_length() - 1
    rows = coalitions(players)
    size = rows.sum(1)
    places = np.arange(len(values))
    found = np.zeros(players)
    for m in range(players):
        out = places[~rows[:, m]]
        weight = np.array([factorial(s) * factorial(players - s - 1) for s in size[out]])
        gain = values[out | (1 << m)] - values[out]
        found[m] = (weight * gain).sum() / factorial(players)
    return found


def sampled(
    value: Callable[[Coalitions], Array], players: int, orders: int, generator: np.random.Generator
) -> tuple[Array, Array]:
    """((M,) values, (M,) their standard errors) from `orders` random orders of coming in, each
    looked at forwards and backwards (Castro, Gomez and Tejada 2009, doi:10.1016/j.cor.2008.04.004;
    antithetic pairs, Mitchell et al. 2022, arXiv:2104.12199v2, section 4.1).

    `value`: (S, M) coalitions -> (S,). Efficiency holds for each order, and so for their mean; an
    error is the standard deviation over pairs of orders over the root of their number.
    """
    gains = np.empty((orders, players))
    for k in range(orders):
        order = generator.permutation(players)
        gains[k] = 0.5 * (_along(value, order) + _along(value, order[::-1]))
    error = gains.std(0, ddof=1) / np.sqrt(orders) if orders > 1 else np.full(players, np.inf)
    return gains.mean(0), error


def _along(value: Callable[[Coalitions], Array], order: NDArray[np.intp]) -> Array:
    """What each player adds as they come in, in `order`."""
    players = len(order)
    rows = np.zeros((players + 1, players), dtype=bool)
    for step, m in enumerate(order):
        rows[step + 1 :, m] = True
    gains = np.empty(players)
    gains[order] = np.diff(value(rows))
    return gains
