"""One encoder for each kind of modality: a record's tensor -> one token of width D, or several.

GroupNorm and LayerNorm only; a normalisation over the batch would mix records. Bounded or smooth
activations, which keep per-record gradients small (Papernot et al. 2021, arXiv:2007.14191v1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.batch import Kind, Modality
from fedfuse.models.blocks import groups_for
from fedfuse.models.cosines import cosine_terms, cosines
from fedfuse.models.encoder import Encoder, Features
from fedfuse.models.spec import ModelConfig
from fedfuse.models.steps import SoundSteps, StepsEncoder
from fedfuse.models.text import TextBag, TextSteps, Words
from fedfuse.models.video import VideoPool, VideoSteps

__all__ = ["as_plane", "build_encoder", "summary_of_series"]

_STEPS = 16


def build_encoder(
    modality: Modality, config: ModelConfig, vocabulary: int, *, sequence: bool = False
) -> Encoder:
    """The encoder of `modality`: (B, *modality.shape) -> (B, config.dim).

    `sequence`: it can also give tokens of the record's parts; see `Encoder`.
    """
    if config.encoder.pretrained(modality.kind.value):
        # transformers is loaded by those alone who ask for it.
        from fedfuse.models.backbone import PretrainedEncoder

        return PretrainedEncoder(modality, config, vocabulary, sequence=sequence)
    shape, name = modality.shape, getattr(config.encoder, modality.kind.value, "")
    match modality.kind:
        case Kind.IMAGE:
            layers = (config.image_width, config.image_depth, config.image_terms)
            return PlaneEncoder(shape, *layers, config.dim, sequence=sequence)
        case Kind.AUDIO if name != "cnn":
            return SoundSteps(shape[0], name, config, sequence=sequence)
        case Kind.AUDIO:
            layers = (config.audio_width, config.audio_depth, config.audio_terms)
            return PlaneEncoder((1, *shape), *layers, config.dim, sequence=sequence)
        case Kind.VIDEO if name != "pool":
            return VideoSteps(shape, name, config, sequence=sequence)
        case Kind.VIDEO:
            return VideoPool(shape, config, sequence=sequence)
        case Kind.SERIES if name != "cnn":
            return StepsEncoder(shape[1], name, config, sequence=sequence)
        case Kind.SERIES:
            return SeriesEncoder(
                shape, config.series_width, config.series_depth, config.dim, sequence=sequence
            )
        case Kind.VECTOR | Kind.TABLE:
            return VectorEncoder(shape[0], config.vector_width, config.dim)
        case Kind.TEXT:
            words = Words(vocabulary, config.text_width, learned=config.learned_words)
            if name != "bag":
                return TextSteps(words, name, config, sequence=sequence)
            return TextBag(words, config, sequence=sequence)


class PlaneEncoder(Encoder):
    """Strided 3 x 3 convolutions over an image (C, H, W) or a log-mel spectrogram (bands, frames),
    beside fixed cosine terms of it (see `cosines`; Tramer and Boneh 2021, arXiv:2011.11660v3).

    An image is brought to zero mean and unit variance by its own statistics first; spectrograms
    come so from the decoder, which knows where the sound ends.
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        width: int,
        depth: int,
        terms: int,
        dim: int,
        *,
        sequence: bool = False,
    ) -> None:
        super().__init__()
        channels, height, width_in = shape
        layers: list[nn.Module] = []
        inner, inner_h, inner_w = channels, height, width_in
        for layer in range(depth):
            out = width * 2**layer
            stride = 2 if min(inner_h, inner_w) >= 4 else 1
            layers += [
                nn.Conv2d(inner, out, 3, stride=stride, padding=1),
                nn.GroupNorm(groups_for(out), out),
                nn.GELU(),
            ]
            inner, inner_h, inner_w = out, -(-inner_h // stride), -(-inner_w // stride)
        self.convolutions = nn.Sequential(*layers)
        grid = (min(4, inner_h), min(4, inner_w))
        self.pool = nn.Identity() if grid == (inner_h, inner_w) else nn.AdaptiveAvgPool2d(grid)
        self.register_buffer("rows", cosines(height, terms), persistent=False)
        self.register_buffer("columns", cosines(width_in, terms), persistent=False)
        fixed = channels * len(self.rows) * len(self.columns)
        self._ends(inner * grid[0] * grid[1] + fixed, inner, dim, sequence=sequence)

    def features(self, x: Tensor) -> Features:
        """(B, C, H, W) or (B, bands, frames) -> all of it, and its places row by row."""
        x = as_plane(x)
        grid = self.pool(self.convolutions(x)).flatten(2)
        whole = [grid.flatten(1)]
        if len(self.rows):
            whole.append(cosine_terms(x, self.rows, self.columns))
        return Features(torch.cat(whole, 1), grid.transpose(1, 2))


def as_plane(x: Tensor) -> Tensor:
    """(B, C, H, W) or (B, bands, frames) -> (B, C, H, W), an image by its own mean and variance."""
    return F.layer_norm(x, x.shape[1:], eps=1e-4) if x.dim() == 4 else x.unsqueeze(1)


class SeriesEncoder(Encoder):
    """Strided convolutions over time (T, F), then mean and maximum over time."""

    def __init__(
        self, shape: tuple[int, ...], width: int, depth: int, dim: int, *, sequence: bool = False
    ) -> None:
        super().__init__()
        channels = shape[1]
        layers: list[nn.Module] = []
        for layer in range(depth):
            out = width * 2**layer
            layers += [
                nn.Conv1d(channels, out, 5, stride=2, padding=2),
                nn.GroupNorm(groups_for(out), out),
                nn.GELU(),
            ]
            channels = out
        self.convolutions = nn.Sequential(*layers)
        # Level, spread and range of each channel, which normalisation in the layers would hide.
        self._ends(2 * channels + 3 * shape[1], channels, dim, sequence=sequence)

    def features(self, x: Tensor) -> Features:
        """(B, T, F) -> all of it, and at most 16 stretches of time."""
        h = self.convolutions(x.transpose(1, 2))
        whole = torch.cat([h.mean(2), h.amax(2), summary_of_series(x)], 1)
        parts = h if h.shape[2] <= _STEPS else F.adaptive_avg_pool1d(h, _STEPS)
        return Features(whole, parts.transpose(1, 2))


def summary_of_series(x: Tensor) -> Tensor:
    """(B, T, F) -> (B, 3F): level, spread and range of each channel."""
    level = x.mean(1)
    spread = ((x - level[:, None]).square().mean(1) + 1e-6).sqrt()
    return torch.cat([level, spread, x.amax(1) - x.amin(1)], 1)


class VectorEncoder(Encoder):
    """Two layers over a feature vector (F,) or a coded table row (2F,)."""

    def __init__(self, features: int, width: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width), nn.GELU())
        self._ends(width, 0, dim, sequence=False)

    def features(self, x: Tensor) -> Features:
        """(B, F) -> the hidden units; a vector has no parts."""
        return Features(self.layers(x))
