"""Shifts move each record by its own numbers, within what is asked for, and lose nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.batch import Batch, Kind, Modality, Schema, Target, TargetKind
from fedfuse.models.model import build_model
from fedfuse.models.shifts import Shift, moved, shift_records, shifts_of
from fedfuse.models.spec import ModelConfig

SCHEMA = Schema(
    modalities=(
        Modality(name="photo", kind=Kind.IMAGE, shape=(1, 20, 30)),
        Modality(name="sound", kind=Kind.AUDIO, shape=(8, 40)),
        Modality(name="walk", kind=Kind.SERIES, shape=(50, 3)),
        Modality(name="clip", kind=Kind.VIDEO, shape=(4, 3, 10, 10)),
        Modality(name="note", kind=Kind.TEXT, shape=(6,)),
    ),
    target=Target(kind=TargetKind.REGRESSION),
)


def test_time_and_place_are_found_by_kind() -> None:
    assert shifts_of(SCHEMA, ModelConfig()) == ()
    assert build_model(SCHEMA, ModelConfig(time_shift=0.1), vocabulary=9).shifts == (
        Shift("sound", 2, 4),
        Shift("walk", 1, 5),
    )
    assert shifts_of(SCHEMA, ModelConfig(image_shift=0.1)) == (
        Shift("photo", 2, 2),
        Shift("photo", 3, 3),
        Shift("clip", 3, 1),
        Shift("clip", 4, 1),
    )


@given(
    rows=st.integers(0, 5),
    axis=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_a_row_moves_as_a_loop_would_move_it(rows: int, axis: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((rows, 3, 4, 5)))
    by = rng.integers(-6, 7, rows)
    found = moved(x, torch.from_numpy(by), axis)
    for row in range(rows):
        for place in range(x.shape[axis]):
            source = place - by[row]
            inside = 0 <= source < x.shape[axis]
            there = x[row].select(axis - 1, place if not inside else int(source))
            wanted = there if inside else torch.zeros_like(there)
            assert torch.equal(found[row].select(axis - 1, place), wanted)


def test_a_record_moves_by_its_own_numbers_alike_often_each_way() -> None:
    line = torch.zeros(20_000, 9)
    line[:, 4] = 1
    shifts = (Shift("x", 1, 2),)
    uniform = np.random.default_rng(0).random(20_000)
    batch = Batch({"x": line}, {"x": torch.ones(20_000, dtype=torch.bool)}, torch.zeros(20_000))
    found = shift_records(batch, shifts, uniform)
    # Five places, each a fifth of the records, within five standard errors.
    shares = found.inputs["x"].mean(0)
    assert shares[[0, 1, 7, 8]].eq(0).all()
    assert (shares[2:7] - 0.2).abs().max() < 5 * (0.16 / 20_000) ** 0.5
    for row in (0, 7, 19_999):
        alone = shift_records(batch[slice(row, row + 1)], shifts, uniform[row : row + 1])
        assert torch.equal(alone.inputs["x"][0], found.inputs["x"][row])
    assert torch.equal(batch.inputs["x"], line)


@pytest.mark.parametrize("edge", [0.0, np.nextafter(1.0, 0.0)])
def test_the_furthest_move_is_the_one_asked_for(edge: float) -> None:
    line = torch.arange(1.0, 8.0)[None]
    batch = Batch({"x": line}, {"x": torch.ones(1, dtype=torch.bool)}, torch.zeros(1))
    found = shift_records(batch, (Shift("x", 1, 3),), np.array([edge])).inputs["x"][0].tolist()
    assert found == ([4, 5, 6, 7, 0, 0, 0] if edge == 0 else [0, 0, 0, 1, 2, 3, 4])
