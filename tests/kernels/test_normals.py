"""The compiled arithmetic of the noise gives what NumPy's does, on every processor."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedfuse.kernels.normals import adder
from fedfuse.privacy import noise
from fedfuse.privacy.noise import NoiseStream
from tests.kernels.levels import LEVELS, load

BLOCK = 14 * noise._EIGHTS
RADIUS_BITS, TURN_BITS = 52, 54


def by_numpy(count: int, std: float) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "adder", lambda *_: None)
        return NoiseStream(bytes(32), "noise").normal(count, std)


@pytest.mark.parametrize(
    "count", [1, 13, 14, 15, 14 * 64, 14 * 64 + 1, 14 * 200 - 13, BLOCK, BLOCK + 1, 200_000]
)
def test_normals_are_those_of_numpy(level: str, count: int) -> None:
    found = NoiseStream(bytes(32), "noise").normal(count, 1.7)
    true = by_numpy(count, 1.7)
    assert float((found - true).abs().max()) <= 2e-14
    # An ulp of float64 is far below one of float32; of these, none falls on the other side.
    assert bool((found.float() == true.float()).all())


def test_they_are_added_to_what_is_there_in_float64(level: str) -> None:
    values = torch.linspace(-3e3, 3e3, 5000)
    expected = (values.double() + by_numpy(5000, 0.3)).float()
    NoiseStream(bytes(32), "noise").add_normal(values, 0.3)
    assert bool((values == expected).all())


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 14 * 70 - 200, 14 * 70 - 1, 14 * 70])
def test_what_lies_beside_the_values_is_left_alone(level: str, count: int, kind: type) -> None:
    """However few of the 14 times 70 are wanted, they are the first of all."""
    words = np.frombuffer(np.random.default_rng(7).bytes(8 * 16 * 70), dtype=np.uint64)
    whole, room = np.zeros(14 * 70, dtype=kind), np.zeros(14 * 70 + 20, dtype=kind)
    for values in (whole, room[10 : 10 + count]):
        add = adder(words, 0.5, values)
        assert add is not None
        add(0, 70)
    assert (whole != 0).all()
    assert (room[10 : 10 + count] == whole[:count]).all()
    assert not room[:10].any()
    assert not room[10 + count :].any()


def test_each_processor_gives_the_same_bits() -> None:
    found = []
    words = np.frombuffer(np.random.default_rng(5).bytes(8 * 16 * 1000), dtype=np.uint64)
    for name in LEVELS:
        kernel = load("normals", name).add_double
        many, at = ctypes.c_int64, ctypes.c_void_p
        kernel.argtypes, kernel.restype = [at, many, ctypes.c_double, at, many], None
        values = np.zeros(14_000)
        kernel(words.ctypes.data, 1000, 0.25, values.ctypes.data, 14_000)
        found.append(values)
    assert all((values == found[0]).all() for values in found)


def pairs(radii: NDArray[np.uint64], turns: NDArray[np.uint64]) -> NDArray[np.float64]:
    """(2, n): what the kernel makes of 52 bits of radius and 54 of angle (n,), seven of eight zero.

    The bits that it has to drop are all set.
    """
    words = np.full((16, len(radii)), 0xFFF << RADIUS_BITS, dtype=np.uint64)  # of length 0
    words[0] |= radii
    words[8:] = 2**10 - 1
    words[8] |= turns << np.uint64(64 - TURN_BITS)
    values = np.zeros((14, len(radii)))
    add = adder(words.reshape(-1), 1.0, values.reshape(-1))
    assert add is not None
    add(0, len(radii))
    assert (np.abs(values.reshape(2, 7, -1)) == np.abs(values[::7, None])).all()
    return values[::7]


def exact(radii: NDArray[np.uint64], turns: NDArray[np.uint64]) -> NDArray[np.longdouble]:
    """The same in the longest floating point there is: from the middle of a quarter of a turn."""
    real = np.longdouble
    length = np.sqrt(-2 * np.log1p(-radii.astype(real) / 2**RADIUS_BITS))
    quarter, place = np.divmod(turns, np.uint64(2 ** (TURN_BITS - 2)))
    angle = (place.astype(real) / 2 ** (TURN_BITS - 2) - real(0.5)) * np.arccos(real(0))
    c, s, turned = np.cos(angle), np.sin(angle), quarter.astype(np.int64)
    return length * np.stack([np.choose(turned, (c, -s, -c, s)), np.choose(turned, (s, c, -s, -c))])


def test_pairs_are_right_to_a_few_ulps(level: str) -> None:
    """Also where u is nearly 0 or 1, and where a number is nearly 0 itself."""
    drawn, count = np.random.default_rng(3), 20_000
    near = drawn.integers(1, 2**60, count, dtype=np.uint64)
    near >>= drawn.integers(9, 60, count, dtype=np.uint64)  # below an eighth of a turn
    radii = [near, np.uint64(2**RADIUS_BITS - 1) - near]
    radii += [drawn.integers(0, 2**RADIUS_BITS, count, dtype=np.uint64)]
    turns = [near + np.uint64(eighth << (TURN_BITS - 3)) for eighth in range(8)]
    turns += [drawn.integers(0, 2**TURN_BITS, count, dtype=np.uint64)]
    for radius, turn in itertools.product(radii, turns):
        true = exact(radius, turn)
        assert (np.abs(pairs(radius, turn) - true) <= 6e-16 * np.abs(true)).all()


@pytest.mark.parametrize("turn", [0, 1, 2 ** (TURN_BITS - 1), 2**TURN_BITS - 1])
@pytest.mark.parametrize("radius", [0, 1, 2**RADIUS_BITS - 1])
def test_the_ends_of_the_range_are_right(level: str, radius: int, turn: int) -> None:
    """u = 1 - radius / 2^52 in (0, 1]."""
    one = np.array([[radius], [turn]], dtype=np.uint64)
    true = exact(*one)
    assert np.isfinite(true).all()
    assert (np.abs(pairs(*one) - true) <= 6e-16 * np.abs(true)).all()
    words = np.full(16, radius, dtype=np.uint64)
    words[8:] = turn << (64 - TURN_BITS)
    values = np.zeros(14)
    add = adder(words, 1.0, values)
    assert add is not None
    add(0, 1)
    # Eight equal ones: all rows of the matrix but the first cancel them.
    assert not values.any()
