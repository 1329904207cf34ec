"""Every operator learns every task from modalities of which none tells enough alone, with and
without noise.

Made data: a series, a vector and a sentence show a hidden bit each, and each is missing in a tenth
of the records. The target needs all three bits.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedfuse.batch import Batch, Kind, Modality, Schema, Target, TargetKind
from fedfuse.evaluate import evaluate
from fedfuse.models.knowledge import Graph
from fedfuse.models.model import build_model
from fedfuse.models.spec import FUSIONS, ModelConfig
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.tasks import Task
from fedfuse.train import Job, Trainer

pytestmark = pytest.mark.slow

CPU, TRAIN, TEST = torch.device("cpu"), 800, 500
MODALITIES = (
    Modality(name="series", kind=Kind.SERIES, shape=(8, 2)),
    Modality(name="vector", kind=Kind.VECTOR, shape=(4,)),
    Modality(name="text", kind=Kind.TEXT, shape=(3,)),
)
BITS = tuple(f"{k:03b}" for k in range(8))
TARGETS = {
    "classes": Target(kind=TargetKind.CLASSIFICATION, classes=BITS),
    "labels": Target(kind=TargetKind.MULTILABEL, classes=("s", "v", "t")),
    "ordered": Target(kind=TargetKind.ORDINAL, classes=("none", "one", "two", "all")),
    "number": Target(kind=TargetKind.REGRESSION, centre=0.0, scale=1.0),
}
GRAPH = Graph.of([("a", "near", "b"), ("b", "near", "c"), ("c", "far", "a")])
PLAIN = Job(steps=120, optimizer="adam", learning_rate=0.005, momentum=0.9, batch_size=40)
PRIVATE = Job(
    steps=90,
    optimizer="adam",
    learning_rate=0.01,
    momentum=0.9,
    expected_batch=160.0,
    # epsilon 7.2 at delta 1e-5
    mechanism=Mechanism(
        unit=Unit.RECORD, sample_rate=0.2, noise_multiplier=1.5, clip_norm=1.0, steps=90
    ),
)


class Made:
    """Some of the made records; `names` are the modalities to be seen."""

    def __init__(self, target: Target, names: tuple[str, ...], count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        bits = rng.integers(0, 2, (count, 3))
        sign = 2.0 * bits - 1
        self.inputs = {
            "series": rng.standard_normal((count, 8, 2)) + sign[:, None, :1],
            "vector": rng.standard_normal((count, 4)) + 1.2 * sign[:, 1:2],
            "text": rng.integers(1, 9, (count, 3)) + 8 * bits[:, 2:],
        }
        there = rng.random((count, 3)) > 0.1
        self.present = {m.name: there[:, k] for k, m in enumerate(MODALITIES)}
        self.names = names
        match target.kind:
            case TargetKind.CLASSIFICATION:
                self.target = bits @ np.array([4, 2, 1])
            case TargetKind.MULTILABEL:
                self.target = bits.astype(np.float32)
            case TargetKind.ORDINAL:
                self.target = bits.sum(1)
            case TargetKind.REGRESSION:
                self.target = (sign @ np.array([1.0, 0.8, -0.9])).astype(np.float32)

    def __len__(self) -> int:
        return len(self.target)

    def batch(self, rows: NDArray[np.int64]) -> Batch:
        inputs, present = {}, {}
        for name in self.names:
            value, there = torch.from_numpy(self.inputs[name][rows]), self.present[name][rows]
            inputs[name] = value if name == "text" else value.float()
            present[name] = torch.from_numpy(there)
            inputs[name][~present[name]] = 0
        return Batch(inputs, present, torch.from_numpy(self.target[rows]))


def learned(task: str, fusion: str, names: tuple[str, ...], private: bool) -> float:
    """The headline on test records, the larger the better."""
    target = TARGETS[task]
    schema = Schema(modalities=tuple(m for m in MODALITIES if m.name in names), target=target)
    config = ModelConfig(
        fusion=fusion, dim=16, fusion_heads=2, fusion_rank=4, head_width=16, series_width=8,
        series_depth=1, vector_width=16,
    )  # fmt: skip
    model, scored = build_model(schema, config, vocabulary=32, graph=GRAPH), Task.of(target)
    trainer = Trainer(model, scored.loss, CPU)
    trainer.run(Made(target, names, TRAIN, 0), PRIVATE if private else PLAIN, secret=b"s" * 32)
    figures = evaluate(model, Made(target, names, TEST, 1), scored, device=CPU)
    return figures[scored.headline] * (1 if scored.higher_is_better else -1)


@cache
def best_alone(task: str, private: bool) -> float:
    return max(learned(task, "concat", (m.name,), private) for m in MODALITIES)


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("task", TARGETS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_all_modalities_together_beat_each_alone(fusion: str, task: str, private: bool) -> None:
    names = tuple(m.name for m in MODALITIES)
    together, alone = learned(task, fusion, names, private), best_alone(task, private)
    print(f"{fusion:<16} {task:<8} {together:+.3f} alone {alone:+.3f}")
    assert together > alone + 0.1
