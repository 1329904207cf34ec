"""Random numbers that a guarantee may rest on: an AES-256 key stream, as uniforms and normals.

Noise that somebody can predict is noise that somebody can remove. torch's generators are
statistical, not cryptographic: their state follows from a few hundred outputs. So sampling and
noise come from AES-256 in counter mode (FIPS 197, NIST SP 800-38A section 6.5) under a 256-bit
secret, used for one node in one round only.

Guarantees
    Two streams with different (secret, purpose) are independent as far as anyone can tell who
    cannot break AES-256 or BLAKE2b. A stream never repeats: no number is added to two sums, also
    where numbers are made ahead of the sum that they are for (see `NoiseStream`).
    Blocks of one key never coincide, which those of true randomness do at times: n blocks can be
    told from it with an advantage of n^2 / 2^129 at most. For 10^8 parameters and 10^4 steps under
    one key n is 5.7 10^11 (9.1 TB), and the advantage 5 10^-16; times 1 + e^epsilon, delta pays it.
    Normals are sums of eight over sqrt(8) (Holohan and Braghin 2021, arXiv:2107.10138v4, section
    5.1, add up four), made in float64: the low bits of one addition don't give the noise away
    (Mironov 2012). Of eight complex normals z come seven outputs, H z / sqrt(8) with seven rows of
    a Hadamard matrix: its rows are orthogonal, so outputs are as independent as the z; and there
    are fewer of them, so whoever would solve for the z has to guess one of them first, some 2^105
    possibilities (docs/adr/0001).
    This is a mitigation for floating point, not a discrete mechanism.
Not covered
    Timing of the arithmetic, and of AES where the processor has no instructions for it (OpenSSL
    then takes code whose time does not depend on the key on x86-64 and 64-bit ARM, not on all
    others); memory of the node's own machine.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from fedfuse.kernels.normals import adder
from fedfuse.privacy.pieces import Pieces

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


_EIGHTS = 3136
"""Eights of complex normals made at once: what they need stays in a core's second cache. Not a
multiple of 512: rows that lie whole pages apart would share the same few places of the first."""
_PIECE = 4 * 14 * _EIGHTS
"""Normals that a thread makes before it looks for more to do, where there are several threads."""
_WORTH = 100_000
"""Normals that take so long (0.2 to 0.6 ms) that making them ahead is worth handing them over."""
_CIPHER_BLOCK = 16
_PAIR = 16
"""Bytes of the key stream that a complex normal takes."""
_ZEROS = memoryview(bytes(8 * _PAIR * _EIGHTS))


class NoiseStream:
    """Uniform and normal numbers from one secret, for one purpose ("sampling", "noise").

    threads  make the normals together when they are asked for; idle: cores that nothing else uses
             meanwhile, on which `make_ahead` can work. The numbers are the same, whatever both are

    Why no number is given out twice: a number follows from the key and from its place in the key
    stream, and whoever asks is given the next place. That place only grows, and moves before a
    number is made or added. What was made ahead is marked with the place, the count and the
    deviation that it was made for, so only the call that would have made it right then finds it,
    and takes it out before it adds it. So a step that breaks off before its noise is added leaves
    behind numbers that are in no sum yet; one that breaks off while it is added has used them up;
    and two steps on one stream have two places, whichever was begun first. Not covered: copies of
    a stream, by fork or otherwise, which would give the same numbers; nothing here makes one.
    """

    def __init__(self, secret: bytes, purpose: str, *, threads: int = 1, idle: int = 0) -> None:
        self._key = hashlib.blake2b(
            purpose.encode(), key=secret, digest_size=SECRET_BYTES, person=b"fedfuse/stream"
        ).digest()
        self._threads, self._idle = threads, idle
        self._used = 0
        """Bytes of the key stream; none of them is used again."""
        self._source = _Source(self._key, 0)
        self._ahead: _Ahead | None = None
        self._buffer: Tensor | None = None

    def uniform(self, count: int) -> NDArray[np.float64]:
        """(count,) float64 in [0, 1), 53 random bits each."""
        return np.asarray((self.words(count) >> np.uint64(11)) * 2.0**-53)

    def words(self, count: int) -> NDArray[np.uint64]:
        """(count,) whole numbers of 64 random bits."""
        self._used += 8 * count
        return self._source.words(count)

    def normal(self, count: int, std: float) -> Tensor:
        """(count,) float64 normals of mean 0 and standard deviation `std`, on the CPU."""
        out = np.zeros(count)
        self._add(out, std)
        return torch.from_numpy(out)

    def make_ahead(self, values: Tensor, std: float, *, after: int = 0) -> None:
        """Begins to make what ``add_normal(values, std)`` will add, once `after` normals have been
        drawn by one call before it.

        Returns at once. Does nothing for few `values`, nor where all cores have work: for values on
        a GPU one thread at least is free, else as many as are `idle`. Takes 8 bytes a value. They
        are kept for the next time, and hold the noisy sum once `add_normal` has used them; beside
        a GPU they are pinned, and go back to torch, which hands them out again.
        """
        on_gpu = values.device.type == "cuda"
        helpers = max(self._idle, self._threads - 1, 1) if on_gpu else self._idle
        if helpers == 0 or len(values) < _WORTH:
            return
        first = self._used + _bytes_of(after)
        place = _Place(first=first, count=len(values), std=std, process=os.getpid())
        if self._ahead is not None:
            if self._ahead.place == place:
                return  # of a step that was broken off
            self._ahead.pieces.cancel()
        numbers, self._buffer = self._buffer, None
        if numbers is None or len(numbers) != len(values):
            numbers = torch.empty(len(values), dtype=torch.float64, pin_memory=on_gpu)
        target = numbers.numpy()

        def make(start: int) -> None:
            part = target[start : start + _PIECE]
            part[:] = 0
            self._at(first, start).add_normals(part, std)

        pieces = Pieces(make, range(0, len(values), _PIECE), helpers)
        self._ahead = _Ahead(place=place, numbers=numbers, pieces=pieces)

    def add_normal(self, values: Tensor, std: float) -> None:
        """Adds a normal of deviation `std` to each of `values` (N,), in float64, in place.

        The same numbers as `normal` would give; the sum is cut to the dtype of `values`.
        """
        place = _Place(first=self._used, count=len(values), std=std, process=os.getpid())
        ahead = self._ahead
        if ahead is not None and ahead.place == place:
            self._ahead = None
            self._move(len(values))
            ahead.pieces.finish(self._threads - 1)
            noise = ahead.numbers.to(values.device, non_blocking=True)
            values.copy_(noise.add_(values))
            if noise is ahead.numbers:
                self._buffer = noise
            # Else a GPU may still be reading them: torch reuses pinned memory once it has.
            return
        if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
            noise = self.normal(len(values), std).to(values.device)
            values.copy_(noise.add_(values))
            return
        self._add(values.numpy(), std)

    def _add(self, values: NDArray[Any], std: float) -> None:
        count = len(values)
        if self._threads == 1 or count <= _PIECE:
            self._used += _bytes_of(count)
            self._source.add_normals(values, std)
            return
        first = self._move(count)

        def add(start: int) -> None:
            self._at(first, start).add_normals(values[start : start + _PIECE], std)

        Pieces(add, range(0, count, _PIECE), self._threads - 1).finish()

    def _move(self, count: int) -> int:
        """The place of the next `count` normals, which are the caller's from now on."""
        first = self._used
        self._used += _bytes_of(count)
        self._source = _Source(self._key, self._used)
        return first

    def _at(self, first: int, start: int) -> _Source:
        """Gives the normals from number `start` on of those that begin at `first`."""
        return _Source(self._key, first + _bytes_of(start))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """What normals are: from which byte of the key stream on, how many, of which deviation."""

    first: int
    count: int
    std: float
    process: int
    """Threads of another process make nothing in this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ahead:
    """Normals that are being made, or are there, before somebody asks for them."""

    place: _Place
    numbers: Tensor
    pieces: Pieces


def _bytes_of(normals: int) -> int:
    """Of the key stream, what so many normals take: for fourteen of them, eight pairs."""
    return -(-normals // 14) * 8 * _PAIR


class _Source:
    """A key stream of AES-256 in counter mode from its byte `start` on, as words and as normals."""

    def __init__(self, key: bytes, start: int) -> None:
        # A key is used for one stream, whose first block has the number 0: no number comes twice.
        block, rest = divmod(start, _CIPHER_BLOCK)
        counter = modes.CTR(block.to_bytes(_CIPHER_BLOCK, "big"))
        self._stream = Cipher(algorithms.AES(key), counter).encryptor()
        self._stream.update(bytes(rest))

    def words(self, count: int) -> NDArray[np.uint64]:
        """(count,) whole numbers of 64 random bits."""
        drawn = np.empty(count, dtype="<u8")
        self._fill(drawn.data.cast("B"))
        return drawn.astype(np.uint64, copy=False)

    def add_normals(self, values: NDArray[Any], std: float) -> None:
        """Adds normals of deviation `std` to `values` (N,), in float64."""
        scale = std / math.sqrt(8.0)  # an output is a sum of eight normals over sqrt(8)
        most = min(_EIGHTS, -(-len(values) // 14))
        drawn = np.empty(16 * most, dtype="<u8")
        add = adder(drawn, scale, values) or _adder(drawn, scale, values)
        room = drawn.data.cast("B")
        for start in range(0, len(values), 14 * _EIGHTS):
            eights = min(most, -(-(len(values) - start) // 14))
            self._fill(room[: 8 * _PAIR * eights])
            add(start, eights)

    def _fill(self, drawn: memoryview) -> None:
        for start in range(0, len(drawn), len(_ZEROS)):
            part = drawn[start : start + len(_ZEROS)]
            self._stream.update_into(_ZEROS[: len(part)], part)


def _adder(
    words: NDArray[np.uint64], scale: float, values: NDArray[Any]
) -> Callable[[int, int], None]:
    """What `fedfuse.kernels.normals.adder` gives, where that gives nothing; it uses `words` up."""
    floats, sums = np.empty((3, len(words) // 2)), np.empty(14 * len(words) // 16)

    def add(start: int, eights: int) -> None:
        part, pairs = values[start : start + 14 * eights], 8 * eights
        bits = words[: 2 * pairs].astype(np.uint64, copy=False)
        outputs = sums[: 14 * eights]
        _seven_of_eight(bits, scale, floats[:, :pairs], outputs.reshape(2, 7, eights))
        normals = outputs[: len(part)]
        normals += part
        part[:] = normals

    return add


def _seven_of_eight(
    words: NDArray[np.uint64], scale: float, work: NDArray[np.float64], out: NDArray[np.float64]
) -> None:
    """out (2, 7, n) = normals, out of 8 n complex ones, of words (16 n,).

    Uses `words` and `work` (3, 8 n) up. `fedfuse/kernels/normals.c` does the same.
    """
    radius, real, imaginary = work
    pairs = len(radius)
    # Box and Muller 1958: z = sqrt(-2 log u) exp(i angle), u in (0, 1].
    np.copyto(imaginary, words[pairs:].view(np.int64))
    first = words[:pairs]
    first &= np.uint64(2**52 - 1)
    first |= np.uint64(0x3FF << 52)
    np.subtract(2.0, first.view(np.float64), out=radius)  # 52 random bits
    np.log(radius, out=radius)
    radius *= -2.0 * scale * scale
    np.sqrt(radius, out=radius)
    # With t = tan(angle / 2): cos(angle) = 2 / (1 + t^2) - 1, sin(angle) = 2 t / (1 + t^2).
    imaginary *= math.pi * 2.0**-64
    imaginary -= math.pi / 8.0  # the middle of a quarter, from which normals.c counts
    np.tan(imaginary, out=imaginary)
    np.multiply(imaginary, imaginary, out=real)
    real += 1.0
    np.divide(radius, real, out=real)
    real *= 2.0
    imaginary *= real
    real -= radius
    for z, rows in zip((real, imaginary), out, strict=True):
        _hadamard_rows(z.reshape(8, -1), radius.reshape(8, -1), rows)


def _hadamard_rows(z: NDArray[np.float64], work: NDArray[np.float64], out: Any) -> None:
    """out (7, n) = all rows but the first of a Hadamard matrix (8, 8) times z (8, n).

    Uses z and `work` (8, n) up.
    """
    np.add(z[0::2], z[1::2], out=work[0::2])
    np.subtract(z[0::2], z[1::2], out=work[1::2])
    fours, halves = work.reshape(2, 2, 2, -1), z.reshape(2, 2, 2, -1)
    np.add(fours[:, 0], fours[:, 1], out=halves[:, 0])
    np.subtract(fours[:, 0], fours[:, 1], out=halves[:, 1])
    np.add(z[1:4], z[5:8], out=out[:3])
    np.subtract(z[:4], z[4:], out=out[3:])
