"""A second accountant, to check the first: bounds on epsilon from both sides, in numpy alone.

Shares no code with `accounting` and none with dp-accounting; needs no torch. A certificate is
verified with it in a process of its own. What both have in common is the theorem that says which
pair dominates a step (see `accounting`); the rest is derived here.

Guarantees
    Unit, sensitivity: as in `accounting`. Neighbouring relation: add-or-remove-one, the larger of
    the two directions.
    The true epsilon of the composed pair lies between the bounds, up to floating-point rounding,
    for which each bound is moved outwards by FLOAT of itself.

How. One step's loss l (x drawn from P, l = log P/Q at x) is moved to the two grid points a <= l <
a + h around it, a share of it to each, so that both its P-mass and its Q-mass are kept. So
L' = L + S, where S is the sum of n independent shifts Z given the losses, each of them within an
interval of width h, with E[exp(-Z)] = 1. With f(l) = (1 - exp(eps - l))_+, delta(eps) = E f(L).

    upper bound   f is convex in exp(-l), so E f(L') >= E f(L) by Jensen.
    lower bound   f is linear in exp(-l) on each side of eps, where E[exp(-Z)] = 1 makes the
                  difference vanish: only losses within reach of S around eps count, see `_gap`.

L' is composed by FFT under an exponential tilt exp(theta l), so that the digits are spent where
delta is made; what leaves the window of the FFT is bounded by Chernoff. The tilt is that of the
saddle point (as in Alghamdi et al. 2023, arXiv:2208.09595v3); it only affects how close the bounds
are. Compare Gopi, Lee, Wutschitz 2021 (arXiv:2106.02848v1), theorem 10, where S costs h sqrt(n) in
epsilon; here it costs h^2 n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, ndtr, ndtri

from fedfuse.errors import PrivacyError

__all__ = ["bounds", "delta_bounds"]

TOLERANCE = 1e-4
"""How far apart the bounds may be, relative to epsilon, as the grid is planned."""
FLOAT = 1e-6
LEAST_SIGMA = 0.1
"""Less noise than this is refused: losses of hundreds overflow."""
MOST_CELLS = 1 << 22
"""The grid is coarser, and the bounds wider, where it would need more."""

Array = NDArray[np.float64]
Counts = Sequence[tuple[float, float, int]]


def bounds(counts: Counts, delta: float) -> tuple[float, float]:
    """(lower, upper) bound on epsilon at `delta` for (q, sigma, steps) run on the same records.

    >>> [round(bound, 3) for bound in bounds([(0.25, 1.7, 160)], 1e-5)]
    [10.543, 10.544]
    """
    _check(counts)
    if not 0 < delta < 1:
        raise PrivacyError(f"delta = {delta}, but it must lie between 0 and 1")
    low = high = 0.0  # also where nothing was run
    for side in _sides(counts):
        plan = _plan(counts, side, delta=delta)
        below, above = _compose(counts, side, plan).epsilons(delta)
        for _ in range(4):  # few steps have rugged laws, where the plan is too hopeful
            if above - below <= 4 * TOLERANCE * above or plan.cells > MOST_CELLS / 8:
                break
            plan = replace(plan, width=plan.width / 3)
            below, above = _compose(counts, side, plan).epsilons(delta)
        low, high = max(low, below), max(high, above)
    return low * (1 - FLOAT), high * (1 + FLOAT)


def delta_bounds(
    counts: Counts, epsilon: float, *, tolerance: float = TOLERANCE
) -> tuple[float, float]:
    """(lower, upper) bound on delta at `epsilon` >= 0: the other way round from `bounds`.

    tolerance  how far apart they may be, in terms of epsilon; a larger one is quicker
    """
    _check(counts)
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise PrivacyError(f"epsilon = {epsilon}, but it must be a number from 0 on")
    found = [
        _compose(counts, side, _plan(counts, side, epsilon=epsilon, tolerance=tolerance)).deltas(
            epsilon
        )
        for side in _sides(counts)
    ]
    low = max((a for a, _ in found), default=0.0)
    high = max((b for _, b in found), default=0.0)
    return max(low * (1 - FLOAT), 0.0), min(high * (1 + FLOAT), 1.0)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What the composition needs to know ahead. Good choices make the bounds close, not true."""

    theta: float
    """The tilt."""
    mean: float
    """About where epsilon is."""
    width: float
    """h."""
    low: float
    high: float
    """The window of the FFT."""
    orders: tuple[float, float]
    """Chernoff's, below and above the window."""
    tail: float
    """The mass of one step's loss beyond the grid, on each side."""

    @property
    def cells(self) -> int:
        return math.ceil((self.high - self.low) / self.width) + 1


