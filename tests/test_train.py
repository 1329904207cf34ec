"""One node, one round: what a job does to the weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedfuse import train
from fedfuse.batch import Batch
from fedfuse.errors import ModelError
from fedfuse.evaluate import predict
from fedfuse.privacy import noise
from fedfuse.privacy.noise import NoiseStream
from fedfuse.privacy.pieces import Pieces
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.train import Job, Trainer, idle_cores, pick_device

CPU = torch.device("cpu")
SECRET = b"s" * 32


class Line(nn.Module):
    """y = w x + b over the batch's only modality."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.layer(batch.inputs["x"])


class Points:
    """Records on a plane."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.x = torch.from_numpy(rng.standard_normal((count, 2)).astype(np.float32))
        self.y = self.x @ torch.tensor([1.0, -2.0]) + 0.5
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        self.seen.append(len(rows))
        picked = torch.from_numpy(rows)
        present = torch.ones(len(rows), dtype=torch.bool)
        return Batch({"x": self.x[picked]}, {"x": present}, self.y[picked])


def squares(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (outputs.squeeze(-1) - target).square()


PLAIN = Job(steps=60, optimizer="sgd", learning_rate=0.1, momentum=0.0, batch_size=10)
PRIVATE = replace(
    PLAIN,
    expected_batch=20.0,
    mechanism=Mechanism(
        unit=Unit.RECORD, sample_rate=0.5, noise_multiplier=0.5, clip_norm=1.0, steps=60
    ),
)


def trainer() -> Trainer:
    torch.manual_seed(0)
    return Trainer(Line(), squares, CPU)


@pytest.mark.parametrize("job", [PLAIN, PRIVATE, replace(PLAIN, optimizer="adam", momentum=0.9)])
def test_training_learns(job: Job) -> None:
    points, t = Points(40), trainer()

    def error() -> float:
        return squares(t.model(points.batch(np.arange(40))), points.y).mean().item()

    before = error()
    t.run(points, job, secret=SECRET)
    assert error() < before / 3


@pytest.mark.parametrize("job", [PLAIN, PRIVATE])
def test_same_secret_gives_the_same_weights_and_another_does_not(job: Job) -> None:
    found = []
    for secret in (SECRET, SECRET, b"t" * 32):
        t = trainer()
        t.run(Points(40), job, secret=secret)
        found.append(t.weights()["layer.weight"])
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_a_trainer_used_again_carries_nothing_over() -> None:
    """Private, plain, then private again on one trainer: as if each had a trainer of its own."""
    start = trainer().weights()
    used = trainer()
    for job in (replace(PRIVATE, momentum=0.9), PLAIN, PRIVATE):
        used.load(start)
        used.run(Points(40), job, secret=SECRET)
        fresh = trainer()
        fresh.run(Points(40), job, secret=SECRET)
        for name, value in fresh.weights().items():
            np.testing.assert_allclose(used.weights()[name], value, rtol=1e-6)


def test_noise_made_on_idle_cores_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    class Counted(Pieces):
        def __init__(
            self, make: Callable[[int], None], starts: Iterable[int], helpers: int
        ) -> None:
            begun.append(helpers)
            super().__init__(make, starts, helpers)

    monkeypatch.setattr(noise, "_WORTH", 1)
    monkeypatch.setattr(noise, "Pieces", Counted)
    found = []
    for idle in (0, 2):
        torch.manual_seed(0)
        one = Trainer(Line(), squares, CPU, idle=idle)
        one.run(Points(40), PRIVATE, secret=SECRET)
        found.append(one.weights()["layer.weight"])
    assert begun == [2] * PRIVATE.steps
    assert np.array_equal(found[0], found[1])


@pytest.mark.parametrize(("cores", "threads", "idle"), [(8, 3, 5), (4, 4, 0), (2, 3, 0)])
def test_idle_are_cores_that_torch_leaves(
    cores: int, threads: int, idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert idle_cores() == idle


def test_private_step_divides_by_the_public_size_whatever_is_drawn() -> None:
    """Half the divisor, twice the update: nothing else of the batch's size enters."""
    moves = []
    for divisor in (20.0, 40.0):
        t = trainer()
        start = t.weights()["layer.weight"]
        job = replace(PRIVATE, steps=1, expected_batch=divisor)
        t.run(Points(37), job, secret=SECRET)
        moves.append(t.weights()["layer.weight"] - start)
    np.testing.assert_allclose(moves[0], 2 * moves[1], rtol=1e-4)


