"""Random numbers that a guarantee may rest on: a ChaCha20 key stream, as uniforms and normals.

Noise that somebody can predict is noise that somebody can remove. torch's generators are
statistical, not cryptographic: their state follows from a few hundred outputs. So sampling and
noise come from ChaCha20 (RFC 8439) under a 256-bit secret, used for one node in one round only.

Guarantees
    Two streams with different (secret, purpose) are independent as far as anyone can tell who
    cannot break ChaCha20 or BLAKE2b. A stream never repeats.
    Normals are sums of four, halved (Holohan and Braghin 2021, arXiv:2107.10138v4, section 5.1,
    n = 2), made in float64: the low bits of one addition don't give the noise away
    (Mironov 2012). This is a mitigation for floating point, not a discrete mechanism.
Not covered
    Timing of the arithmetic; memory of the node's own machine.
"""

from __future__ import annotations

import hashlib
import math
import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["NoiseStream", "round_secret"]

SECRET_BYTES = 32


def round_secret(noise_seed: str, node: str, round: int) -> bytes:
    """32 secret bytes for one node in one round.

    With an empty `noise_seed` they come from the operating system's entropy, anew at each call;
    otherwise they follow from the three arguments, so a simulation can be repeated, and the noise
    can be removed by whoever knows the seed.

    >>> round_secret("s", "a", 1) == round_secret("s", "a", 1) != round_secret("s", "a", 2)
    True
    >>> round_secret("", "a", 1) == round_secret("", "a", 1)
    False
    """
    if not noise_seed:
        return secrets.token_bytes(SECRET_BYTES)
    text = f"{len(noise_seed)}:{noise_seed}{len(node)}:{node}{round}"
    return hashlib.blake2b(
        text.encode(), digest_size=SECRET_BYTES, person=b"fedfuse/round"
    ).digest()


class NoiseStream:
    """Uniform and normal numbers from one secret, for one purpose ("sampling", "noise")."""

    def __init__(self, secret: bytes, purpose: str) -> None:
        key = hashlib.blake2b(
            purpose.encode(), key=secret, digest_size=SECRET_BYTES, person=b"fedfuse/stream"
        ).digest()
        # A key is used for one stream, so a fixed nonce repeats nothing.
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()

    def uniform(self, count: int) -> NDArray[np.float64]:
        """(count,) float64 in [0, 1), 53 random bits each."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")
        return np.asarray((words >> np.uint64(11)) * 2.0**-53)

    def normal(self, count: int, std: float) -> Tensor:
        """(count,) float64 normals of mean 0 and standard deviation `std`, on the CPU."""
        pairs = 2 * count  # 4 normals for each output, 2 a pair (Box and Muller 1958)
        uniform = torch.from_numpy(self.uniform(2 * pairs)).view(2, pairs)
        radius = torch.sqrt(-2.0 * torch.log1p(-uniform[0]))  # 1 - u lies in (0, 1]
        angle = uniform[1].mul_(2.0 * math.pi)
        four = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)]).view(4, count)
        return four.sum(0).mul_(0.5 * std)
