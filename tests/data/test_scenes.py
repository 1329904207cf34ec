"""The made data sets: clean, the same for a seed, as they are described, and worth fusing."""

from __future__ import annotations

import filecmp
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfuse.config import RunConfig
from fedfuse.data.check import check
from fedfuse.data.prepare import Prepared, prepare
from fedfuse.data.scenes import SCENES, make
from fedfuse.data.spec import DEMOS, DataConfig
from fedfuse.evaluate import evaluate
from fedfuse.federation.node import new_trainer
from fedfuse.federation.rounds import job_of
from fedfuse.federation.settle import settle
from fedfuse.tasks import Task

SIMULATIONS = Path(__file__).parents[2] / "simulations"


@pytest.fixture(scope="module", params=SCENES)
def scene(request: pytest.FixtureRequest) -> str:
    """Each by its name; those with clips only where they can be written."""
    if "video" in SCENES[request.param].modalities:
        pytest.importorskip("av")
    return str(request.param)


def configured(scene: str, manifest: Path, **changes: object) -> RunConfig:
    """Its scenario, on data that is there already."""
    config = RunConfig.from_toml(SIMULATIONS / f"{scene}.toml")
    assert config.data.demo == scene
    return config.with_values({**changes, "data.manifest": str(manifest)})


def trained(config: RunConfig, prepared: Prepared) -> float:
    """The headline on the test records after all rounds in one process, the larger the better."""
    sizes = [len(shard.rows) for shard in prepared.shards]
    settled = settle(config, mean_records=sum(sizes) / len(sizes), mean_subjects=0)
    trainer = new_trainer(settled.config, prepared.schema)
    task = Task.of(prepared.schema.target, config.model)
    weights = trainer.weights()
    for round in range(1, config.train.rounds + 1):
        job, updates = job_of(settled.config, settled.mechanism, round), []
        for number in range(len(prepared.shards)):
            trainer.load(weights)
            trainer.run(prepared.node(number), job, secret=bytes([round, number] * 16))
            updates.append(trainer.weights())
        weights = {
            name: np.mean([update[name] for update in updates], axis=0, dtype=value.dtype)
            for name, value in weights.items()
        }
    trainer.load(weights)
    figures = evaluate(trainer.model, prepared.test, task, device=torch.device("cpu"))
    return figures[task.headline] * (1 if task.higher_is_better else -1)


def test_each_demo_has_a_scenario() -> None:
    assert set(DEMOS) == {"inspection", *SCENES}


def test_made_data_is_clean(scene: str, tmp_path: Path) -> None:
    assert check(make(scene, tmp_path, records=30)) == ()


@pytest.mark.slow
def test_made_data_trains_privately(scene: str, tmp_path: Path) -> None:
    manifest = make(scene, tmp_path, records=60)
    config = configured(scene, manifest, **{"train.rounds": 2, "privacy.declared_records": 12})
    prepared = prepare(config.data, seed=0)
    assert set(prepared.schema.names) == set(SCENES[scene].modalities)
    assert len(prepared.shards) == SCENES[scene].clients
    assert np.isfinite(trained(config, prepared))


def test_a_seed_gives_the_same_files(scene: str, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(scene, tmp_path / name, records=12, clients=2, seed=seed)
    names = sorted(
        str(path.relative_to(tmp_path / "a"))
        for path in (tmp_path / "a").rglob("*.*")
        if path.name != "README.md"  # it has the folder's name in it
    )
    same, different, missing = filecmp.cmpfiles(
        tmp_path / "a", tmp_path / "b", names, shallow=False
    )
    assert (len(same), different, missing) == (len(names), [], [])
    assert not filecmp.cmp(tmp_path / "a/manifest.csv", tmp_path / "c/manifest.csv", shallow=False)


def test_gaps_sizes_and_speakers_are_as_promised(tmp_path: Path) -> None:
    prepared = prepare(DataConfig(manifest=str(make("sentiment", tmp_path, records=480))), seed=0)
    sizes = [len(shard.rows) for shard in prepared.shards]
    assert max(sizes) > 1.4 * min(sizes)
    present = np.array([prepared.train.present(name) for name in prepared.schema.names])
    assert present.any(axis=0).all()
    assert np.allclose(present.mean(axis=1), [0.9, 0.82, 0.9], atol=0.05)
    assert prepared.node(len(sizes) - 1).present("audio").mean() < 0.6
    assert not set(prepared.train.subjects) & set(prepared.test.subjects)
    assert len(set(prepared.test.subjects)) >= 8
    nodes = [prepared.node(number) for number in range(len(sizes))]
    means = [float(node.batch(np.arange(len(node))).target.mean()) for node in nodes]
    assert max(means) - min(means) > 0.1


@pytest.mark.slow
def test_all_modalities_together_beat_each_alone(scene: str, tmp_path: Path) -> None:
    if "video" in SCENES[scene].modalities and not os.environ.get("FEDFUSE_ALL"):
        pytest.skip("minutes of video: set FEDFUSE_ALL=1")
    manifest = make(scene, tmp_path)
    found = {}
    for names in ("", *SCENES[scene].modalities):
        config = configured(
            scene, manifest, **{"privacy.unit": "none", "train.rounds": 6, "data.modalities": names}
        )
        found[names] = trained(config, prepare(config.data, seed=0))
    together = found.pop("")
    print(scene, together, found)
    assert together > max(found.values()) + 0.05
