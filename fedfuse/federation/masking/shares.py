"""A secret in shares: t of them give it back, fewer say nothing of it.

Shamir 1979 ("How to Share a Secret"), over the prime field of 2^521 - 1: the secret is a
polynomial's value at 0, a share its value elsewhere, and t - 1 coefficients come from the operating
system. A wrong share gives a wrong secret: whoever puts one together must have something to
compare it with.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedfuse.errors import WireError

__all__ = ["SHARE_BYTES", "combine", "split"]

_PRIME = 2**521 - 1
SHARE_BYTES = 66
_SECRET_BYTES = 32


def split(secret: bytes, places: Sequence[int], threshold: int) -> list[bytes]:
    """The shares of a secret of 32 bytes at `places` (whole numbers from 1, none twice)."""
    if len(secret) != _SECRET_BYTES:
        raise ValueError(f"a secret of {len(secret)} bytes")
    if min(places) < 1 or len(set(places)) != len(places) or not 1 <= threshold <= len(places):
        raise ValueError("places must be from 1, none twice, and as many as the threshold or more")
    start = int.from_bytes(secret, "big")
    polynomial = [secrets.randbelow(_PRIME) for _ in range(threshold - 1)] + [start]
    return [_at(polynomial, place).to_bytes(SHARE_BYTES, "big") for place in places]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret, from `threshold` or more shares by place.

    Raises WireError where there are fewer, where one is none, or where they give no secret.
    """
    if len(shares) < threshold:
        raise WireError(f"{len(shares)} shares, but {threshold} are needed")
    places = tuple(sorted(shares)[:threshold])
    values = [_number(shares[place]) for place in places]
    secret = sum(w * v for w, v in zip(_weights(places), values, strict=True)) % _PRIME
    if secret >= 1 << (8 * _SECRET_BYTES):
        raise WireError("the shares of a secret do not fit each other")
    return secret.to_bytes(_SECRET_BYTES, "big")


def _at(polynomial: Sequence[int], x: int) -> int:
    """Horner; the coefficients from the highest to that of x^0."""
    value = 0
    for coefficient in polynomial:
        value = (value * x + coefficient) % _PRIME
    return value


@lru_cache(maxsize=8)
def _weights(places: tuple[int, ...]) -> tuple[int, ...]:
    """What the values at `places` count at 0 (Lagrange)."""
    weights = []
    for place in places:
        over, under = 1, 1
        for other in places:
            if other != place:
                over = over * other % _PRIME
                under = under * (other - place) % _PRIME
        weights.append(over * pow(under, -1, _PRIME) % _PRIME)
    return tuple(weights)


def _number(share: bytes) -> int:
    number = int.from_bytes(share, "big")
    if len(share) != SHARE_BYTES or number >= _PRIME:
        raise WireError("a share is none")
    return number
