"""Multimedia understanding: a clip, its title and its sound; tags, of which each shows some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedfuse.data.scenes.files import RATE, save_clip, save_sound, tone
from fedfuse.data.scenes.scene import Factors, Rng, Scene, Shown, pick

__all__ = ["SCENE"]

TAGS = ("outdoor", "action", "music", "crowd", "funny", "tutorial")
FRAMES, SIZE, SECONDS = 8, 24, 0.75
_FUNNY = ("you won't stop laughing", "fails again", "best pranks of the week", "so silly")
_SERIOUS = ("a quiet look", "the full report", "in memory", "an honest portrait")
_HOW = ("how to, step by step", "learn it in ten minutes", "a lesson for beginners", "explained")
_SEEN = ("as it happened", "uncut", "the long version", "part three")


def _tags(f: Factors) -> str:
    return ";".join(tag for tag, there in zip(TAGS, f > 0, strict=True) if there) or "none"


def _video(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """Sky and grass, or a room; something that races from left to right, or stands."""
    frames = np.zeros((FRAMES, SIZE, SIZE, 3))
    top, below = ((110, 160, 230), (70, 150, 60)) if f[0] > 0 else ((150, 130, 110), (90, 70, 60))
    frames[:, : SIZE // 2], frames[:, SIZE // 2 :] = top, below
    frames += rng.normal(0, 15, 3)
    y, x = np.mgrid[:SIZE, :SIZE]
    start = rng.uniform(2, 5) if f[1] > 0 else rng.uniform(4, 20)
    for k in range(FRAMES):
        centre = start + 2.3 * k * (f[1] > 0)
        frames[k, (x - centre) ** 2 + (y - SIZE * 0.6) ** 2 < 14] = (225, 60, 50)
    return (save_clip(path, frames, rng),)


def _audio(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """A melody of four notes, or one voice; with or without the noise of many."""
    count = round(RATE * SECONDS)
    notes = np.repeat(rng.choice([440, 554, 659, 880], 4), -(-count // 4))[:count]
    sound = tone(notes if f[2] > 0 else rng.uniform(170, 230), SECONDS, rng)
    if f[3] > 0:
        sound = sound + rng.uniform(0.5, 0.9) * rng.normal(0, 1, count)
    return (save_sound(path, sound, rng),)


def _title(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    parts = (pick(_FUNNY if f[4] > 0 else _SERIOUS, rng), pick(_HOW if f[5] > 0 else _SEEN, rng))
    return (", ".join(parts[k] for k in rng.permutation(2)),)


SCENE = Scene(
    about="Clips of four channels: pictures, sound and title; tags to put on them.",
    factors=TAGS,
    modalities={
        "video": Shown(show=_video),
        "audio": Shown(show=_audio),
        "text": Shown(show=_title),
    },
    target=_tags,
    records=1000,
    unclear={"video": 0.03, "audio": 0.03, "text": 0.03},
    declaration=f"""\
name = "multimedia"
task = "multi-label"
classes = {list(TAGS)!r}

[modalities]
video = "mp4 RGB {SIZE}x{SIZE}"
audio = {{ kind = "wav", sample_rate = {RATE}, seconds = {SECONDS} }}
text = "inline sentence"
""",
)
