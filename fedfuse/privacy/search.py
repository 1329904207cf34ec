"""Where a rising cost passes what is allowed, found with few evaluations, as each is dear."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal

__all__ = ["border", "farthest", "rounded"]


def border(
    cost: Callable[[float], float], allowed: float, low: float, high: float, tolerance: float
) -> float:
    """The largest value with cost <= `allowed`, to `tolerance`: below `high`, which costs more.

    `low` does not cost more. Whole numbers stay whole. False position with the Illinois rule
    (Dowell and Jarratt 1971, BIT 11, doi:10.1007/BF01934364).
    """
    under, over = cost(low) - allowed, cost(high) - allowed
    while high - low > tolerance:
        share = min(max(under / (under - over), 0.02), 0.98)
        middle = low + (high - low) * share
        if isinstance(low, int):
            middle = min(max(round(middle), low + 1), int(high) - 1)
        value = cost(middle) - allowed
        if value <= 0:
            low, under, over = middle, value, over / 2
        else:
            high, over, under = middle, value, under / 2
    return low


def farthest(start: Decimal, allowed: Callable[[float], bool], *, way: int) -> float:
    """The last allowed number near `start`, in steps of its fourth digit.

    `way` is 1 upwards, -1 downwards; the next number that way is not allowed. Strides double until
    they pass the border, so `start` should be near it: on either side.
    """
    unit = Decimal(way).scaleb(start.adjusted() - 3)

    def holds(number: int) -> bool:
        return allowed(float(start + number * unit))

    low, high = 0, 1
    if holds(0):
        while holds(high):
            low, high = high, 2 * high
    else:
        low, high = -1, 0
        while not holds(low):
            low, high = 2 * low, low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return float(start + low * unit)


def rounded(value: float, digits: int, rounding: str) -> Decimal:
    """`value` cut to so many digits, to the side that is asked for (a rounding of `decimal`).

    >>> from decimal import ROUND_CEILING
    >>> rounded(2.07445, 4, ROUND_CEILING)
    Decimal('2.075')
    """
    return Context(prec=digits, rounding=rounding).create_decimal(repr(value))