@dataclass(frozen=True, slots=True)
class _Composed:
    """The law of L' on the grid points that matter, with what is uncertain about it."""

    width: float
    steps: int
    losses: Array
    mass: Array
    """P'-mass at each of `losses`, of which the FFT wrapped some in from outside its window."""
    above: Array
    below: Array
    """Sums of p and of p exp(mean - l) over each grid point and those above it."""
    mean: float
    unit: float
    """Unit of mass, above and below."""
    theta: float
    outside: float
    """Tilted mass outside of the window, at most."""
    high: float
    lost: float
    """P(some step's loss is beyond its grid), at most."""

    def deltas(self, epsilon: float) -> tuple[float, float]:
        """(lower, upper) bound on delta at `epsilon`."""
        return self._lower(epsilon), self._delta(epsilon) + self._beyond()

    def epsilons(self, delta: float) -> tuple[float, float]:
        """(lower, upper) bound on epsilon at `delta`."""
        high = self._solve(delta - self._beyond())
        step = high * 1e-5
        while (tried := high - step) > 0:  # whatever passes is a bound: nothing hangs on the search
            if self._lower(tried) >= delta:
                return tried, high
            step *= 1.2
        return 0.0, high

    def _delta(self, epsilon: float) -> float:
        """E f(L') over the window."""
        first = int(np.searchsorted(self.losses, epsilon, side="right"))
        if first == len(self.losses):
            return 0.0
        value = self.above[first] - math.exp(epsilon - self.mean) * self.below[first]
        return self.unit * max(float(value), 0.0)

    def _solve(self, delta: float) -> float:
        """The least epsilon >= 0 with E f(L') <= `delta` over the window."""
        if delta <= 0:
            return math.inf
        target = delta / self.unit
        at = self.above[1:] - np.exp(np.minimum(self.losses - self.mean, 700)) * self.below[1:]
        first = int(np.argmax(at <= target))  # epsilon is in the cell that ends here
        room = (self.above[first] - target) / self.below[first]
        return max(self.mean + math.log(room), 0.0) if room > 0 else 0.0

    def _beyond(self) -> float:
        """What losses above the window, or lost above the grid, add to delta at most."""
        return self.lost + self._chernoff(self.high)

    def _lower(self, epsilon: float) -> float:
        """E f(L') less all that it may be above E f(L)."""
        error = self._chernoff(epsilon) + 2 * self.lost + self._gap(epsilon)
        return self._delta(epsilon) - error

    def _chernoff(self, loss: float) -> float:
        """The P'-mass that the tilted mass outside of the window stands for at `loss` or above."""
        log_factor = self.theta * (self.mean - loss)
        return self.outside * self.unit * math.exp(log_factor) if log_factor < 700 else math.inf

    def _gap(self, epsilon: float) -> float:
        """E f(L + S) - E f(L), at most.

        Given the losses, -S and S - b are sub-Gaussian with v = n h^2 / 4, where 0 <= E S <= b =
        n h^2 / 8: by Hoeffding's lemma 0 = log E exp(-Z) <= -E Z + h^2 / 8, and by Jensen E Z >= 0.
        With d = |L - eps|, f(L + S) - f(L) has conditional expectation
            at most E (exp(-S - d) - 1)_+   where L >= eps
            at most E (1 - exp(d - S))_+    where L < eps
        and both are at most r(d), the integral over y > d of exp(y - d - ((y - b)_+)^2 / 2v).
        The law of L near eps is bounded by that of L': |S| <= c has probability >= 1 - miss given
        the losses, so P(|L - eps| < u) <= P(|L' - eps| < u + c) / (1 - miss).
        """
        v = self.steps * self.width**2 / 4
        b, root = v / 2, math.sqrt(v)
        u = np.arange(0, 4 * _reach(self.unit)) * (root / 4)
        r = np.exp(b - u + v / 2) * math.sqrt(2 * math.pi * v) * ndtr((b + v - u) / root)
        r += np.maximum(b - u, 0) * math.exp(b)
        c, miss = b + 2.5 * root, 2 * math.exp(-(2.5**2) / 2)
        reach = u[1:] + c
        if epsilon - reach[-1] < self.losses[0]:
            return 1.0
        since = np.searchsorted(self.losses, epsilon - reach, side="left")
        until = np.searchsorted(self.losses, epsilon + reach, side="right")
        sums = np.append(0.0, np.cumsum(self.mass[since[-1] : until[-1]]))
        near = self.unit * (sums[until - since[-1]] - sums[since - since[-1]]) / (1 - miss)
        return float((r[:-1] - r[1:]) @ near + r[-1])


