"""The settings of the data part. Every field is public knowledge."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AUDIO_FEATURES", "DEMOS", "PARTITIONS", "DataConfig"]

DEMOS = (
    "inspection", "multimedia", "interactive", "medical", "security", "recommendation", "sentiment",
)  # fmt: skip
"""Data sets that are made on the spot; see `scenes/`."""
PARTITIONS = ("client", "iid", "dirichlet", "quantity", "modality")
AUDIO_FEATURES = ("mel", "mfcc", "wave")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which records, how they are decoded, and how one data set becomes simulated nodes.

    0 in a size means: taken from the data set's declaration or, without one, inferred and said.
    """

    manifest: str = ""
    """Path of the manifest (CSV, JSONL, Parquet). Empty: a demo data set is made."""
    demo: str = "inspection"
    """Which one: one of DEMOS. A manifest goes before it."""
    modalities: tuple[str, ...] = ()
    """The modalities to use, by column name. Empty: all."""
    skip_bad: bool = False
    """Leave out records with an error, and count them; otherwise refuse to start."""

    partition: str = "client"
    """How records become nodes: one of PARTITIONS. "client" takes the manifest's column."""
    nodes: int = 0
    """Number of nodes for the other partitions; with "client" the first so many clients."""
    alpha: float = 0.5
    """Concentration of the Dirichlet label skew; smaller is more skewed."""
    modality_keep: float = 0.7
    """Chance that a node has a modality at all, under the "modality" partition."""

    image_size: int = 0
    """Height and width in pixels."""
    sample_rate: int = 0
    """Audio is resampled to this many samples a second."""
    audio_seconds: float = 0.0
    """Audio is cut or zero-padded to this length in seconds."""
    audio_features: str = "mel"
    """What becomes of a sound, one of AUDIO_FEATURES: its log-mel spectrogram, its mel cepstrum, or
    for pretrained encoders "wave", the samples themselves."""
    mfcc: int = 20
    """Cepstral coefficients of a spectrum, where audio_features is "mfcc"."""
    mel_bands: int = 40
    """Mel bands of the log-mel spectrogram."""
    mel_frames: int = 0
    """Frames of the log-mel spectrogram; the hop follows from it. 0: one each 16 ms."""
    video_frames: int = 8
    """Frames of a video that are kept, spread evenly over it."""
    video_size: int = 0
    """Height and width of a frame in pixels."""
    text_tokens: int = 32
    """Words of a text that are kept."""
    vocabulary: int = 4096
    """Hash buckets for words (a public hash, no word list is learned from data)."""
    tokenizer: str = ""
    """A transformers tokenizer in place of the word hash: a folder, or a hub id. Set `vocabulary`
    to its size plus one, or ids share buckets."""
    series_steps: int = 0
    """Time steps that a sensor series is cut or zero-padded to."""
