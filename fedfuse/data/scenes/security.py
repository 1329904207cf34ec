"""Security monitoring: a camera and a microphone; how alarming what happens is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedfuse.data.scenes.files import RATE, save_clip, save_sound, tone
from fedfuse.data.scenes.scene import Factors, Rng, Scene, Shown

__all__ = ["SCENE"]

FRAMES, SIZE, SECONDS = 8, 24, 0.75


def _level(f: Factors) -> str:
    return ("quiet", "look", "alarm")[int((f > 0).sum())]


def _video(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """Somebody comes nearer and grows, or passes by at the same size."""
    frames = np.full((FRAMES, SIZE, SIZE, 3), rng.uniform(30, 90, 3))
    y, x = np.mgrid[:SIZE, :SIZE]
    near = np.linspace(2.5, 8.5, FRAMES) if f[0] > 0 else np.full(FRAMES, rng.uniform(3.5, 6.5))
    start, step = rng.uniform(6, 18), rng.uniform(-0.8, 0.8)
    shade = rng.uniform(170, 240, 3)
    for k, size in enumerate(near):
        centre = np.clip(start + step * k, 3, SIZE - 3)
        frames[k, (abs(x - centre) < size / 2.2) & (abs(y - SIZE * 0.6) < size)] = shade
    return (save_clip(path, frames, rng),)


def _audio(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """Wind and a far road; glass that breaks is a burst of high tones that die away."""
    count = round(RATE * SECONDS)
    sound = np.convolve(rng.normal(0, 1, count), np.ones(40) / 6, "same")
    if f[1] > 0:
        start = int(rng.integers(count // 8, count // 2))
        decay = np.exp(-np.arange(count - start) / RATE / rng.uniform(0.08, 0.2))
        tones = [tone(rng.uniform(1800, 3600), SECONDS, rng) for _ in range(3)]
        burst = np.sum(tones, axis=0)[: count - start]
        sound[start:] += rng.uniform(0.8, 1.6) * burst * decay
    return (save_sound(path, sound, rng),)


SCENE = Scene(
    about="Cameras with microphones at four sites: quiet, somebody should look, or alarm.",
    factors=("approach", "break"),
    modalities={"video": Shown(show=_video), "audio": Shown(show=_audio)},
    target=_level,
    records=1000,
    unclear={"video": 0.03, "audio": 0.03},
    declaration=f"""\
name = "security"
task = "ordinal"
classes = ["quiet", "look", "alarm"]

[modalities]
video = "mp4 RGB {SIZE}x{SIZE}"
audio = {{ kind = "wav", sample_rate = {RATE}, seconds = {SECONDS} }}
""",
)
