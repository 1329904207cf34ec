"""Medical diagnosis: an X-ray, vital signs, a note, and a table of laboratory values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedfuse.data.scenes.files import canvas, save_array, save_picture
from fedfuse.data.scenes.scene import Factors, Rng, Scene, Shown, pick

__all__ = ["SCENE"]

LAB = ("age", "crp", "leucocytes", "bnp")
STEPS = 48
_FEVER = ("chills since last night", "feels feverish", "shivering and sweating")
_COOL = ("no fever at home", "never felt hot", "temperature was normal at home")
_SWOLLEN = ("ankles swollen by evening", "wakes up short of breath", "gained weight in a week")
_SLIM = ("no swelling", "sleeps flat without trouble", "weight unchanged")
_ASIDE = ("lives alone", "came with her son", "allergic to penicillin", "asks for a blanket")


def _diagnosis(f: Factors) -> str:
    infection, lungs, heart = f > 0
    if infection:
        return "pneumonia" if lungs else "sepsis"
    return "heart failure" if heart else "none"


def _xray(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """Two dark lungs; opacities of one lung where the lungs are ill, a wide heart where that is."""
    image, draw = canvas(32, rng, gray=True)
    image.paste(150, (0, 0, 32, 32))
    for x in (4, 18):
        draw.ellipse((x, 4, x + 10, 27), fill=45)
    wide = 6 if f[2] > 0 else 3
    draw.ellipse((16 - wide, 15, 16 + wide, 26), fill=190)
    if f[1] > 0:
        x, y = (int(v) for v in rng.integers((4, 7), (9, 16)))
        draw.ellipse((x, y, x + 8, y + 8), fill=165)
    return (save_picture(path, image, rng),)


def _vitals(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """Pulse, oxygen and temperature of two days, an hour a row; they drift for the worse."""
    drift = np.linspace(0, 1, STEPS)
    pulse = 78 + 14 * (f[0] > 0) * drift + 10 * (f[2] > 0) + rng.normal(0, 5, STEPS)
    oxygen = 97 - 4 * (f[1] > 0) * drift - 2 * (f[2] > 0) * drift + rng.normal(0, 0.7, STEPS)
    heat = 36.8 + 1.1 * (f[0] > 0) * drift + rng.normal(0, 0.35, STEPS) + rng.normal(0, 0.3)
    return (save_array(path, np.stack([pulse, oxygen, heat], 1)),)


def _note(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    parts = [
        pick(_FEVER if f[0] > 0 else _COOL, rng),
        pick(_SWOLLEN if f[2] > 0 else _SLIM, rng),
        pick(_ASIDE, rng),
    ]
    return ("; ".join(parts[k] for k in rng.permutation(3)),)


def _laboratory(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """Some values were not measured: blanks."""
    values = (
        rng.normal(62, 12),
        np.exp(rng.normal(4.2 if f[0] > 0 else 1.8, 0.6)),
        rng.normal(13 if f[0] > 0 else 8, 2),
        np.exp(rng.normal(6.3 if f[2] > 0 else 4.6, 0.6)),
    )
    return tuple("" if rng.random() < 0.15 else f"{value:.1f}" for value in values)


SCENE = Scene(
    about="Patients of four hospitals: X-ray, vital signs, a note, laboratory values; a diagnosis.",
    factors=("infection", "lungs", "heart"),
    modalities={
        "xray": Shown(show=_xray),
        "vitals": Shown(show=_vitals),
        "note": Shown(show=_note),
        "table": Shown(show=_laboratory, columns=LAB),
    },
    target=_diagnosis,
    unclear={"xray": 0.05, "vitals": 0.1, "note": 0.15, "table": 0.1},
    declaration=f"""\
name = "medical"
task = "classification"
classes = ["none", "pneumonia", "heart failure", "sepsis"]

[modalities]
xray = "png L 32x32"
vitals = {{ kind = "series", shape = [{STEPS}, 3], mean = [85, 95, 37], std = [12, 3, 0.7] }}
note = "inline sentence"

[modalities.table]
kind = "table"
columns = {list(LAB)!r}
mean = [62, 35, 10, 250]
std = [12, 40, 3.5, 300]
""",
)