def _compose(counts: Counts, side: int, plan: _Plan) -> _Composed:
    """The law of L' for one direction: `side` 1 removes the unit, -1 adds it."""
    h, theta = plan.width, plan.theta
    size = _fast(plan.cells)
    first = math.floor(plan.low / h)
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    log_mass, log_outside = 0.0, np.zeros(2)
    for q, sigma, steps in counts:
        start, atoms = _atoms(q, sigma, side, plan)
        index = np.arange(start, start + len(atoms))
        with np.errstate(divide="ignore"):
            logs = np.log(atoms) + theta * h * index
        log_step = _log_sum(logs)
        tilted = np.exp(logs - log_step)
        wrapped = np.bincount(index % size, weights=tilted, minlength=size)
        spectrum *= _power(np.fft.rfft(wrapped), steps)
        log_mass += steps * log_step
        log_outside += [
            steps * _log_sum(logs - log_step + order * h * index) for order in plan.orders
        ]
    law = np.roll(np.fft.irfft(spectrum, size), -(first % size))
    losses: Array = np.arange(first, first + size, dtype=np.float64) * h
    log_outside -= np.array(plan.orders) * losses[[0, -1]]
    kept = max(theta, 1) * (plan.mean - losses) < 300  # far below epsilon masses would overflow
    losses, law = losses[kept], np.maximum(law[kept], 0.0)
    mass = law * np.exp(theta * (plan.mean - losses))
    return _Composed(
        width=h,
        steps=sum(steps for _, _, steps in counts),
        losses=losses,
        mass=mass,
        above=_upwards(mass),
        below=_upwards(mass * np.exp(plan.mean - losses)),
        mean=plan.mean,
        unit=math.exp(log_mass - theta * plan.mean),
        theta=theta,
        outside=float(np.exp(np.minimum(log_outside, 0.0)).sum()),
        high=float(losses[-1]),
        lost=2 * plan.tail * sum(steps for _, _, steps in counts),
    )


def _atoms(q: float, sigma: float, side: int, plan: _Plan) -> tuple[int, Array]:
    """(index of the lowest grid point, masses): one step's loss, moved to the grid."""
    h, reach = plan.width, -float(ndtri(plan.tail))
    first = math.floor(float(_loss(np.array(-reach * sigma), q, sigma)) / h)
    last = math.ceil(float(_loss(np.array(1 + reach * sigma), q, sigma)) / h)
    if q < 1:
        first = max(first, math.floor(math.log1p(-q) / h))
    edges = np.arange(first, last + 1) * h
    stay = math.log1p(-q) if q < 1 else -math.inf
    with np.errstate(divide="ignore"):  # x where the loss is e: exp(e) = 1 - q + q exp(full)
        full = edges + np.log(-np.expm1(np.minimum(stay - edges, 0.0))) - math.log(q)
    x = 0.5 + sigma**2 * full
    null = _between(x / sigma)
    mixed = (1 - q) * null + q * _between((x - 1) / sigma)
    if side > 0:
        p, w, base = mixed, null * np.exp(edges[:-1]), first
    else:
        p, w, base = null[::-1], (mixed * np.exp(-edges[1:]))[::-1], -last
    # Of mass p at losses in [a, a + h), v goes up and p - v down: v (1 - exp(-h)) = p - exp(a) Q.
    v = np.clip((p - w) / -math.expm1(-h), 0, p)
    atoms = np.append(p - v, 0.0)
    atoms[1:] += v
    atoms[0] += max(1 - float(p.sum()), 0.0)  # losses below the grid, rounded up to it
    return base, atoms


def _loss(x: Array, q: float, sigma: float) -> Array:
    """log of ((1-q) N(0) + q N(1)) / N(0) at x."""
    full = (2 * x - 1) / (2 * sigma**2)
    stay = math.log1p(-q) if q < 1 else -math.inf
    found: Array = np.logaddexp(stay, math.log(q) + full)
    return found


def _between(z: Array) -> Array:
    """The normal law's mass between neighbours of rising `z`, from the nearer tail."""
    low, high = z[:-1], z[1:]
    found: Array = np.where(low > 0, ndtr(-low) - ndtr(-high), ndtr(high) - ndtr(low))
    return found


