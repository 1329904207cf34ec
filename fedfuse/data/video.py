"""Video: a file to a public number of frames, spread evenly over it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedfuse.data.decoder import Decoder, Read
from fedfuse.data.image import MOST_PIXELS, pixels_of, size_and_channels
from fedfuse.data.media import media_path, read_bytes
from fedfuse.errors import DataError

if TYPE_CHECKING:
    from fedfuse.data.columns import Source
    from fedfuse.data.declaration import DeclaredModality
    from fedfuse.data.probe import Probe
    from fedfuse.data.spec import DataConfig

__all__ = ["VideoSpec", "load_av", "read_video", "video_facts"]

_CONTAINERS = "mov,mp4,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,gif,ivf"
"""What FFmpeg may take a file for. Playlists would open other files, or the network."""
_SPARE = 4
"""So many times more frames are kept while a file is read than are wanted of it."""
_LEAST = 0.9
"""Share of the announced time below which a file counts as cut off."""
_MICROSECONDS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSpec(Decoder):
    """`frames` pictures, `size` pixels high and wide, of `channels` 1 (gray) or 3 (RGB)."""

    frames: int
    size: int
    channels: int

    suffixes: ClassVar = frozenset(
        {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv",
         ".3gp"}
    )  # fmt: skip
    stored: ClassVar = "u1"

    @classmethod
    def plan(cls, source: Source, config: DataConfig, probe: Probe) -> Self:
        """As of images. Raises DataError where PyAV is missing."""
        load_av()  # an error belongs here, not to each record
        size, channels = size_and_channels(source, config.video_size, video_facts, probe)
        return cls(frames=config.video_frames, size=size, channels=channels)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T, C, S, S)."""
        return self.frames, self.channels, self.size, self.size

    def read(self, root: Path, cells: tuple[str, ...], said: DeclaredModality) -> Read:
        """The pixels of the frames. Raises DataError."""
        return Read(read_video(media_path(root, cells[0]), self))


def read_video(path: Path, spec: VideoSpec) -> NDArray[np.uint8]:
    """The pixels of a video, (T, C, S, S): each frame is the middle one of a T-th of it, to within
    a quarter of that, stretched bilinearly. A video of fewer frames shows some of them repeatedly.

    Reads every frame once and keeps a bounded number. Raises DataError where the file is empty,
    holds no picture, or is cut off or damaged, and where PyAV is missing.
    """
    kept: list[NDArray[np.uint8]] = []
    stride, count, end = 1, 0, 0.0
    with _opened(path) as (container, stream):
        for packet in container.demux():
            if packet.is_corrupt:
                raise _cut_off(path)
            if packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            for frame in packet.decode() if packet.stream is stream else ():
                if count % stride == 0:
                    kept.append(pixels_of(frame.to_image(), spec.size, spec.channels))
                    if len(kept) > 2 * _SPARE * spec.frames:
                        kept, stride = kept[::2], 2 * stride
                count += 1
        seconds = (container.duration or 0) / _MICROSECONDS
    if 0 < end < _LEAST * seconds:
        raise _cut_off(path)
    if not kept:
        raise DataError(f"video {path.name} holds no frame", hint="export it again")
    places = (2 * np.arange(spec.frames) + 1) * len(kept) // (2 * spec.frames)
    return np.stack([kept[place] for place in places])


def video_facts(path: Path) -> tuple[int, int]:
    """(the longer side in pixels, channels: 1 or 3) of a video. Raises DataError."""
    with _opened(path) as (_, stream):
        gray = str(stream.codec_context.pix_fmt or "").startswith(("gray", "mono"))
        return max(stream.width, stream.height), 1 if gray else 3


def load_av() -> Any:
    """PyAV. Raises DataError where it is not installed."""
    try:
        return import_module("av")
    except ImportError:
        raise DataError(
            "videos are decoded by PyAV, which is not installed",
            hint='pip install "fedfuse[video]", or leave the modality out by data.modalities',
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The file as a container, and its first stream of pictures. Raises DataError also for what
    goes wrong while it is open."""
    av = load_av()
    data = read_bytes(path)
    try:
        with av.open(io.BytesIO(data), options={"format_whitelist": _CONTAINERS}) as container:
            cover = av.stream.Disposition.attached_pic  # of a song
            found = (s for s in container.streams.video if cover not in s.disposition)
            stream = next(found, None)
            if stream is None:
                raise DataError(
                    f"video {path.name} holds no pictures{_others(container)}",
                    hint="is it a sound? name it in a column of its own",
                )
            if stream.codec_context is None:
                raise _undecodable(path, "UnknownCodec")
            if stream.width * stream.height > MOST_PIXELS:
                raise DataError(
                    f"video {path.name} has {stream.width} x {stream.height} pixels, too many",
                    hint="store it smaller",
                )
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.error.FFmpegError, ValueError, OSError, EOFError, MemoryError) as error:
        raise _undecodable(path, type(error).__name__) from None


def _others(container: Any) -> str:
    kinds = sorted({stream.type for stream in container.streams})
    return f", only {', '.join(kinds)}" if kinds else ""


def _undecodable(path: Path, why: str) -> DataError:
    return DataError(
        f"video {path.name} cannot be decoded ({why})",
        hint="is it complete, and a video? MP4, WebM, MKV, AVI and MOV are read",
    )


def _cut_off(path: Path) -> DataError:
    return DataError(f"video {path.name} is cut off or damaged", hint="copy it again")