def test_node_without_records_still_gives_noise() -> None:
    """An update that stayed at zero would tell that there was nothing to learn from."""
    t = trainer()
    start = t.weights()["layer.weight"]
    t.run(Points(0), PRIVATE, secret=SECRET)
    assert not np.array_equal(start, t.weights()["layer.weight"])


def test_large_steps_pass_in_parts() -> None:
    whole, parts = trainer(), trainer()
    points = Points(40)
    whole.run(Points(40), replace(PRIVATE, steps=3), secret=SECRET)
    parts.run(points, replace(PRIVATE, steps=3, physical_batch=3), secret=SECRET)
    for name, value in whole.weights().items():
        np.testing.assert_allclose(parts.weights()[name], value, rtol=1e-4, atol=1e-6)


def test_proximal_term_pulls_towards_the_start() -> None:
    moved = []
    for mu in (0.0, 5.0):
        t = trainer()
        start = t.weights()["layer.weight"]
        t.run(Points(40), replace(PLAIN, proximal_mu=mu), secret=SECRET)
        moved.append(float(np.abs(t.weights()["layer.weight"] - start).sum()))
    assert moved[1] < 0.6 * moved[0]


def test_weights_of_another_model_are_refused() -> None:
    t = trainer()
    with pytest.raises(ModelError, match="not those of this model"):
        t.load({"layer.weight": np.zeros((1, 2), np.float32)})
    with pytest.raises(ModelError, match="has shape"):
        t.load({**t.weights(), "layer.weight": np.zeros((1, 3), np.float32)})


def test_device_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match="cannot be used"):
        pick_device("cuda:99")
    with pytest.raises(ModelError, match="cannot be used"):
        pick_device("toaster")
    assert pick_device("cpu") == CPU


def test_variation_touches_neither_sampling_nor_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    purposes: list[str] = []

    class Watched(NoiseStream):
        def __init__(self, secret: bytes, purpose: str, **more: int) -> None:
            purposes.append(purpose)
            super().__init__(secret, purpose, **more)

    monkeypatch.setattr(train, "NoiseStream", Watched)
    found = []
    for chance in (0.0, 0.6):  # of a record's only modality, which therefore always stays
        one = trainer()
        one.model.modality_dropout = chance
        one.run(Points(40), PRIVATE, secret=SECRET)
        found.append(one.weights())
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
    assert sorted(purposes) == sorted(2 * ["modality dropout", "noise", "sampling", "shifts"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_weight_decay_shrinks_what_no_record_pulls_at(optimizer: str) -> None:
    one = trainer()
    before = one.weights()
    assert PRIVATE.mechanism is not None
    once = replace(PRIVATE.mechanism, steps=1)
    job = replace(PRIVATE, steps=1, mechanism=once, optimizer=optimizer, weight_decay=0.2)
    ends = []
    for each in (replace(job, weight_decay=0.0), job):
        one.load(before)
        one.run(Points(0), each, secret=SECRET)  # noise alone, the same in both
        ends.append(one.weights())
    for name, value in before.items():
        shrunk = ends[0][name] - ends[1][name]
        np.testing.assert_allclose(shrunk, job.learning_rate * 0.2 * value, rtol=1e-3)


@pytest.mark.parametrize("job", [PLAIN, PRIVATE])
def test_modality_dropout_hides_in_training_and_not_after(job: Job) -> None:
    class Watching(Line):
        def forward(self, batch: Batch) -> torch.Tensor:
            shares.append(float(batch.present["x"].float().mean()) if len(batch) else 0.5)
            return super().forward(batch)

    class Twice(Points):
        def batch(self, rows: NDArray[np.int64]) -> Batch:
            batch = super().batch(rows)
            return replace(batch, present={**batch.present, "y": batch.present["x"]})

    shares: list[float] = []
    one = Trainer(Watching(), squares, CPU)
    one.model.modality_dropout = 0.4
    one.run(Twice(40), job, secret=SECRET)
    assert np.mean(shares) == pytest.approx(1 - 0.4 + 0.16 / 2, abs=0.05)
    shares.clear()
    predict(one.model, Twice(40), device=CPU)
    assert shares == [1.0]
