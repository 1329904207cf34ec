"""An interactive system: speech, a gesture's motion, and a face; the intention behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedfuse.data.scenes.files import (
    RATE,
    canvas,
    save_array,
    save_picture,
    save_sound,
    tone,
)
from fedfuse.data.scenes.scene import Factors, Rng, Scene, Shown

__all__ = ["SCENE"]

CLASSES = tuple(
    f"{device}-{way}-{mood}"
    for device in ("light", "music")
    for way in ("down", "up")
    for mood in ("asks", "means")
)
STEPS, SECONDS = 40, 0.5


def _intention(f: Factors) -> str:
    return CLASSES[int(4 * (f[0] > 0) + 2 * (f[1] > 0) + (f[2] > 0))]


def _speech(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """A high voice-like hum for music, a low one for light, rising like a question if unsure."""
    base = (520 if f[0] > 0 else 240) * rng.uniform(0.88, 1.12)
    rise = rng.uniform(-0.05, 0.05) if f[2] > 0 else rng.uniform(0.35, 0.6)
    steps = np.linspace(0, 1, round(RATE * SECONDS))
    return (save_sound(path, tone(base * (1 + rise * steps), SECONDS, rng), rng),)


def _gesture(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """Acceleration of a wrist: a swing up or down, a circle for music and a line for light."""
    t = np.linspace(0, 1, STEPS)
    swing = (1 if f[1] > 0 else -1) * rng.uniform(0.7, 1.3) * np.sin(np.pi * t)
    circle = (
        rng.uniform(0.7, 1.3)
        * (f[0] > 0)
        * np.stack([np.sin(2 * np.pi * t), np.cos(2 * np.pi * t)], 1)
    )
    return (save_array(path, np.column_stack([circle, swing]) + rng.normal(0, 0.5, (STEPS, 3))),)


def _face(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """Eyes that look up or down, and a mouth: firm, or open as if to ask."""
    image, draw = canvas(32, rng)
    x, y = (int(v) for v in rng.integers(-2, 3, 2))
    draw.ellipse((4 + x, 2 + y, 28 + x, 31 + y), fill=(205, 165, 140))
    look = -2 if f[1] > 0 else 2
    for eye in (10, 20):
        draw.ellipse((eye - 3 + x, 9 + y, eye + 3 + x, 16 + y), fill=(245, 245, 245))
        draw.ellipse((eye - 1 + x, 11 + look + y, eye + 1 + x, 14 + look + y), fill=(10, 10, 30))
    if f[2] > 0:
        draw.line((11 + x, 24 + y, 20 + x, 24 + y), fill=(120, 30, 40), width=2)
    else:
        draw.ellipse((12 + x, 20 + y, 19 + x, 28 + y), fill=(90, 20, 30))
    return (save_picture(path, image, rng),)


SCENE = Scene(
    about="Commands to a home: speech, a wrist's motion and a face tell what is meant.",
    factors=("device", "way", "mood"),
    modalities={
        "speech": Shown(show=_speech),
        "gesture": Shown(show=_gesture),
        "face": Shown(show=_face),
    },
    target=_intention,
    unclear={"speech": 0.05, "gesture": 0.05, "face": 0.05},
    declaration=f"""\
name = "interactive"
task = "classification"
classes = {list(CLASSES)!r}

[modalities]
speech = {{ kind = "wav", sample_rate = {RATE}, seconds = {SECONDS} }}
gesture = {{ kind = "series", shape = [{STEPS}, 3], mean = [0, 0, 0], std = [0.8, 0.8, 0.8] }}
face = "png RGB 32x32"
""",
)
