"""A data set of vectors that takes no time, and configurations for it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedfuse.config import RunConfig
from fedfuse.data.dataset import Dataset
from fedfuse.federation.flower import take_identity

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(autouse=True)
def _identity() -> None:
    """Lets the test's own process make Flower messages."""
    take_identity()


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records were read, batch by batch."""
    read: list[int] = []
    batch = Dataset.batch

    def counting(self: Dataset, rows: Any) -> Any:
        read.append(len(rows))
        return batch(self, rows)

    monkeypatch.setattr(Dataset, "batch", counting)
    return read


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 train and 30 test records of three nodes: two vectors each, two classes, learnable."""
    folder = tmp_path_factory.mktemp("data")
    return write_manifest(folder)


def write_manifest(folder: Path, *, repeat: bool = False) -> Path:
    """The small data set; with `repeat` each subject has two records."""
    draw = np.random.default_rng(0)
    path = folder / "manifest.csv"
    (folder / "dataset.toml").write_text(
        'task = "classification"\nclasses = ["down", "up"]\n'
        "[modalities.left]\nkind = 'vector'\nshape = [4]\nmean = 0.0\nstd = 1.0\n"
        "[modalities.right]\nkind = 'vector'\nshape = [3]\nmean = 0.0\nstd = 1.0\n"
    )
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "split", "client", "subject", "label", "left", "right"])
        for number in range(120):
            up = number % 2
            left = draw.normal(up * 2 - 1, 1.0, 4)
            right = draw.normal(1 - up * 2, 1.0, 3)
            rows.writerow(
                [
                    f"r{number}",
                    "test" if number >= 90 else "train",
                    f"site-{'abc'[number % 3]}",
                    f"s{number // 2 if repeat else number}",
                    "up" if up else "down",
                    " ".join(f"{x:.4f}" for x in left),
                    "" if number % 7 == 0 else " ".join(f"{x:.4f}" for x in right),
                ]
            )
    return path


@pytest.fixture(scope="session")
def make_config(manifest: Path) -> MakeConfig:
    """A configuration of a run that takes a second; keywords are dotted keys, "__" for "."."""

    def make(**changes: Any) -> RunConfig:
        values: dict[str, Any] = {
            "data.manifest": str(manifest),
            "model.dim": 8,
            "model.head_width": 8,
            "model.vector_width": 8,
            "train.rounds": 3,
            "train.local_steps": 2,
            "train.learning_rate": 0.5,
            "privacy.sample_rate": 0.5,
            "privacy.noise_multiplier": 1.2,
            "privacy.epsilon": 30.0,
            "privacy.noise_seed": "test",
            "federation.workers": 2,
            "train.device": "cpu",
        }
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return RunConfig().with_values(values)

    return make
