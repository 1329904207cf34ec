"""Noise has the standard deviation that the accountant was told, from streams that never meet.

False alarms: each statistical test has fixed secrets, so it gives the same answer every time; its
bounds stand 4.5 standard errors away, which for a fresh secret would fail once in 100,000 runs.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import nn

from fedfuse.privacy import noise
from fedfuse.privacy.dpsgd import PrivateOptimizer
from fedfuse.privacy.noise import NoiseStream, round_secret
from fedfuse.privacy.sampling import poisson_batches, shuffled_batches

SIGMA, CLIP, DIVISOR = 1.7, 0.4, 16.0


def noisy_gradients(sigma: float, count: int = 40_000) -> torch.Tensor:
    """What a step's gradient is where no record was drawn: noise over the public divisor."""
    model = nn.Linear(count, 1, bias=False)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        noise_multiplier=sigma,
        clip_norm=CLIP,
        expected_batch=DIVISOR,
        stream=NoiseStream(b"1" * 32, "noise"),
    )
    model.weight.summed_grad = torch.zeros_like(model.weight)
    optimizer.pre_step()
    return model.weight.grad.detach().flatten().double()


def has_std(sample: torch.Tensor, std: float) -> bool:
    """Whether `sample` looks normal with mean 0 and this standard deviation (4.5 errors)."""
    n = len(sample)
    error = 4.5 / math.sqrt(n)
    second = float((sample / std).square().mean())
    fourth = float((sample / std).pow(4).mean())
    return (
        abs(float(sample.mean()) / std) < error
        and abs(second - 1) < error * math.sqrt(2)
        and abs(fourth - 3) < error * math.sqrt(96)
    )


def test_noise_has_the_declared_sigma() -> None:
    assert has_std(noisy_gradients(SIGMA), SIGMA * CLIP / DIVISOR)


@pytest.mark.parametrize("factor", [2 / 3, 0.95, 1.05, 1.5])
def test_noise_of_another_sigma_is_rejected(factor: float) -> None:
    assert not has_std(noisy_gradients(SIGMA * factor), SIGMA * CLIP / DIVISOR)


def test_noise_coordinates_are_uncorrelated() -> None:
    found = noisy_gradients(SIGMA)
    found = found / found.std()
    # Outputs of the same eight normals stand a 14th of 40,004 apart, real and imaginary half of it.
    for lag in (1, 2, 3, 7, 64, 2857, 2858, 2 * 2858, 7 * 2858):
        assert abs(float((found[lag:] * found[:-lag]).mean())) < 4.5 / math.sqrt(len(found) - lag)


def test_streams_differ_between_rounds_nodes_and_purposes() -> None:
    secrets = {
        round_secret(seed, node, round)
        for seed in ("a", "b")
        for node in ("x", "y", "x1")
        for round in (1, 11, 2)
    }
    assert len(secrets) == 18
    first = [
        tuple(NoiseStream(secret, purpose).uniform(4))
        for secret in secrets
        for purpose in ("noise", "sampling")
    ]
    assert len(set(first)) == 36


def test_node_names_cannot_be_chosen_to_share_a_stream() -> None:
    assert round_secret("s", "a1", 1) != round_secret("s", "a", 11)
    assert round_secret("s1:a", "b", 1) != round_secret("s", "1:ab", 1)


def test_unseeded_secrets_never_repeat() -> None:
    assert len({round_secret("", "node", 1) for _ in range(100)}) == 100


def test_a_stream_goes_on_and_does_not_start_again() -> None:
    stream = NoiseStream(bytes(32), "noise")
    assert not torch.equal(stream.normal(50, 1.0), stream.normal(50, 1.0))


@pytest.mark.parametrize("start", [0, 1, 15, 16, 2**36 - 37, 2**68 - 8, 10**20])
def test_words_are_encrypted_counters(start: int) -> None:
    """From any byte on, also beyond 32 and 64 bits of counter, and for more than a block."""
    key, count = bytes(range(32)), 2 * len(noise._ZEROS) // 8 + 3
    numbers = range(start // 16, (start + 8 * count) // 16 + 1)
    counters = b"".join(number.to_bytes(16, "big") for number in numbers)
    encrypted = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counters)
    found = noise._Source(key, start).words(count).astype("<u8").tobytes()
    assert found == encrypted[start % 16 :][: 8 * count]


