"""Discrete Gaussian noise: whole numbers, from whole random numbers, without a rounded probability.

    P(Z = z) proportional to exp(-z^2 / (2 sigma^2)), z a whole number

Canonne, Kamath and Steinke 2020 (arXiv:2004.00010v5), algorithms 1 to 3. No floating-point number
is used, so there are no low bits that could give the noise away.

Guarantees (for whole inputs that move by at most S in L2, with noise on each coordinate)
    One: N_Z(sigma^2) is, up to a factor of 1 ± 10^-130 in each coordinate's probabilities, what
    rounding makes of a continuous Gaussian of variance sigma^2 - 16: add D, discrete of deviation
    4 around it (Peikert 2010, "An Efficient and Parallel Gaussian Sampler", theorem 3.1; the sum
    over a shifted lattice that it needs is constant up to 2 exp(-2 pi^2 4^2)). Rounding is
    post-processing, and moves with a whole input.
    A sum of n: it is N_Z(n sigma^2) up to a factor that is smaller still where sigma is at least
    LEAST_SIGMA (Kairouz, Liu and Steinke 2021, arXiv:2102.06387, on sums of discrete Gaussians:
    10 n exp(-pi^2 sigma^2), here below 10^-1000).
    So a sum of n costs no more than a Gaussian of variance n sigma^2 - 16: `deviation` chooses
    sigma so that this is at least what was declared, and the books account that Gaussian exactly.
Not covered
    Timing of the arithmetic, which depends on what is drawn.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedfuse.errors import PrivacyError
from fedfuse.privacy.noise import NoiseStream

__all__ = ["LEAST_SIGMA", "MOST_SIGMA", "deviation", "discrete_gaussian"]

LEAST_SIGMA = 16
"""In steps of the lattice: from here on a sum of discrete Gaussians is one, for all purposes."""
MOST_SIGMA = 1 << 24
"""Beyond it a product of the sampler's could leave 64 bits."""
_SLACK = 16
"""4^2: the variance by which a continuous Gaussian may be smaller."""
_BLOCK = 1 << 16

Whole = NDArray[np.int64]


def deviation(total: float, shares: int) -> int:
    """sigma of each share, so that any `shares` of them cost no more than a Gaussian of `total`.

    Both in steps of the lattice.

    >>> deviation(1000.0, 4)
    501

    Raises PrivacyError where sigma is out of range.
    """
    sigma = math.isqrt(math.ceil((total * total + _SLACK) / shares) - 1) + 1 if total else 0
    if not LEAST_SIGMA <= sigma <= MOST_SIGMA:
        raise PrivacyError(
            f"discrete noise of deviation {sigma} in steps of the lattice, but it must be from "
            f"{LEAST_SIGMA} to {MOST_SIGMA}",
            where="privacy",
        )
    return sigma


def discrete_gaussian(count: int, sigma: int, stream: NoiseStream) -> Whole:
    """(count,) int64 draws of mean 0 and variance sigma^2 (less by an amount nobody can see).

    sigma: a whole number from 1 to MOST_SIGMA. Algorithm 3 with t = sigma.
    """
    if not 1 <= sigma <= MOST_SIGMA:
        raise PrivacyError(f"sigma = {sigma}, but it must be from 1 to {MOST_SIGMA}")
    out = np.empty(count, np.int64)
    filled = 0
    while filled < count:
        drawn = _laplace(min(_BLOCK, 2 * (count - filled) + 16), sigma, stream)
        # exp(-(|y| - sigma^2/t)^2 / (2 sigma^2))
        over = np.square(np.abs(drawn) - sigma).astype(np.uint64)
        kept = drawn[_coins(over, 2 * sigma * sigma, stream)][: count - filled]
        out[filled : filled + len(kept)] = kept
        filled += len(kept)
    return out


def _laplace(count: int, t: int, stream: NoiseStream) -> Whole:
    """At most `count` discrete Laplace draws of scale t: algorithm 2; those refused are left out.

    A draw is left out, never repeated, so all of a call are of one law.
    """
    u = _below(stream, t, count)
    u = u[_coins(u, t, stream)]
    v = np.zeros(len(u), np.int64)
    going = np.arange(len(u))
    while len(going):
        going = going[_coins(np.ones(len(going), np.uint64), 1, stream)]
        v[going] += 1
    x: Whole = u.astype(np.int64) + t * v
    negative = _below(stream, 2, len(x)) == 1
    x, negative = x[~(negative & (x == 0))], negative[~(negative & (x == 0))]
    x[negative] *= -1
    return x


def _coins(over: NDArray[np.uint64], under: int, stream: NoiseStream) -> NDArray[np.bool_]:
    """(n,) coins: each is true with probability exp(-over / under). Algorithm 1."""
    whole, rest = np.divmod(over, np.uint64(under))
    true = _small_coins(rest, under, stream)
    alive = np.flatnonzero(true & (whole > 0))
    left = whole[alive]
    while len(alive):
        heads = _small_coins(np.ones(len(alive), np.uint64), 1, stream)
        true[alive[~heads]] = False
        left = left - np.uint64(1)
        going = heads & (left > 0)
        alive, left = alive[going], left[going]
    return true


def _small_coins(over: NDArray[np.uint64], under: int, stream: NoiseStream) -> NDArray[np.bool_]:
    """The same where over <= under: the count of heads of chance over / (under k) is even."""
    true = np.zeros(len(over), np.bool_)
    going, k = np.arange(len(over)), 1
    while len(going):
        heads = _below(stream, under * k, len(going)) < over[going]
        true[going[~heads]] = k % 2 == 1
        going, k = going[heads], k + 1
    return true


def _below(stream: NoiseStream, bound: int, count: int) -> NDArray[np.uint64]:
    """(count,) whole numbers from 0 to bound - 1, each as likely as another."""
    words = stream.words(count)
    last = np.uint64(2**64 // bound * bound - 1)
    while len(out := np.flatnonzero(words > last)):
        words[out] = stream.words(len(out))
    return words % np.uint64(bound)
