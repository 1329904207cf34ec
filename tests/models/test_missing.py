"""Modality dropout hides at its rate, never all, and each record by its own numbers."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.batch import Batch
from fedfuse.models.missing import drop_modalities


def batch_of(there: torch.Tensor) -> Batch:
    names = [f"m{k}" for k in range(there.shape[1])]
    present = {name: there[:, k] for k, name in enumerate(names)}
    inputs = {name: torch.ones(len(there), 2) for name in names}
    return Batch(inputs, present, torch.zeros(len(there)))


def shown(batch: Batch) -> torch.Tensor:
    return torch.stack(list(batch.present.values()), 1)


@given(
    rows=st.integers(0, 6),
    modalities=st.integers(1, 4),
    chance=st.floats(0.0, 0.95),
    seed=st.integers(0, 1000),
)
def test_a_record_keeps_something_and_gains_nothing(
    rows: int, modalities: int, chance: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    there = torch.from_numpy(rng.random((rows, modalities)) < 0.6)
    uniform = rng.random(rows * modalities)
    left = shown(drop_modalities(batch_of(there), chance, uniform))
    assert not (left & ~there).any()
    assert torch.equal(left.any(1), there.any(1))
    for row in range(rows):  # by its own numbers alone
        own = uniform[row * modalities : (row + 1) * modalities]
        alone = drop_modalities(batch_of(there[row : row + 1]), chance, own)
        assert torch.equal(shown(alone)[0], left[row])
    if chance == 0:
        assert torch.equal(left, there)


def test_modalities_are_hidden_at_the_rate_asked_for() -> None:
    rng = np.random.default_rng(0)
    there = torch.ones(20_000, 2, dtype=torch.bool)
    left = shown(drop_modalities(batch_of(there), 0.3, rng.random(40_000))).float().mean(0)
    # Hidden with 0.3, but for half of the 0.09 in which both would be. Five standard errors.
    assert (left - (1 - 0.3 + 0.09 / 2)).abs().max() < 5 * (0.25 / 20_000) ** 0.5
