from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import pytest
import torch

from fedfuse.data.check import check
from fedfuse.data.demo import CLASSES, make_demo
from fedfuse.data.prepare import Prepared, prepare
from fedfuse.data.spec import DataConfig


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    path = make_demo(tmp_path_factory.mktemp("demo"), records=800)
    return prepare(DataConfig(manifest=str(path)), seed=0)


def test_the_demo_is_a_clean_data_set(demo: Path) -> None:
    assert check(demo) == ()


def test_nothing_has_to_be_inferred(prepared: Prepared) -> None:
    assert prepared.notes == ()
    assert prepared.schema.target.classes == CLASSES
    assert [m.shape for m in prepared.schema.modalities] == [(3, 32, 32), (40, 32), (32,)]


def test_sizes_gaps_and_skew_are_as_promised(prepared: Prepared) -> None:
    assert prepared.valid is not None
    assert (len(prepared.train), len(prepared.valid), len(prepared.test)) == (600, 40, 160)
    assert len(prepared.shards) == 6
    sizes = [len(shard.rows) for shard in prepared.shards]
    assert max(sizes) > 1.5 * min(sizes)
    present = np.array([prepared.train.present(name) for name in prepared.schema.names])
    assert present.any(axis=0).all()
    assert np.allclose(present.mean(axis=1), [0.9, 0.86, 0.9], atol=0.06)
    assert prepared.node(5).present("audio").mean() < 0.7


def test_one_modality_tells_half_and_two_tell_all(prepared: Prepared) -> None:
    """A linear model on coarse features; each modality tells two of the three bits."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    features = {
        "image": lambda image: torch.nn.functional.avg_pool2d(image, 4),
        "audio": lambda mel: torch.stack([mel.mean(dim=2), mel.std(dim=2)], dim=2),
    }

    def accuracy(*names: str) -> float:
        sides = []
        for dataset in (prepared.train, prepared.test):
            rows = np.flatnonzero(np.all([dataset.present(name) for name in names], axis=0))
            batch = dataset.batch(rows)
            inputs = [features[name](batch.inputs[name]).flatten(1) for name in names]
            sides.append((torch.cat(inputs, dim=1).numpy(), batch.target.numpy()))
        model = LinearDiscriminantAnalysis("lsqr", shrinkage=0.2).fit(*sides[0])
        return float(model.score(*sides[1]))

    assert 0.35 < accuracy("image") < 0.65
    assert 0.35 < accuracy("audio") < 0.65
    assert accuracy("image", "audio") > 0.95


def test_a_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_demo(tmp_path / name, records=12, clients=2, seed=seed)
    names = sorted(str(p.relative_to(tmp_path / "a")) for p in (tmp_path / "a").rglob("*.*"))
    same, different, missing = filecmp.cmpfiles(
        tmp_path / "a", tmp_path / "b", names, shallow=False
    )
    assert (len(same), different, missing) == (len(names), [], [])
    assert not filecmp.cmp(tmp_path / "a/manifest.csv", tmp_path / "c/manifest.csv", shallow=False)