def _plan(
    counts: Counts,
    side: int,
    *,
    delta: float | None = None,
    epsilon: float | None = None,
    tolerance: float = TOLERANCE,
) -> _Plan:
    """Tilt, grid and window for one of the two, from cumulants by quadrature."""
    points = [(*_points(q, sigma, side), steps) for q, sigma, steps in counts]

    def cumulants(theta: float) -> tuple[float, float, float]:
        """K, K', K'' at theta."""
        total = np.zeros(3)
        for log_p, loss, steps in points:
            weight = np.exp(log_p + theta * loss - (top := float((log_p + theta * loss).max())))
            mass = float(weight.sum())
            mean = float(weight @ loss) / mass
            spread = float(weight @ (loss - mean) ** 2) / mass
            total += steps * np.array([top + math.log(mass), mean, spread])
        return float(total[0]), float(total[1]), float(total[2])

    def log_delta(theta: float) -> float:
        """log delta at epsilon = K'(theta), were the tilted law normal."""
        k, mean, variance = cumulants(theta)
        x = theta * math.sqrt(variance / 2), (theta + 1) * math.sqrt(variance / 2)
        return k - theta * mean + math.log(max(erfcx(x[0]) - erfcx(x[1]), 1e-300) / 2)

    low, high = 1e-2, 1e4
    for _ in range(30):
        theta = math.sqrt(low * high)
        enough = (
            log_delta(theta) <= math.log(delta)
            if delta is not None
            else epsilon is not None and cumulants(theta)[1] >= epsilon
        )
        low, high = (low, theta) if enough else (theta, high)
    k, mean, variance = cumulants(theta)
    total = sum(steps for _, _, steps in counts)
    h = math.sqrt(4 * tolerance * max(mean, 0.005) / (9 * total * (1 + theta)))
    # The window: where Chernoff leaves exp(-30) of the tilted law, and what _gap looks at.
    tries = np.geomspace(0.5, 40, 24) / math.sqrt(variance)
    above = min(((cumulants(theta + s)[0] - k + 30) / s, s) for s in tries)
    under = max(((k - cumulants(theta - s)[0] - 30) / s, -s) for s in tries)
    expected = delta if delta is not None else math.exp(log_delta(theta))
    reach = (_reach(expected) + 8) * h * math.sqrt(total) / 2
    edges = min(under[0], mean - reach), max(above[0], mean + reach)
    return _Plan(
        theta=theta,
        mean=mean,
        width=max(h, (edges[1] - edges[0]) / MOST_CELLS),
        low=edges[0],
        high=edges[1],
        orders=(under[1], above[1]),
        tail=max(expected * 1e-6 / total, 1e-300),
    )


def _reach(delta: float) -> int:
    """Standard deviations after which a sub-Gaussian tail is far below `delta`."""
    return math.ceil(6 + math.sqrt(2 * max(-math.log(max(delta, 1e-300)), 0)))


def _points(q: float, sigma: float, side: int) -> tuple[Array, Array]:
    """(log weight, loss) at points of x: a quadrature of one step's law."""
    x = np.linspace(-13 * sigma, 1 + 13 * sigma, 1001)
    null, loss = -(x**2) / (2 * sigma**2), _loss(x, q, sigma)
    log_p = null + loss if side > 0 else null
    log_p = log_p - np.logaddexp.reduce(log_p)
    return log_p, side * loss


def _power(base: Any, exponent: int) -> Any:
    """base ** exponent by squaring: numpy's own goes through logarithms, which is slower."""
    result = np.ones_like(base)
    while exponent:
        if exponent & 1:
            result = result * base
        base, exponent = base * base, exponent >> 1
    return result


def _log_sum(logs: Array) -> float:
    """log of sum exp(logs)."""
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).sum()))


def _fast(size: int) -> int:
    """The next even size that the FFT is quick at: up to 15 times a power of two."""
    unit = 1 << max(size.bit_length() - 4, 1)
    return -(-size // unit) * unit


def _upwards(values: Array) -> Array:
    """Sums from each place to the end, and 0 behind it."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)


def _sides(counts: Counts) -> tuple[int, ...]:
    """Removing the unit and adding it: the same where every batch is full."""
    if not counts:
        return ()
    return (1,) if all(q == 1 for q, _, _ in counts) else (1, -1)


def _check(counts: Counts) -> None:
    for q, sigma, steps in counts:
        if not (0 < q <= 1 and LEAST_SIGMA <= sigma < math.inf and steps >= 1):
            raise PrivacyError(
                f"q = {q}, sigma = {sigma}, steps = {steps} cannot be accounted for",
                hint=f"0 < q <= 1, sigma >= {LEAST_SIGMA}, steps >= 1",
            )
