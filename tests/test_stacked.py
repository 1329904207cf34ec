"""Nodes that train together end as each would by itself, and know nothing of each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedfuse.batch import Batch, Kind, Modality, Schema, Target, TargetKind
from fedfuse.models.auxiliary import training_loss
from fedfuse.models.model import build_model
from fedfuse.models.spec import FUSIONS, AuxiliaryConfig, EncoderConfig, ModelConfig
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.stacked import Member, Stacked, together
from fedfuse.tasks import Task
from fedfuse.train import Job, Trainer

CPU = torch.device("cpu")
SCHEMA = Schema(
    modalities=(
        Modality(name="photo", kind=Kind.IMAGE, shape=(1, 8, 8)),
        Modality(name="walk", kind=Kind.SERIES, shape=(12, 3)),
        Modality(name="note", kind=Kind.TEXT, shape=(6,)),
        Modality(name="row", kind=Kind.TABLE, shape=(8,)),
    ),
    target=Target(kind=TargetKind.CLASSIFICATION, classes=("a", "b", "c")),
)
WORDS = 30
RECORD = Mechanism(unit=Unit.RECORD, sample_rate=0.4, noise_multiplier=0.7, clip_norm=0.5, steps=3)
PRIVATE = Job(
    steps=3, optimizer="sgd", learning_rate=0.2, momentum=0.9, expected_batch=5.0, mechanism=RECORD
)
PLAIN = replace(PRIVATE, mechanism=None, batch_size=5)
NODE = replace(PLAIN, mechanism=replace(RECORD, unit=Unit.NODE, sample_rate=1.0, steps=1))


class Made:
    """`count` records, a fifth of each modality missing."""

    def __init__(self, count: int, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        inputs, present = {}, {}
        for m in SCHEMA.modalities:
            here = torch.rand(count, generator=rng) < 0.8
            size = (count, *m.shape)
            text = m.kind is Kind.TEXT
            x = (
                torch.randint(1, WORDS, size, generator=rng)
                if text
                else torch.randn(size, generator=rng)
            )
            x[~here] = 0
            inputs[m.name], present[m.name] = x, here
        self.all = Batch(inputs, present, torch.randint(0, 3, (count,), generator=rng))

    def __len__(self) -> int:
        return len(self.all)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        return self.all[torch.from_numpy(rows)]


def trainer(config: ModelConfig | None = None) -> Trainer:
    config = config or ModelConfig(dim=8, head_width=8, text_width=8, image_depth=2)
    model = build_model(SCHEMA, config, vocabulary=WORDS)
    loss = Task.of(SCHEMA.target, config).loss
    return Trainer(model, training_loss(loss, config.auxiliary, SCHEMA.target, 4), CPU)


COUNTS = (20, 7, 0, 13)


def members_of(one: Trainer, counts: tuple[int, ...] = COUNTS) -> list[Member]:
    """Nodes with so many records, each of which starts from weights of its own."""
    start = one.weights()
    return [
        Member(
            records=Made(n, n),
            weights={name: value * (1 + k / 10) for name, value in start.items()},
            secret=bytes([n]) * 32,
        )
        for k, n in enumerate(counts)
    ]


def check(one: Trainer, job: Job, members: list[Member] | None = None) -> None:
    members = members or members_of(one)
    stack = Stacked(one)
    assert stack.takes(members[0].records, job)
    found = stack.run(members, job)
    for member, (ran, weights) in zip(members, found, strict=True):
        one.load(member.weights)
        alone = one.run(member.records, job, secret=member.secret)
        for name, value in one.weights().items():
            np.testing.assert_allclose(weights[name], value, rtol=2e-4, atol=2e-5, err_msg=name)
        assert ran.unclipped == pytest.approx(alone.unclipped)
        assert ran.signal_to_noise == pytest.approx(alone.signal_to_noise, rel=1e-3)


@pytest.mark.parametrize(
    "job",
    [
        PRIVATE,
        PLAIN,
        NODE,
        replace(PRIVATE, optimizer="adam", learning_rate=0.01, weight_decay=0.1),
        replace(PRIVATE, clip_shares="photo=1,walk=2,note=1,row=3,rest=1", proximal_mu=0.1),
        replace(PRIVATE, mechanism=replace(RECORD, count_noise=3.0)),
        replace(PRIVATE, physical_batch=2),
        replace(PLAIN, proximal_mu=0.1),
    ],
)
def test_a_node_ends_as_it_would_alone(job: Job) -> None:
    check(trainer(), job)


@pytest.mark.parametrize("fusion", [name for name in FUSIONS if name != "graph"])
def test_every_operator_can_be_stacked(fusion: str) -> None:
    config = ModelConfig(
        dim=8, head_width=8, text_width=8, image_depth=1, fusion=fusion, fusion_heads=2,
        absent="zero" if fusion == "early" else "learned",
    )  # fmt: skip
    check(trainer(config), replace(PRIVATE, steps=1, mechanism=replace(RECORD, steps=1)))


@pytest.mark.parametrize("text", ["transformer", "gru"])
def test_encoders_of_words_can_be_stacked(text: str) -> None:
    own = EncoderConfig(text=text, series="transformer" if text == "transformer" else "gru")
    config = ModelConfig(dim=8, text_width=8, image_depth=1, encoder=own, learned_words=True)
    check(trainer(config), replace(PRIVATE, steps=1, mechanism=replace(RECORD, steps=1)))


def test_what_varies_records_and_losses_beside_the_fused_one_are_the_same() -> None:
    beside = AuxiliaryConfig(unimodal=0.5, reconstruction=0.3, alignment=0.2, anchors=0.1)
    config = ModelConfig(
        dim=8, text_width=8, image_depth=1, auxiliary=beside, modality_dropout=0.4,
        time_shift=0.2, image_shift=0.2,
    )  # fmt: skip
    check(trainer(config), PRIVATE)
    check(trainer(config), PLAIN)


@pytest.mark.parametrize("job", [PRIVATE, PLAIN, NODE])
def test_a_node_learns_nothing_of_another(job: Job) -> None:
    one = trainer()
    stack, start = Stacked(one), one.weights()
    mine, another = members_of(one, (20, 7))
    other = Member(records=Made(9, 99), weights=start, secret=b"o" * 32)
    first = stack.run([mine, another], job)
    second = stack.run([mine, other], job)
    for name in start:
        np.testing.assert_allclose(first[0][1][name], second[0][1][name], rtol=1e-4, atol=1e-6)
    assert any(not np.allclose(first[1][1][name], second[1][1][name]) for name in one.trainable)


def test_a_broken_record_counts_as_zero_and_breaks_no_other_node() -> None:
    one = trainer()
    broken = Made(20, 20)
    broken.all.inputs["walk"][3] = float("nan")
    broken.all.present["walk"][3] = True
    every = replace(PRIVATE, mechanism=replace(RECORD, sample_rate=1.0))
    members = members_of(one, (20, 7))
    members[0] = replace(members[0], records=broken)
    check(one, every, members)
    found = Stacked(one).run(members, every)
    assert all(np.isfinite(value).all() for _, weights in found for value in weights.values())


def test_no_contribution_exceeds_the_bound() -> None:
    """One record, no noise to speak of: a step of rate 1 is its clipped gradient."""
    one = trainer()
    quiet = replace(RECORD, noise_multiplier=1e-9, sample_rate=1.0, clip_norm=0.01, steps=1)
    job = replace(PRIVATE, steps=1, mechanism=quiet, expected_batch=1.0, learning_rate=1.0)
    start = one.weights()
    members = [
        Member(records=Made(1, n), weights=start, secret=bytes([n]) * 32) for n in range(1, 6)
    ]
    for _, weights in Stacked(one).run(members, job):
        moved = [(weights[name] - start[name]).ravel() for name in one.trainable]
        norm = np.linalg.norm(np.concatenate(moved).astype(np.float64))
        assert norm == pytest.approx(0.01, rel=1e-3)


def test_what_couples_records_or_adds_up_persons_is_left_to_others() -> None:
    subject = replace(PRIVATE, mechanism=replace(RECORD, unit=Unit.SUBJECT))
    assert not Stacked(trainer()).takes(Made(3, 3), subject)
    assert together(subject, 1000, 8) == 1
    config = ModelConfig(dim=8, text_width=8, auxiliary=AuxiliaryConfig(correlation=0.1))
    assert not Stacked(trainer(config)).takes(Made(3, 3), PLAIN)
