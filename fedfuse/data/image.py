"""Images: a file to (C, S, S) pixels."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedfuse.data.decoder import Decoder, Read
from fedfuse.data.media import media_path, read_bytes
from fedfuse.errors import DataError

if TYPE_CHECKING:
    from fedfuse.data.columns import Source
    from fedfuse.data.declaration import DeclaredModality
    from fedfuse.data.probe import Probe
    from fedfuse.data.spec import DataConfig

__all__ = [
    "MOST_PIXELS",
    "ImageSpec",
    "image_facts",
    "pixels_of",
    "read_image",
    "size_and_channels",
]

MOST_PIXELS = 1 << 26
"""Of one picture; larger ones are refused undecoded."""
_USUAL = 64
"""Pixels in each direction, at most, where no setting says more."""
_GRAY = ("1", "L", "LA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec(Decoder):
    """`channels` is 1 (gray) or 3 (RGB), `size` the height and width in pixels."""

    size: int
    channels: int

    suffixes: ClassVar = frozenset(
        {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
    )
    stored: ClassVar = "u1"

    @classmethod
    def plan(cls, source: Source, config: DataConfig, probe: Probe) -> Self:
        """The usual size, at most 64 pixels."""
        size, channels = size_and_channels(source, config.image_size, image_facts, probe)
        return cls(size=size, channels=channels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, S, S)."""
        return self.channels, self.size, self.size

    def read(self, root: Path, cells: tuple[str, ...], said: DeclaredModality) -> Read:
        """The pixels. Raises DataError."""
        return Read(read_image(media_path(root, cells[0]), self))


def read_image(path: Path, spec: ImageSpec) -> NDArray[np.uint8]:
    """The pixels of an image, (C, S, S), stretched bilinearly where it has another size.

    Raises DataError where the file is empty, no image, or cut off.
    """
    return pixels_of(_eight_bits(_open(path)), spec.size, spec.channels)


def pixels_of(image: Image.Image, size: int, channels: int) -> NDArray[np.uint8]:
    """A picture of 8 bits as (C, S, S), stretched bilinearly where it has another size."""
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def image_facts(path: Path) -> tuple[int, int]:
    """(the longer side in pixels, channels: 1 or 3) of an image. Raises DataError."""
    image = _open(path)
    return max(image.size), 1 if image.mode in _GRAY else 3


def size_and_channels(
    source: Source, wanted: int, facts_of: Callable[[Path], tuple[int, int]], probe: Probe
) -> tuple[int, int]:
    """(size, channels) of images or of a video's frames: `wanted` is the setting of the size."""
    said = source.declared
    size, channels = wanted or min(said.image_size, _USUAL), said.channels
    if not size or channels not in (1, 3):
        facts, _ = probe.look_at_files(source, facts_of, "size or colour")
        facts = facts or [(_USUAL, 3)]  # nothing readable: each record becomes a problem
        size = size or min(Counter(fact[0] for fact in facts).most_common(1)[0][0], _USUAL)
        channels = channels if channels in (1, 3) else max(fact[1] for fact in facts)
    return size, channels


def _open(path: Path) -> Image.Image:
    data = read_bytes(path)
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height <= MOST_PIXELS:
            image.load()
    except Exception as error:  # Pillow's plugins raise many types, all mean the same here
        raise DataError(
            f"image {path.name} cannot be decoded ({type(error).__name__})",
            hint="is it complete? copy it again",
        ) from None
    if image.width * image.height > MOST_PIXELS:
        raise DataError(
            f"image {path.name} has {image.width} x {image.height} pixels, too many to decode",
            hint="store it smaller",
        )
    if image.format == "PNG" and b"IEND" not in data:
        raise DataError(f"image {path.name} is cut off", hint="copy it again")
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep gray images as 8 bits; Pillow's own conversion would clip them."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = float(values.max(initial=0.0))
        scale = 1 / 256 if top > 255 else 255.0 if image.mode == "F" and top <= 1 else 1.0
        return Image.fromarray(np.clip(values * scale, 0, 255).astype(np.uint8))
    return image
