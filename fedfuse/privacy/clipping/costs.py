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

SMALL = 4096
"""Weights of at most so many numbers are instantiated into one slab with the others."""

_TRAFFIC = 24.0
"""Floating-point operations that a core does in the time that it moves one number (4 bytes) to
memory or back: 50 GFLOP/s against 8 GB/s. It is higher on a GPU; the choice is seldom close."""


@lru_cache(maxsize=4096)
def gram_is_cheaper(T: int, d: int, p: int, *, unfold: bool = False) -> bool:
    """Whether (T, T) Gram matrices beat a (d, p) gradient for each record.

    `unfold`: a convolution, whose a has to be copied out of its input for the Gram matrix, and
    again for an instantiated gradient.

    >>> gram_is_cheaper(1, 64, 64), gram_is_cheaper(256, 16, 16)
    (True, False)
    """
    # a a^T and g g^T, written and read once each; the factors go onto g or a.
    gram = 2.0 * T * T * (d + p) + _TRAFFIC * (3.0 * T * T + 2.0 * T * min(d, p))
    # Written, read for the norm and for the sum. The product itself is the plain pass's own.
    whole = _TRAFFIC * 3.0 * d * p
    return gram <= whole
