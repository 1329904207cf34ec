"""Each kind of modality and its decoder: the one list that the data part goes by."""

from __future__ import annotations

from fedfuse.batch import Kind
from fedfuse.data.audio import AudioSpec
from fedfuse.data.decoder import Decoder
from fedfuse.data.image import ImageSpec
from fedfuse.data.series import SeriesSpec
from fedfuse.data.table import TableSpec
from fedfuse.data.text import TextSpec
from fedfuse.data.vector import VectorSpec
from fedfuse.data.video import VideoSpec

__all__ = ["KINDS", "kind_of_suffixes"]

KINDS: dict[Kind, type[Decoder]] = {
    Kind.IMAGE: ImageSpec,
    Kind.AUDIO: AudioSpec,
    Kind.VIDEO: VideoSpec,
    Kind.TEXT: TextSpec,
    Kind.SERIES: SeriesSpec,
    Kind.VECTOR: VectorSpec,
    Kind.TABLE: TableSpec,
}


def kind_of_suffixes(suffixes: list[str], count: int) -> Kind | None:
    """The kind of which more than half of `count` files are, by the suffixes of those that have
    one; None where there is none."""
    for kind, decoder in KINDS.items():
        if sum(suffix in decoder.suffixes for suffix in suffixes) * 2 > count:
            return kind
    return None
