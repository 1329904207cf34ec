"""Which way a layer's norms are computed: the cost model, from shapes alone.

The two ways of Bu, Wang, Zha and Karypis 2022 (arXiv:2210.00038v2, section 3), for a layer whose
per-record gradient is g^T a, with a (T, p) and g (T, d):

    gram          |g^T a|^2 = <a a^T, g g^T>; the clipped sum is one more product of a and g
    instantiate   g^T a itself, (d, p) numbers a record; the clipped sum is a weighted sum of them

A plain backward pass already makes one product of a and g, so that one is no cost of privacy.
"""

from __future__ import annotations

from functools import lru_cache

__all__ = ["SMALL", "gram_is_cheaper"]

SMALL = 2048
"""Weights of at most so many numbers are instantiated into one slab with the others."""

_WRITTEN = 36.0
"""Floating-point operations of a product that a core does in the time in which it writes a number
of an instantiated gradient, reads it for the norm and again for the sum; and about as long takes
a number of a or g that is scaled by its record's factor. Measured, for float32 on AVX-512; the
choice is seldom close."""


@lru_cache(maxsize=4096)
def gram_is_cheaper(T: int, d: int, p: int, held: int) -> bool:
    """Whether (T, T) Gram matrices beat a (d, p) gradient for each record.

    held  numbers of a record's input and output gradient, which are in memory anyway; an
          instantiated gradient of more would be what sets the peak

    >>> gram_is_cheaper(1, 64, 64, 128), gram_is_cheaper(256, 16, 16, 8192)
    (True, False)
    """
    gram = 2.0 * T * T * (d + p) + 10.0 * T * T + _WRITTEN * T * min(d, p)
    whole = _WRITTEN * d * p
    return gram <= whole or (d * p > held and gram <= 4 * whole)
