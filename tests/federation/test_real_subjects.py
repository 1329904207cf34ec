"""Unit "subject" on real people: speakers and wearers of sensors, one at a node or many."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant

from fedfuse.config import RunConfig
from fedfuse.data.prepare import prepare
from fedfuse.federation.node import new_trainer
from fedfuse.federation.observer import Silent
from fedfuse.federation.simulate import simulate
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.train import Job

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"
SETS = [("digits-av", "manifest_hard.csv"), ("har-phone-watch", "manifest.csv")]
pytestmark = pytest.mark.slow


def people(name: str, manifest: str, folder: Path, *, sites: int) -> Path:
    """Twenty train records of each person, sixty test records; persons at `sites` clients."""
    source = REAL / name
    if not source.is_dir():
        pytest.skip("the real data set is not here")
    with (source / manifest).open(newline="") as file:
        rows = list(csv.DictReader(file))
    counts: dict[tuple[str, str], int] = {}
    kept = []
    for row in rows:
        person = row["client"]
        key = ("test", "") if row["split"] == "test" else (row["split"], person)
        counts[key] = counts.get(key, 0) + 1
        if row["split"] != "valid" and counts[key] <= (60 if key[0] == "test" else 20):
            number = sorted({r["client"] for r in rows}).index(person)
            kept.append(row | {"subject": person, "client": f"site-{number % sites}"})
    with (folder / "manifest.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [*rows[0], "subject"])
        table.writeheader()
        table.writerows(kept)
    (folder / "dataset.json").write_bytes((source / "dataset.json").read_bytes())
    for row in kept:
        for cell in row.values():
            if "/" in cell and (source / cell).is_file():
                (folder / cell).parent.mkdir(exist_ok=True)
                (folder / cell).write_bytes((source / cell).read_bytes())
    return folder / "manifest.csv"


def configured(manifest: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "data.manifest": str(manifest),
        "privacy.unit": "subject",
        "train.rounds": 2,
        "train.device": "cpu",
    }
    return RunConfig().with_values(
        values | {key.replace("__", "."): value for key, value in changes.items()}
    )


@pytest.mark.parametrize(("name", "manifest"), SETS)
@pytest.mark.parametrize("sites", [2, 1000])
def test_epsilon_is_as_stated_for_real_people(
    tmp_path: Path, name: str, manifest: str, sites: int
) -> None:
    """Recomputed from the books by dp-accounting alone: never below, and equal to one in 1000."""
    config = configured(people(name, manifest, tmp_path, sites=sites))
    summary = simulate(config, tmp_path / "run", observer=Silent())
    privacy = summary["privacy"]
    assert privacy["unit"] == "subject"
    assert privacy["epsilon_by_node"]
    nodes: dict[str, PLDAccountant] = {}
    for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        assert event["unit"] == "subject"
        step = PoissonSampledDpEvent(
            event["sample_rate"], GaussianDpEvent(event["noise_multiplier"])
        )
        nodes.setdefault(event["node"], PLDAccountant()).compose(step, event["steps"])
    for node, stated in privacy["epsilon_by_node"].items():
        found = nodes[node].get_epsilon(privacy["delta"])
        assert found * (1 - 1e-9) <= stated <= found * (1 + 1e-3)
    assert privacy["epsilon_server"] <= 8.0


@pytest.mark.parametrize(("name", "manifest"), SETS)
def test_a_step_on_real_people_is_the_sum_of_each_ones_clipped_gradient(
    tmp_path: Path, name: str, manifest: str
) -> None:
    C = 0.5
    config = configured(people(name, manifest, tmp_path, sites=2)).with_defaults()
    node = prepare(config.data, seed=0).node(0)
    trainer = new_trainer(config, node.schema)
    subjects = node.subject_numbers()
    assert 2 <= len(set(subjects.tolist())) < len(node)
    start = trainer.weights()
    whole = node.batch(np.arange(len(node)))
    model, total = trainer.model, {key: np.zeros(v.shape) for key, v in start.items()}
    for subject in np.unique(subjects):
        own = whole[torch.from_numpy(np.flatnonzero(subjects == subject))]
        model.zero_grad()
        trainer.loss(model(own), own.target).sum().backward()
        grads = {
            n: p.grad.double().numpy() for n, p in model.named_parameters() if p.grad is not None
        }
        norm = float(np.sqrt(sum(np.square(g).sum() for g in grads.values())))
        for key, g in grads.items():
            total[key] += g * min(1.0, C / norm)
    model.zero_grad()
    trainer.load(start)
    job = Job(
        steps=1, optimizer="sgd", learning_rate=1.0, momentum=0.0, expected_batch=1.0,
        records_per_subject=10_000, physical_batch=64,
        mechanism=Mechanism(
            unit=Unit.SUBJECT, sample_rate=1.0, noise_multiplier=1e-12, clip_norm=C, steps=1
        ),
    )  # fmt: skip
    trainer.run(node, job, secret=bytes(32), subjects=subjects)
    end = trainer.weights()
    moved = np.concatenate([(start[n].astype(float) - end[n]).ravel() for n in sorted(start)])
    expected = np.concatenate([total[n].ravel() for n in sorted(start)])
    assert np.linalg.norm(expected) > 0.1
    assert np.linalg.norm(moved - expected) <= 2e-5 * np.linalg.norm(expected)
