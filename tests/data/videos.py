"""Video files, written by PyAV."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def write_video(
    path: Path, frames: NDArray[np.uint8], *, codec: str = "mpeg4", pixels: str = "yuv420p",
    sound_s: float = 0.0,
) -> Path:  # fmt: skip
    """Writes frames (T, H, W, 3), ten a second, into the container that the suffix names, with so
    many seconds of silence beside them."""
    with av.open(str(path), "w") as file:
        video = sound = None
        if len(frames):
            video = file.add_stream(codec, rate=10)
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt = pixels
        if sound_s:
            sound = file.add_stream("aac", rate=8000, layout="mono")
        if video is not None:
            for frame in frames:
                file.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(video.encode())
        if sound is not None:
            for k in range(round(8 * sound_s)):
                quiet = av.AudioFrame.from_ndarray(
                    np.zeros((1, 1000), np.float32), format="fltp", layout="mono"
                )
                quiet.rate, quiet.pts = 8000, 1000 * k
                file.mux(sound.encode(quiet))
            file.mux(sound.encode())
    return path


def brightening(count: int, size: int = 32) -> NDArray[np.uint8]:
    """(count, size, size, 3): from black to white."""
    level = np.linspace(0, 255, count).astype(np.uint8)
    return np.broadcast_to(level[:, None, None, None], (count, size, size, 3)).copy()
