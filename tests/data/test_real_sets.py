"""Real data sets beside the repository load as they are; skipped where they are not there."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from fedfuse.data.prepare import Prepared, prepare
from fedfuse.data.spec import DataConfig

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def first_rows(name: str, tmp_path: Path, manifest: str = "manifest.csv") -> Prepared:
    """Forty rows of each split, over links to the real media."""
    source = REAL / name
    if not source.is_dir():
        pytest.skip("the real data set is not here")
    folder = tmp_path / name
    folder.mkdir()
    with (source / manifest).open(newline="") as file:
        header, *rows = csv.reader(file)
    place = header.index("split")
    kept = [
        row
        for split in ("train", "valid", "test")
        for row in [r for r in rows if r[place] == split][:40]
    ]
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *kept])
    (folder / "dataset.json").write_bytes((source / "dataset.json").read_bytes())
    for row in kept:
        for cell in row:
            if (source / cell).is_file() and "/" in cell:
                (folder / cell).parent.mkdir(exist_ok=True)
                (folder / cell).write_bytes((source / cell).read_bytes())
    return prepare(DataConfig(manifest=str(folder / "manifest.csv")), seed=0)


def test_spoken_and_written_digits(tmp_path: Path) -> None:
    prepared = first_rows("digits-av", tmp_path)
    shapes = [(m.name, m.kind.value, m.shape) for m in prepared.schema.modalities]
    assert shapes[0] == ("image", "image", (1, 28, 28))
    assert shapes[1][:2] == ("audio", "audio")
    assert shapes[2] == ("text", "text", (32,))
    assert prepared.schema.target.classes[7] == "seven"
    batch = prepared.train.batch(np.arange(40))
    assert all(batch.present[name].all() for name in prepared.schema.names)


def test_phone_and_watch(tmp_path: Path) -> None:
    prepared = first_rows("har-phone-watch", tmp_path)
    assert [(m.kind.value, m.shape) for m in prepared.schema.modalities] == [
        ("series", (64, 6))
    ] * 2
    assert prepared.valid is not None
    values = prepared.valid.batch(np.arange(40)).inputs["phone"].reshape(-1, 6)
    assert np.allclose(values.mean(dim=0), 0, atol=1e-3)
    assert np.allclose(values.std(dim=0), 1, atol=0.05)


def test_questions_about_shared_images(tmp_path: Path) -> None:
    prepared = first_rows("vqa-rad", tmp_path)
    assert [(m.name, m.shape) for m in prepared.schema.modalities] == [
        ("image", (1, 64, 64)),
        ("text", (32,)),
    ]
    assert prepared.shared_files > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits-av", "har-phone-watch", "vqa-rad"])
def test_every_manifest_loads_whole(name: str) -> None:
    if not (REAL / name).is_dir():
        pytest.skip("the real data set is not here")
    for path in sorted((REAL / name).glob("manifest*.csv")):
        prepared = prepare(DataConfig(manifest=str(path)), seed=0)
        assert prepared.skipped == 0
        assert len(prepared.shards) >= 3
