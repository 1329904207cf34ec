"""Files of made records: pictures, sounds, arrays, clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fedfuse.data.scenes.scene import Rng

__all__ = ["RATE", "canvas", "save_array", "save_clip", "save_picture", "save_sound", "tone"]

RATE = 8000
"""Samples a second of each sound."""


def canvas(size: int, rng: Rng, *, gray: bool = False) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A dark picture, and what draws on it."""
    shade = tuple(int(c) for c in rng.integers(20, 60, 3))
    image = Image.new("L", (size, size), shade[0]) if gray else Image.new("RGB", (size,) * 2, shade)
    return image, ImageDraw.Draw(image)


def save_picture(path: Path, image: Image.Image, rng: Rng) -> str:
    """Writes a PNG with some grain; ".png"."""
    pixels = np.asarray(image, dtype=np.float64)
    pixels = np.clip(pixels + rng.normal(0, 10, pixels.shape), 0, 255)
    Image.fromarray(pixels.astype(np.uint8)).save(path.with_suffix(".png"), compress_level=1)
    return ".png"


def save_array(path: Path, values: NDArray[np.float64]) -> str:
    """Writes float32; ".npy"."""
    np.save(path.with_suffix(".npy"), values.astype(np.float32))
    return ".npy"


def tone(pitch: NDArray[np.float64] | float, seconds: float, rng: Rng) -> NDArray[np.float64]:
    """A hum with an overtone. `pitch` in Hz: a number, or one at each of the RATE x seconds."""
    steps = np.full(round(RATE * seconds), 1.0) * pitch
    phase = 2 * np.pi * np.cumsum(steps) / RATE + rng.uniform(0, 2 * np.pi)
    hum: NDArray[np.float64] = np.sin(phase) + 0.4 * np.sin(2 * phase)
    return hum


def save_sound(path: Path, sound: NDArray[np.float64], rng: Rng) -> str:
    """Writes a WAV of 16 bits with some hiss; ".wav"."""
    import soundfile

    loud = rng.uniform(0.2, 0.4) * sound + rng.normal(0, 0.01, len(sound))
    soundfile.write(path.with_suffix(".wav"), np.clip(loud, -1, 1), RATE, subtype="PCM_16")
    return ".wav"


def save_clip(path: Path, frames: NDArray[np.float64], rng: Rng) -> str:
    """Writes frames (T, S, S, 3) in 0 to 255, eight a second, as MPEG-4; ".mp4".

    Raises DataError where PyAV is missing.
    """
    from fedfuse.data.video import load_av

    av = load_av()
    pixels = np.clip(frames + rng.normal(0, 6, frames.shape), 0, 255).astype(np.uint8)
    flags = {"fflags": "+bitexact"}
    with av.open(str(path.with_suffix(".mp4")), "w", container_options=flags) as file:
        stream = file.add_stream("mpeg4", rate=8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 400_000
        stream.codec_context.flags |= 0x00800000  # bitexact: no version of the encoder inside
        for picture in pixels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return ".mp4"
