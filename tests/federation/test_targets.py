"""Targets of each kind, and a graph, go the whole way: run, summary, released model."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedfuse.config import RunConfig
from fedfuse.data.dataset import Dataset
from fedfuse.data.prepare import prepare
from fedfuse.evaluate import predict
from fedfuse.federation.observer import Silent
from fedfuse.federation.released import open_model
from fedfuse.federation.simulate import simulate
from fedfuse.runfolder import RunFolder


def write_manifest(folder: Path, declared: str, label: Any) -> Path:
    """60 train and 20 test records of two nodes: two vectors that show a bit each."""
    rng = np.random.default_rng(0)
    (folder / "dataset.toml").write_text(declared + "\n[modalities]\nu = 'vector'\nv = 'vector'\n")
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "split", "client", "label", "u", "v"])
        for i in range(80):
            bits = rng.integers(0, 2, 2)
            u, v = (" ".join(map(str, rng.normal(2 * b - 1, 1, 3).round(3))) for b in bits)
            split = "test" if i >= 60 else "train"
            rows.writerow([i, split, "ab"[i % 2], label(*bits), u if i % 5 else "", v])
    return path


def ran(folder: Path, manifest: Path, **changes: Any) -> tuple[dict[str, Any], Dataset]:
    config = RunConfig().with_values(
        {
            "data.manifest": str(manifest), "model.dim": 8, "train.rounds": 2,
            "train.local_steps": 2, "privacy.noise_seed": "test", "federation.workers": 1,
            "train.device": "cpu",
        }
        | {key.replace("__", "."): value for key, value in changes.items()}
    )  # fmt: skip
    summary = simulate(config, folder / "run", observer=Silent())
    return summary, prepare(config.data, seed=0).test


@pytest.mark.slow
def test_labels_through_a_graph_that_is_gone_when_the_model_is_opened(tmp_path: Path) -> None:
    manifest = write_manifest(
        tmp_path,
        'task = "multi-label"\nclasses = ["left", "right"]',
        lambda a, b: ";".join(["left"] * a + ["right"] * b) or "-",
    )
    triples = tmp_path / "triples.tsv"
    triples.write_text("left\topposite\tright\nleft\tis a\tside\nright\tis a\tside\n")
    summary, test = ran(
        tmp_path,
        manifest,
        model__fusion="graph",
        model__knowledge=str(triples),
        model__knowledge_sha256=hashlib.sha256(triples.read_bytes()).hexdigest(),
        model__modality_dropout=0.2,
        model__absent="learned",
    )
    assert summary["headline"]["name"] == "macro_f1"
    assert set(summary["slices"]["present"]) == {"u + v", "v"}
    assert set(summary["slices"]["client"]) == {"a", "b"}
    records = [part["records"] for part in summary["slices"]["present"].values()]
    assert sum(records) == len(test) == 20
    triples.unlink()
    model, schema = open_model(RunFolder.open(tmp_path / "run"))
    assert schema == test.schema
    outputs, targets = predict(model, test, device=torch.device("cpu"))
    assert outputs.shape == targets.shape == (20, 2)


def test_an_order_with_declared_shares(tmp_path: Path) -> None:
    manifest = write_manifest(
        tmp_path,
        'task = "ordinal"\nclasses = ["low", "middle", "high"]\npriors = [0.25, 0.5, 0.25]',
        lambda a, b: ["low", "middle", "high"][a + b],
    )
    summary, test = ran(
        tmp_path, manifest, model__fusion="co-attention", model__class_weights="priors"
    )
    assert summary["headline"] == {
        "name": "mae", "value": pytest.approx(summary["metrics"]["mae"]), "higher_is_better": False,
    }  # fmt: skip
    assert summary["privacy"]["private"]
    _, schema = open_model(RunFolder.open(tmp_path / "run"))
    assert schema == test.schema
    assert schema.target.priors == (0.25, 0.5, 0.25)
