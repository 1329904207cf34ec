"""Small runs over made data of every kind, without a federation around them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from fedfuse.batch import TargetKind
from fedfuse.config import RunConfig
from fedfuse.conformal import Calibration
from fedfuse.data.prepare import Prepared, prepare
from fedfuse.evaluate import predict
from fedfuse.federation.released import describe
from fedfuse.models.answer import answer
from fedfuse.models.model import build_model
from fedfuse.runfolder import RunFolder
from fedfuse.tasks import Task
from fedfuse.train import Job, Trainer

KINDS = ("image", "audio", "note", "motion", "vector", "age")
COLUMNS = ("id", "split", "client", "label", "image", "audio", "note", "motion", "vector", "age")
TARGETS = {
    "classes": 'task = "classification"\nclasses = ["low", "mid", "high"]\n',
    "labels": 'task = "multi-label"\nclasses = ["low", "mid", "high"]\n',
    "ordered": 'task = "ordinal"\nclasses = ["low", "mid", "high"]\n',
    "number": 'task = "regression"\ntarget_range = [0, 30]\n',
}
_DECLARED = """
[modalities]
image = "png L 12x12"
audio = "wav 8kHz 0.1 s"
note = "inline"
motion = "npy (20,2)"
vector = "vector (3,)"
age = "table"
"""
WORDS = (("calm", "soft", "dim"), ("plain", "even", "fair"), ("loud", "sharp", "bright"))


def write_data(folder: Path, target: str, records: int = 90, *, seed: int = 0) -> Path:
    """A manifest whose modalities each tell something of one of three levels; a seventh of each is
    missing. A third of the records is train, valid and test."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.toml").write_text(TARGETS[target] + _DECLARED)
    path = folder / "manifest.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for k in range(records):
            level = int(rng.integers(3))
            there = rng.random(6) > 1 / 7
            cells = [
                cell if one else ""
                for cell, one in zip(_cells(folder, k, level, rng), there, strict=True)
            ]
            label: Any = ("low", "mid", "high")[level]
            if target == "number":
                label = round(10 * level + float(rng.normal(2, 1)), 3)
            elif target == "labels":
                label = ";".join(("low", "mid", "high")[: level + 1])
            rows.writerow([f"r{k}", ("train", "valid", "test")[k % 3], "ab"[k % 2], label, *cells])
    return path


def _cells(folder: Path, k: int, level: int, rng: np.random.Generator) -> list[str]:
    pixels = np.clip(rng.normal(60, 20, (12, 12)), 0, 255)
    pixels[4 * level : 4 * level + 4] += 120
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{k}.png")
    time = np.arange(800) / 8000
    wave = 0.2 * np.sin(2 * np.pi * (300 + 500 * level) * time) + 0.02 * rng.normal(size=800)
    soundfile.write(folder / f"{k}.wav", wave, 8000)
    np.save(folder / f"{k}.npy", rng.normal(level - 1, 1, (20, 2)).astype(np.float32))
    words = " ".join(WORDS[level][n] for n in rng.integers(0, 3, 4))
    vector = " ".join(f"{x:.4f}" for x in rng.normal(level - 1, 1, 3))
    return [f"{k}.png", f"{k}.wav", f"it was {words}", f"{k}.npy", vector, str(40 + 10 * level)]


def write_run(
    out: Path,
    manifest: Path,
    *,
    steps: int = 30,
    valid: bool = True,
    private: bool = False,
    **settings: object,
) -> Prepared:
    """A run folder as a federation leaves it, of a model trained on all train records at once.

    settings  by key with "__" for ".": model__fusion="late"
    """
    small = {"model.dim": 8, "model.head_width": 8, "model.fusion_rank": 2, "model.text_width": 8,
             "model.image_width": 4, "model.audio_width": 4, "model.series_width": 4,
             "model.vector_width": 8, "data.text_tokens": 8, "data.vocabulary": 64,
             "data.mel_bands": 8, "model.image_depth": 2, "model.audio_depth": 2,
             "privacy.unit": "record" if private else "none"}  # fmt: skip
    given = {key.replace("__", "."): value for key, value in settings.items()}
    config = RunConfig().with_values({"data.manifest": str(manifest), **small, **given})
    prepared = prepare(config.data, seed=0)
    schema = prepared.schema
    model = build_model(schema, config.model, vocabulary=config.data.vocabulary)
    trainer = Trainer(model, Task.of(schema.target, config.model).loss, torch.device("cpu"))
    job = Job(steps=steps, optimizer="adam", learning_rate=0.01, momentum=0.9, batch_size=30)
    if steps:
        trainer.run(prepared.train, job, secret=b"s" * 32)
    folder = RunFolder.create(out, config)
    folder.write_model(trainer.weights(), describe(schema, config))
    calibration = None
    if valid and prepared.valid is not None:
        outputs, truth = predict(model, prepared.valid, device=torch.device("cpu"))
        if schema.target.kind is TargetKind.REGRESSION:
            truth = schema.target.centre + schema.target.scale * truth
        told = answer(outputs, schema.target).double().numpy()
        calibration = Calibration.of(schema.target.kind, told, truth.numpy()).as_dict()
    folder.write_use(prepared.reading.as_dict(), calibration)
    statement = "(3.00, 1e-05)-differential privacy" if private else "NOT PRIVATE: nothing"
    folder.write_summary({"privacy": {"private": private, "statement": statement}})
    return prepared
