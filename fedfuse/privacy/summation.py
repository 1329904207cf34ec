"""Sums of many updates that do not depend on the order in which they come.

A sum of n float64 numbers depends on their order in its last bits, and with cancellation in more
than that. Here each coordinate is a pair (high, low) whose exact sum is kept to about 106 bits, so
what is read from it as float32 is the same in every order, and memory stays that of two vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["RunningSum"]

_CHUNK = 8192
"""Coordinates at once: six buffers of this many float64 stay in a core's cache."""

Shapes = Mapping[str, tuple[int, ...]]


class RunningSum:
    """The sum of all arrays added so far, by name.

    Ogita, Rump and Oishi 2005 (SIAM J. Sci. Comput. 26), algorithm 4.1 (Sum2), over Knuth's
    TwoSum: s = fl(a + b) and the rest e = a + b - s exactly; the rests are summed beside.

    >>> total = RunningSum({"w": (2,)})
    >>> for value in (1e16, 1.0, -1e16):
    ...     total.add({"w": np.array([value, 1.0])})
    >>> total.total()["w"]
    array([1., 3.])
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = {name: tuple(shapes[name]) for name in sorted(shapes)}
        size = sum(math.prod(shape) for shape in self._shapes.values())
        self._high = np.zeros(size)
        self._low = np.zeros(size)
        self._next = np.empty(size)
        self._scratch = tuple(np.empty(min(size, _CHUNK)) for _ in range(3))

    def add(self, arrays: Mapping[str, NDArray[np.generic]], factor: float = 1.0) -> None:
        """Adds `factor` times `arrays`, each of the shape that it was announced with."""
        place = 0
        for name, shape in self._shapes.items():
            end = place + math.prod(shape)
            self._next[place:end] = arrays[name].reshape(-1)
            place = end
        if factor != 1.0:
            self._next *= factor
        for start in range(0, len(self._next), _CHUNK):
            rows = slice(start, start + _CHUNK)
            a, b, low = self._high[rows], self._next[rows], self._low[rows]
            s, t, e = (buffer[: len(a)] for buffer in self._scratch)
            np.add(a, b, out=s)
            np.subtract(s, a, out=t)  # what of b is in s
            np.subtract(s, t, out=e)  # what of a is in s
            np.subtract(a, e, out=e)
            np.subtract(b, t, out=t)
            np.add(e, t, out=e)
            low += e
            a[:] = s

    def total(self) -> dict[str, NDArray[np.float64]]:
        """The sum as it stands, by name, in arrays of its own."""
        whole, place = self._high + self._low, 0
        parts: dict[str, NDArray[np.float64]] = {}
        for name, shape in self._shapes.items():
            end = place + math.prod(shape)
            parts[name] = whole[place:end].reshape(shape).copy()
            place = end
        return parts
