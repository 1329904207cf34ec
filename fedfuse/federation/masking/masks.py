"""Masks: vectors modulo 2^32 that look random to whoever lacks their key of 32 bytes.

ChaCha20's key stream (RFC 8439). Two nodes share a key: one adds the mask, the other takes it away,
so that it is gone from their sum. A key is used for one mask.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

__all__ = ["Masked", "add_mask", "pair_sign"]

Masked = NDArray[np.uint32]
_BLOCK = 1 << 16


def add_mask(values: Masked, key: bytes, sign: int) -> None:
    """Adds the mask of `key` to `values` (d,), or takes it away (`sign` -1), in place."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    for start in range(0, len(values), _BLOCK):
        part = values[start : start + _BLOCK]
        mask = np.frombuffer(stream.update(bytes(4 * len(part))), dtype="<u4")
        if sign > 0:
            part += mask
        else:
            part -= mask


def pair_sign(node: str, other: str) -> int:
    """What `node` does with the mask that it shares with `other`: opposite on the two sides.

    >>> pair_sign("a", "b"), pair_sign("b", "a")
    (1, -1)
    """
    return 1 if node < other else -1
