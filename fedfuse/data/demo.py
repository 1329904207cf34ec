"""A small data set with pictures, sounds and sentences, made on the spot.

An inspection of a machine has three hidden bits: load (low, high), temperature (normal, hot) and
leak (no, yes); the eight combinations are the classes. Each modality tells two of the three, so one
alone is right half the time at best, and any two can tell everything:

    image   a gauge's needle shows the load, a lamp's colour the temperature
    audio   the pitch of the hum shows the temperature, its pulsing the leak
    text    a sentence tells of the leak and the load, in many wordings
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["CLASSES", "make_demo"]

CLASSES = tuple(
    f"{load}-{heat}-{leak}"
    for load in ("low", "high")
    for heat in ("normal", "hot")
    for leak in ("dry", "leak")
)
"""The classes; index = 4 load + 2 hot + leak."""

SIZE = 32
RATE = 8000
SAMPLES = 4000
_MISSING = 0.1
_Rng = np.random.Generator


def make_demo(folder: Path, *, records: int = 2400, clients: int = 6, seed: int = 0) -> Path:
    """Writes the demo data set into `folder` and returns its manifest's path.

    Three quarters are train, 5 % valid, 20 % test. A tenth of each modality is missing at random,
    the last client lacks half its audio; clients differ in size and in their classes. The same
    arguments give the same records.
    """
    rng = np.random.default_rng(seed)
    for name in ("image", "audio"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shares = np.linspace(1.6, 0.6, clients)
    owner = rng.choice(clients, size=records, p=shares / shares.sum())
    skew = rng.dirichlet(np.full(len(CLASSES), 4.0), size=clients)
    labels = np.array([rng.choice(len(CLASSES), p=skew[k]) for k in owner], dtype=np.int64)
    splits = _splits(records, rng)
    present = _present(owner == clients - 1, rng)
    path = folder / "manifest.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "split", "client", "label", "image", "audio", "text"))
        for i, label in enumerate(labels.tolist()):
            load, hot, leak = bool(label & 4), bool(label & 2), bool(label & 1)
            name, cells = f"r{i:05d}", ["", "", ""]
            if present[i, 0]:
                cells[0] = f"image/{name}.png"
                _picture(load, hot, rng).save(folder / cells[0], compress_level=1)
            if present[i, 1]:
                cells[1] = f"audio/{name}.wav"
                _write_sound(folder / cells[1], _sound(hot, leak, rng))
            if present[i, 2]:
                cells[2] = _sentence(leak, load, rng)
            writer.writerow((name, splits[i], f"plant-{owner[i] + 1}", label, *cells))
    (folder / "dataset.toml").write_text(_DECLARATION, encoding="utf-8")
    (folder / "README.md").write_text(_README, encoding="utf-8")
    return path


def _splits(records: int, rng: _Rng) -> list[str]:
    test, valid = max(1, round(records * 0.2)), max(1, round(records * 0.05))
    names = np.array(["test"] * test + ["valid"] * valid + ["train"] * (records - test - valid))
    return [str(name) for name in rng.permutation(names)]


def _present(last: NDArray[np.bool_], rng: _Rng) -> NDArray[np.bool_]:
    """(N, 3): which modalities each record has, never none. `last`: the last client's records."""
    present = rng.random((len(last), 3)) >= _MISSING
    present[:, 1] &= ~(last & (rng.random(len(last)) < 0.5))
    empty = ~present.any(axis=1)
    present[empty, rng.choice([0, 2], size=int(empty.sum()))] = True
    return present


