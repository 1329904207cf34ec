"""The compiled arithmetic of the noise gives what NumPy's does, on every processor."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from fedfuse.kernels import normals
from fedfuse.privacy import noise
from fedfuse.privacy.noise import NoiseStream
from tests.kernels.levels import LEVELS, load


def by_numpy(count: int, std: float) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "add_normals", lambda *_: False)
        return NoiseStream(bytes(32), "noise").normal(count, std)


@pytest.mark.parametrize("count", [1, 13, 14, 15, 900, 43_008, 43_009, 200_000])
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


def test_each_processor_gives_the_same_bits() -> None:
    found = []
    words = np.frombuffer(np.random.default_rng(5).bytes(8 * 16 * 1000), dtype=np.uint64)
    for name in LEVELS:
        kernel = load("normals", name).add_float64
        kernel.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_double] + [ctypes.c_void_p] * 2
        kernel.restype = None
        values = np.zeros(14_000)
        kernel(words.ctypes.data, 1000, -0.25, values.ctypes.data, 14_000)
        found.append(values)
    assert all((values == found[0]).all() for values in found)


@pytest.mark.parametrize("angle", [0, 1, 2**51, 2**52 - 1])
@pytest.mark.parametrize("radius", [0, 1, 2**52 - 1])
def test_the_ends_of_the_range_are_right(level: str, radius: int, angle: int) -> None:
    """u = 1 - radius / 2^52 in (0, 1], and a turn of angle / 2^52 - 1/2."""
    words = np.full(16, 0xFFF, dtype=np.uint64)  # bits that are dropped
    words[:8] |= np.uint64(radius << 12)
    words[8:] |= np.uint64(angle << 12)
    values = np.zeros(14)
    assert normals.add_normals(words, 1, -2.0 / 8.0, values)
    length = np.sqrt(-2.0 / 8.0 * np.log(1 - radius / 2**52))
    turn = 2 * np.pi * (angle / 2**52 - 0.5)
    # Eight equal ones: all rows of the matrix but the first cancel them.
    assert np.allclose(values, 0, atol=1e-15 * max(1.0, length))
    words[1:8] = 0xFFF  # all but the first have length 0
    values[:] = 0
    assert normals.add_normals(words, 1, -2.0 / 8.0, values)
    assert np.allclose(np.abs(values[:7]), abs(length * np.cos(turn)), rtol=1e-14, atol=1e-15)
    assert np.allclose(np.abs(values[7:]), abs(length * np.sin(turn)), rtol=1e-14, atol=1e-15)
    assert np.sign(values[0]) == np.sign(length * np.cos(turn))
