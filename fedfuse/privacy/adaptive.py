"""A clip norm that follows a quantile of the units' gradient norms, privately.

    b_i     1 where unit i was not clipped, else 0
    b       sum of (b_i - 1/2) + N(0, sigma_b^2), over the expected number of units, plus 1/2
    C       C exp(-eta_C (b - gamma))

Andrew, Thakkar, McMahan and Ramaswamy 2021 (arXiv:1905.03871v5), algorithm 1.

Guarantees
    Sum and count of a step are one Gaussian mechanism of noise multiplier z (theorem 1): the sum
    carries z_delta = (z^-2 - (2 sigma_b)^-2)^-1/2, which `Mechanism.sum_noise` gives. All that
    decides C is the noisy counts, so the next C costs nothing more.
"""

from __future__ import annotations

import math

__all__ = ["count_noise_for", "next_clip_norm"]

_FARTHEST = 1000.0
"""C goes no farther than by this factor from where it began."""


def next_clip_norm(C: float, below: float, *, quantile: float, rate: float, first: float) -> float:
    """C of the next round. `below`: the noisy share of unclipped units, any real number.

    >>> round(next_clip_norm(1.0, 1.0, quantile=0.5, rate=0.2, first=1.0), 4)
    0.9048
    """
    moved = C * math.exp(-rate * (min(max(below, 0.0), 1.0) - quantile))
    return min(max(moved, first / _FARTHEST), first * _FARTHEST)


def count_noise_for(units: float, noise_multiplier: float) -> float:
    """sigma_b where none is given: a twentieth of the expected number of units (section 3.2), and
    at least 2 z, so that the sum's noise grows by no more than 3.3 %.

    >>> count_noise_for(100, 1.0), count_noise_for(10, 1.0)
    (5.0, 2.0)
    """
    return max(units / 20, 2 * noise_multiplier)