def _picture(load: bool, hot: bool, rng: _Rng) -> Image.Image:
    """A gauge whose needle points left at low load and right at high, and a lamp: green or red."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in rng.integers(30, 70, size=3)))
    draw = ImageDraw.Draw(image)
    x, y = (int(v) for v in rng.integers(-2, 3, size=2))
    draw.ellipse((3 + x, 9 + y, 25 + x, 31 + y), fill=(215, 215, 205))
    angle = math.radians((55 if load else -55) + rng.normal(0, 12))
    centre = (14 + x, 21 + y)
    tip = (centre[0] + 10 * math.sin(angle), centre[1] - 10 * math.cos(angle))
    draw.line((centre, tip), fill=(15, 15, 25), width=3)
    bright = int(rng.integers(180, 256))
    lamp = (bright, 40, 30) if hot else (40, bright, 60)
    draw.ellipse((22 + x // 2, 2 + y // 2, 30 + x // 2, 10 + y // 2), fill=lamp)
    noise = rng.normal(0, 10, size=(SIZE, SIZE, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def _sound(hot: bool, leak: bool, rng: _Rng) -> NDArray[np.float64]:
    """Half a second of hum, low or (hot) high; a leak makes it pulse about ten times a second."""
    t = np.arange(SAMPLES) / RATE
    pitch = (900 if hot else 220) * rng.uniform(0.9, 1.1)
    hum = np.sin(2 * np.pi * pitch * t + rng.uniform(0, 2 * np.pi))
    hum += 0.4 * np.sin(2 * np.pi * 2 * pitch * t + rng.uniform(0, 2 * np.pi))
    if leak:
        pulse = np.sin(2 * np.pi * rng.uniform(8, 12) * t + rng.uniform(0, 2 * np.pi))
        hum = hum * np.where(pulse > 0, 1.0, 0.05)
    sound: NDArray[np.float64] = rng.uniform(0.2, 0.4) * hum + rng.normal(0, 0.01, size=SAMPLES)
    return sound


def _write_sound(path: Path, sound: NDArray[np.float64]) -> None:
    import soundfile

    soundfile.write(path, np.clip(sound, -1, 1), RATE, subtype="PCM_16")


_LEAK = (
    "oil drips onto the floor", "the seal is leaking", "a wet puddle under the flange",
    "fluid seeps from the joint", "there is a leak at the valve",
)  # fmt: skip
_DRY = (
    "everything is dry", "no fluid anywhere", "the seal is tight", "joints are clean and dry",
    "nothing escapes, all tight",
)  # fmt: skip
_HIGH = (
    "running at full load", "heavy duty this shift", "the conveyor is overloaded",
    "operating under heavy load", "pushed to full capacity",
)  # fmt: skip
_LOW = (
    "idling most of the time", "light duty this shift", "the conveyor is nearly empty",
    "operating with a light load", "mostly idle today",
)  # fmt: skip
_ASIDE = (
    "checked by the morning crew", "paint is worn", "next service in march", "filter was changed",
    "door left open", "operator on break", "label is hard to read", "",
)  # fmt: skip


def _sentence(leak: bool, load: bool, rng: _Rng) -> str:
    parts = [
        _pick(_LEAK if leak else _DRY, rng),
        _pick(_HIGH if load else _LOW, rng),
        _pick(_ASIDE, rng),
    ]
    text = ", ".join(parts[k] for k in rng.permutation(3) if parts[k])
    return text[0].upper() + text[1:] + "."


def _pick(phrases: Sequence[str], rng: _Rng) -> str:
    return phrases[int(rng.integers(len(phrases)))]


_DECLARATION = f"""\
name = "machine-inspection"
task = "classification"
classes = {list(CLASSES)!r}

[modalities]
image = "png RGB {SIZE}x{SIZE}"
audio = {{ kind = "wav", sample_rate = {RATE}, seconds = {SAMPLES / RATE} }}
text = "inline sentence"
"""

_README = """\
# machine-inspection

Synthetic inspections of machines in several plants, made by `fedfuse`; no real data.
Each record has up to three modalities and one of eight classes (load, temperature, leak).
`image` tells load and temperature, `audio` temperature and leak, `text` leak and load: one alone
is right half the time at best, any two can tell everything. Some modalities are missing.

- `manifest.csv`: a row for each record; a blank cell is a missing modality
- `dataset.toml`: what every site may know about the data
"""
