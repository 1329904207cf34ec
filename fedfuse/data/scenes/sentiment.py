"""Multimodal sentiment: what somebody says, how it sounds, and what the face does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedfuse.data.scenes.files import RATE, save_array, save_sound, tone
from fedfuse.data.scenes.scene import Factors, Rng, Scene, Shown, pick

__all__ = ["SCENE"]

STEPS, SECONDS = 32, 0.6
_WORDS = (
    ("awful", "terrible", "a waste of money", "unbearable"),
    ("weak", "rather dull", "not for me", "too long"),
    ("fine I guess", "as expected", "like the others", "okay"),
    ("good", "quite funny", "well played", "pleasant"),
    ("wonderful", "brilliant", "loved every minute", "a masterpiece"),
)
_ABOUT = ("the story", "the acting", "that ending", "the music", "this film", "the camera")


def _score(f: Factors) -> str:
    """-3 to 3: words count most, voice and face as much together."""
    return f"{np.clip(2.4 * f[0] + 1.7 * f[1] + 1.7 * f[2], -3, 3):.2f}"


def _text(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """Two phrases whose words are as strong as the first factor, to one of five steps."""
    steps = np.clip(np.round(2 * f[0] + rng.normal(0, 0.3, 2)) + 2, 0, 4).astype(int)
    return (" and ".join(f"{pick(_ABOUT, rng)} was {pick(_WORDS[k], rng)}" for k in steps),)


def _audio(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """A voice whose pitch goes up where it is glad and sinks where not, each with its own base."""
    base = rng.uniform(220, 320)
    bend = 1 + (0.7 * f[1] + rng.normal(0, 0.08)) * np.linspace(-0.5, 0.5, round(RATE * SECONDS))
    return (save_sound(path, tone(base * bend, SECONDS, rng), rng),)


def _visual(f: Factors, path: Path, rng: Rng) -> Sequence[str]:
    """Five action units over time: brows fall and mouth corners rise with the third factor; the
    others move by themselves."""
    t = np.linspace(0, 1, STEPS)[:, None]
    weights = np.array([1.0, -0.8, 0.6, 0.0, 0.0])
    units = 0.5 * f[2] * weights * np.sin(np.pi * t) + rng.normal(0, 0.25, (STEPS, 5))
    return (save_array(path, units + rng.normal(0, 0.15, 5)),)


SCENE = Scene(
    about="Reviews on video by 48 speakers on four channels; speakers of the test are new.",
    factors=("words", "voice", "face"),
    modalities={
        "text": Shown(show=_text),
        "audio": Shown(show=_audio),
        "visual": Shown(show=_visual),
    },
    target=_score,
    bits=False,
    subjects=48,
    declaration=f"""\
name = "sentiment"
task = "regression"
target_range = [-3, 3]

[modalities]
text = "inline sentence"
audio = {{ kind = "wav", sample_rate = {RATE}, seconds = {SECONDS} }}

[modalities.visual]
kind = "series"
shape = [{STEPS}, 5]
mean = [0, 0, 0, 0, 0]
std = [0.4, 0.4, 0.4, 0.3, 0.3]
""",
)
