"""Random numbers that a guarantee may rest on: a ChaCha20 key stream, as uniforms and normals.

Noise that somebody can predict is noise that somebody can remove. torch's generators are
statistical, not cryptographic: their state follows from a few hundred outputs. So sampling and
noise come from ChaCha20 (RFC 8439) under a 256-bit secret, used for one node in one round only.

Guarantees
    Two streams with different (secret, purpose) are independent as far as anyone can tell who
    cannot break ChaCha20 or BLAKE2b. A stream never repeats.
    Normals are sums of four, halved (Holohan and Braghin 2021, arXiv:2107.10138v4, section 5.1),
    made in float64: the low bits of one addition don't give the noise away (Mironov 2012). Of four
    complex normals z come three outputs, H z / 2 with three rows of a Hadamard matrix: its rows are
    orthogonal, so outputs are as independent as the z; and there are fewer of them, so whoever
    would solve for the z has to guess one of them first, some 2^105 possibilities (docs/adr/0001).
    This is a mitigation for floating point, not a discrete mechanism.
Not covered
    Timing of the arithmetic; memory of the node's own machine.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterator

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


_BLOCK = 16384
"""Complex normals made at once: what they need stays in a core's cache."""


class NoiseStream:
    """Uniform and normal numbers from one secret, for one purpose ("sampling", "noise")."""

    def __init__(self, secret: bytes, purpose: str) -> None:
        key = hashlib.blake2b(
            purpose.encode(), key=secret, digest_size=SECRET_BYTES, person=b"fedfuse/stream"
        ).digest()
        # A key is used for one stream, so a fixed nonce repeats nothing.
        self._stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._room = 0

    def uniform(self, count: int) -> NDArray[np.float64]:
        """(count,) float64 in [0, 1), 53 random bits each."""
        return np.asarray((self.words(count) >> np.uint64(11)) * 2.0**-53)

    def words(self, count: int) -> NDArray[np.uint64]:
        """(count,) whole numbers of 64 random bits."""
        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8").astype(np.uint64)

    def normal(self, count: int, std: float) -> Tensor:
        """(count,) float64 normals of mean 0 and standard deviation `std`, on the CPU."""
        out = np.empty(count)
        for start, block in self._blocks(count, std):
            out[start : start + len(block)] = block
        return torch.from_numpy(out)

    def add_normal(self, values: Tensor, std: float) -> None:
        """Adds a normal of deviation `std` to each of `values` (N,), in float64, in place.

        The same numbers as `normal` would give; the sum is cut to the dtype of `values`.
        """
        if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
            noise = self.normal(len(values), std).to(values.device)
            values.copy_(noise.add_(values))
            return
        array = values.numpy()
        for start, block in self._blocks(len(values), std):
            part = array[start : start + len(block)]
            block += part
            part[:] = block

    def _blocks(self, count: int, std: float) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """(start, normals) for consecutive places from 0 to `count`; each holds until the next."""
        start = 0
        while start < count:
            fours = min(_BLOCK // 4, -(-(count - start) // 6))
            block = self._three_of_four(fours, std)[: count - start]
            yield start, block
            start += len(block)

    def _three_of_four(self, fours: int, std: float) -> NDArray[np.float64]:
        """(6 `fours`,) normals, out of 4 `fours` complex ones."""
        pairs = 4 * fours
        if self._room < pairs:
            self._room = pairs
            self._zeros = bytes(16 * pairs)
            self._bytes = np.empty(16 * pairs, dtype=np.uint8)
            self._floats = np.empty((3, pairs))
            self._sums = np.empty(6 * fours)
        drawn = self._bytes[: 16 * pairs]
        self._stream.update_into(memoryview(self._zeros)[: 16 * pairs], drawn.data)
        words = drawn.view("<u8").astype(np.uint64, copy=False)
        words >>= np.uint64(11)
        # Box and Muller 1958: z = sqrt(-2 log u) exp(i angle), u in (0, 1]. An output is a sum of
        # four, halved: that is the 1/4 in front of std^2.
        radius, real, imaginary = self._floats[:, :pairs]
        np.multiply(words[:pairs], -(2.0**-53), out=radius)
        radius += 1.0
        np.log(radius, out=radius)
        radius *= -2.0 * std * std / 4.0
        np.sqrt(radius, out=radius)
        # With t = tan(angle / 2): cos(angle) = 2 / (1 + t^2) - 1, sin(angle) = 2 t / (1 + t^2).
        np.multiply(words[pairs:], math.pi * 2.0**-53, out=imaginary)
        imaginary -= math.pi / 2
        np.tan(imaginary, out=imaginary)
        np.multiply(imaginary, imaginary, out=real)
        real += 1.0
        np.divide(radius, real, out=real)
        real *= 2.0
        imaginary *= real
        real -= radius
        sums = self._sums[: 6 * fours].reshape(3, 2, fours)
        for part, z in enumerate((real.reshape(4, fours), imaginary.reshape(4, fours))):
            _hadamard_rows(z, sums[:, part])
        return sums.reshape(-1)


def _hadamard_rows(z: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    """out (3, n) = [+-+-, ++--, +--+] z, for z (4, n), which is used up."""
    np.add(z[0], z[1], out=out[1])
    np.subtract(z[0], z[1], out=z[0])
    np.add(z[2], z[3], out=z[1])
    np.subtract(z[2], z[3], out=z[2])
    out[1] -= z[1]
    np.add(z[0], z[2], out=out[0])
    np.subtract(z[0], z[2], out=out[2])