def test_words_are_those_of_the_standard() -> None:
    """NIST SP 800-38A, appendix F.5.5: the output blocks of AES-256 in counter mode."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    first = int("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", 16)
    found = noise._Source(key, 16 * first).words(8).astype("<u8").tobytes().hex()
    assert found == (
        "0bdf7df1591716335e9a8b15c860c5025a6e699d536119065433863c8f657b94"
        "1bc12c9c01610d5d0d8bd6a3378eca622956e1c8693536b1bee99c73a31576b6"
    )


def test_several_threads_make_the_same_noise_and_go_on_after_it() -> None:
    """Also where the stream stands in the middle of a cipher's block, and where nothing is left."""
    one, three = (NoiseStream(b"t" * 32, "noise", threads=threads) for threads in (1, 3))
    for count in (5, 300_001, 0, 14, 1 << 18):
        assert torch.equal(one.normal(count, 1.3), three.normal(count, 1.3))
        assert (one.words(3) == three.words(3)).all()


def test_outputs_of_one_block_are_orthogonal_and_one_row_is_kept_back() -> None:
    """Eight complex normals make seven: whoever sees them all cannot solve for the eight."""
    rows = np.zeros((7, 8))
    for place in range(8):
        unit, out = np.zeros((8, 1)), np.zeros((7, 1))
        unit[place] = 1
        noise._hadamard_rows(unit, np.empty((8, 1)), out)
        rows[:, place] = out[:, 0]
    assert (rows @ rows.T == 8 * np.eye(7)).all()
    assert (rows.sum(1) == 0).all()  # the one that is missing


def test_torch_seed_does_not_touch_noise() -> None:
    """Two nodes that set the same torch seed must not draw the same noise."""
    torch.manual_seed(0)
    one = NoiseStream(round_secret("", "a", 1), "noise").normal(50, 1.0)
    torch.manual_seed(0)
    two = NoiseStream(round_secret("", "b", 1), "noise").normal(50, 1.0)
    assert not torch.equal(one, two)


def test_uniforms_fill_the_unit_interval() -> None:
    sample = NoiseStream(b"u" * 32, "sampling").uniform(100_000)
    assert sample.min() >= 0.0
    assert sample.max() < 1.0
    counts, _ = np.histogram(sample, bins=50, range=(0, 1))
    chi2 = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi2 < 49 + 4.5 * math.sqrt(2 * 49)


def test_poisson_draws_each_record_on_its_own_at_the_declared_rate() -> None:
    records, rate, steps = 40, 0.3, 4000
    drawn = np.zeros((steps, records), dtype=bool)
    stream = NoiseStream(b"p" * 32, "sampling")
    for row, batch in zip(drawn, poisson_batches(records, rate, steps, stream), strict=True):
        assert len(set(batch)) == len(batch)
        row[batch] = True
    error = 4.5 * math.sqrt(rate * (1 - rate) / steps)
    assert np.abs(drawn.mean(0) - rate).max() < error
    sizes = drawn.sum(1)
    spread = records * rate * (1 - rate)
    assert abs(sizes.var() / spread - 1) < 4.5 * math.sqrt(2 / steps)
    pairs = np.corrcoef(drawn.T)
    np.fill_diagonal(pairs, 0)
    assert np.abs(pairs).max() < 5.5 / math.sqrt(steps)  # 780 pairs at once


@pytest.mark.parametrize("records", [0, 1, 7, 33])
def test_rate_is_the_declared_one_whatever_the_data_size(records: int) -> None:
    """Rates derived from a loader's length would leak it: 1/len(loader) is 0.5 for 33 of 32."""
    steps, rate = 6000, 0.25
    stream = NoiseStream(b"r" * 32, "sampling")
    total = sum(len(rows) for rows in poisson_batches(records, rate, steps, stream))
    expected = steps * records * rate
    assert abs(total - expected) <= 4.5 * math.sqrt(expected * (1 - rate))


def test_empty_batches_are_steps() -> None:
    stream = NoiseStream(b"e" * 32, "sampling")
    sizes = [len(rows) for rows in poisson_batches(3, 0.05, 200, stream)]
    assert len(sizes) == 200
    assert 0 in sizes


def test_shuffled_batches_pass_over_every_record() -> None:
    stream = NoiseStream(bytes(32), "order")
    rows = np.concatenate(list(shuffled_batches(10, 4, 6, stream)))
    assert sorted(rows) == sorted([*range(10), *range(10)])


def test_shuffled_batches_of_no_records_are_empty() -> None:
    assert [len(b) for b in shuffled_batches(0, 4, 3, NoiseStream(bytes(32), "order"))] == [0, 0, 0]
