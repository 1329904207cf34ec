"""The settings of the model. Every field is public knowledge."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FUSIONS", "TEXT_ENCODERS", "ModelConfig"]

FUSIONS = ("concat", "attention")
TEXT_ENCODERS = ("bag", "transformer", "gru")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Widths and depths of the encoders, the fusion and the head."""

    dim: int = 32
    """Width D of the token that each modality is encoded to."""
    fusion: str = "concat"
    """One of FUSIONS."""
    fusion_layers: int = 1
    """Attention layers (fusion = "attention")."""
    fusion_heads: int = 4
    """Attention heads; divides dim."""
    head_width: int = 32
    """Hidden units of the head; 0 makes it linear."""

    image_width: int = 8
    """Channels of the first image convolution; each further layer doubles them."""
    image_depth: int = 3
    """Convolutions of the image encoder."""
    image_terms: int = 8
    """Beside the convolutions, so many 2-D cosine terms in each direction; 0 leaves them out."""
    audio_width: int = 8
    """Channels of the first audio convolution."""
    audio_depth: int = 3
    """Convolutions of the audio encoder."""
    audio_terms: int = 18
    """The same of a spectrogram: over frequency that is its cepstrum."""
    series_width: int = 16
    """Channels of the first convolution over time."""
    series_depth: int = 2
    """Convolutions of the series encoder."""
    vector_width: int = 32
    """Hidden units of the encoder of vectors and tables."""
    text_encoder: str = "bag"
    """One of TEXT_ENCODERS."""
    text_width: int = 64
    """Width of a word's vector."""
    text_layers: int = 1
    """Transformer or GRU layers."""
    text_heads: int = 2
    """Attention heads; divides text_width."""
    learned_words: bool = False
    """Train the word vectors. False keeps them at fixed public random values, which costs no
    noise: under DP noise grows with the number of trained parameters."""
