"""Data sets of shapes that the demo does not have, from their files to a run, private and not."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from fedfuse.batch import Kind
from fedfuse.config import RunConfig
from fedfuse.data.check import check
from fedfuse.data.prepare import prepare
from fedfuse.federation.observer import Silent
from fedfuse.federation.simulate import simulate
from tests.data.videos import brightening, write_video
from tests.sets import write_medical, write_sentiment

HEADER = "id,split,client,label,image,audio,video,text,series,vector,age"


def ran(folder: Path, manifest: Path, **changes: Any) -> dict[str, Any]:
    config = RunConfig().with_values(
        {
            "data.manifest": str(manifest), "train.rounds": 2, "federation.workers": 1,
            "train.device": "cpu", "privacy.noise_multiplier": 1.2, "privacy.epsilon": 30.0,
        }
        | {key.replace("__", "."): value for key, value in changes.items()}
    )  # fmt: skip
    return simulate(config, folder / "run", observer=Silent())


@pytest.mark.parametrize("unit", ["record", pytest.param("none", marks=pytest.mark.slow)])
def test_scans_notes_and_a_table_with_blanks(unit: str, tmp_path: Path) -> None:
    manifest = write_medical(tmp_path / "set")
    assert check(manifest) == ()
    summary = ran(tmp_path, manifest, privacy__unit=unit)
    assert summary["status"] == "finished"
    assert summary["privacy"]["private"] == (unit == "record")
    assert {"note + table", "scan + note + table"} <= set(summary["slices"]["present"])
    if unit == "none":
        assert summary["headline"]["value"] > summary["majority"]


@pytest.mark.parametrize("unit", [pytest.param("subject", marks=pytest.mark.slow), "none"])
def test_features_made_elsewhere_of_speakers_never_heard(unit: str, tmp_path: Path) -> None:
    manifest = write_sentiment(tmp_path / "set")
    assert check(manifest) == ()
    prepared = prepare(RunConfig().with_values({"data.manifest": str(manifest)}).data, seed=0)
    assert {m.name: (m.kind, m.shape) for m in prepared.schema.modalities} == {
        "words": (Kind.VECTOR, (50,)),
        "voice": (Kind.VECTOR, (20,)),
        "face": (Kind.SERIES, (14, 10)),
    }  # fmt: skip
    assert not set(prepared.train.subjects) & set(prepared.test.subjects)
    summary = ran(tmp_path, manifest, privacy__unit=unit, model__encoder__series="gru")
    assert summary["privacy"]["private"] == (unit == "subject")
    assert {"mae", "pearson_r", "acc2", "acc7"} <= set(summary["metrics"])
    assert summary["metrics"]["mae"] <= 6, "no answer leaves the declared range"
    if unit == "none":
        assert summary["headline"]["value"] < summary["majority"]


def test_a_record_of_every_kind_goes_the_whole_way(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    with (tmp_path / "manifest.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            [
                "id",
                "split",
                "client",
                "label",
                "image",
                "audio",
                "video",
                "text",
                "series",
                "vector",
                "age",
            ]
        )
        for k in range(16):
            noise = draw.integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / f"{k}.png")
            soundfile.write(tmp_path / f"{k}.wav", draw.standard_normal(800) / 9, 8000)
            write_video(tmp_path / f"{k}.mp4", brightening(6, 16)[:: 1 - 2 * (k % 2)].copy())
            np.save(tmp_path / f"{k}.npy", draw.standard_normal((5, 2)))
            cells = [
                f"{k}.png", f"{k}.wav", f"{k}.mp4", f"word{k % 2} and more", f"{k}.npy", f"1;2;{k}",
                20 + k,
            ]  # fmt: skip
            cells = [cell if draw.random() > 0.2 else "" for cell in cells]
            rows.writerow([k, "test" if k > 11 else "train", "ab"[k % 2], k % 2, *cells])
    manifest = tmp_path / "manifest.csv"
    assert not [problem for problem in check(manifest) if not problem.warning]
    config = RunConfig().with_values({"data.manifest": str(manifest)}).data
    assert {m.kind for m in prepare(config, seed=0).schema.modalities} == set(Kind)
    summary = ran(
        tmp_path, manifest, train__rounds=1, model__encoder__video="transformer",
        model__encoder__audio="gru", data__audio_features="mfcc", model__fusion="bottleneck",
    )  # fmt: skip
    assert summary["status"] == "finished"
    assert summary["privacy"]["private"]
