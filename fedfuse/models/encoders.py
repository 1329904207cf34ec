"""One encoder for each kind of modality: a record's tensor -> one token of width D.

Every row is encoded, also absent (zero) ones: leaving rows out would break the pairing of
gradient rows and records on which clipping rests. The model masks absent tokens afterwards.

GroupNorm and LayerNorm only; a normalisation over the batch would mix records. Bounded or smooth
activations, which keep per-record gradients small (Papernot et al. 2021, arXiv:2007.14191v1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.batch import Kind, Modality
from fedfuse.models.blocks import TransformerBlock, groups_for, masked_mean
from fedfuse.models.spec import ModelConfig

__all__ = ["build_encoder"]


def build_encoder(modality: Modality, config: ModelConfig, vocabulary: int) -> nn.Module:
    """The encoder of `modality`: (B, *modality.shape) -> (B, config.dim)."""
    match modality.kind:
        case Kind.IMAGE:
            return PlaneEncoder(
                modality.shape,
                config.image_width,
                config.image_depth,
                config.image_terms,
                config.dim,
            )
        case Kind.AUDIO:
            shape = (1, *modality.shape)
            return PlaneEncoder(
                shape, config.audio_width, config.audio_depth, config.audio_terms, config.dim
            )
        case Kind.SERIES:
            return SeriesEncoder(
                modality.shape, config.series_width, config.series_depth, config.dim
            )
        case Kind.VECTOR | Kind.TABLE:
            return VectorEncoder(modality.shape[0], config.vector_width, config.dim)
        case Kind.TEXT:
            words = Words(vocabulary, config.text_width, learned=config.learned_words)
            match config.text_encoder:
                case "transformer":
                    return TextTransformer(words, config)
                case "gru":
                    return TextGru(words, config)
                case _:
                    return TextBag(words, config)


class PlaneEncoder(nn.Module):
    """Strided 3 x 3 convolutions over an image (C, H, W) or a log-mel spectrogram (bands, frames),
    beside fixed cosine terms of it.

    An image is brought to zero mean and unit variance by its own statistics first; spectrograms
    come so from the decoder, which knows where the sound ends.

    Cosine terms (Ahmed, Natarajan and Rao 1974; over the bands of a log-mel spectrogram: its mel
    cepstrum, Davis and Mermelstein 1980) have no parameters, so they learn nothing of anybody and
    carry no noise: with a promise, good fixed features are worth more than deep learned ones
    (Tramer and Boneh 2021, arXiv:2011.11660v3).
    """

    rows: Tensor
    columns: Tensor

    def __init__(
        self, shape: tuple[int, ...], width: int, depth: int, terms: int, dim: int
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
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.register_buffer("rows", _cosines(height, terms), persistent=False)
        self.register_buffer("columns", _cosines(width_in, terms), persistent=False)
        fixed = channels * len(self.rows) * len(self.columns)
        self.project = nn.Linear(inner * grid[0] * grid[1] + fixed, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (B, bands, frames) -> (B, D)."""
        x = F.layer_norm(x, x.shape[1:], eps=1e-4) if x.dim() == 4 else x.unsqueeze(1)
        features = [self.pool(self.convolutions(x)).flatten(1)]
        if len(self.rows):
            terms = torch.einsum("kh,bchw,lw->bckl", self.rows, x, self.columns).flatten(1)
            features.append(0.5 * F.layer_norm(terms, terms.shape[1:]))
        return self.project(torch.cat(features, 1))  # type: ignore[no-any-return]


def _cosines(length: int, terms: int) -> Tensor:
    """(min(terms, length), length): the first rows of the orthogonal DCT-II, but for the scale of
    row 0."""
    place = torch.arange(length, dtype=torch.float64) + 0.5
    order = torch.arange(min(terms, length))[:, None]
    return (torch.cos(math.pi * order * place / length) * math.sqrt(2 / length)).float()


class SeriesEncoder(nn.Module):
    """Strided convolutions over time (T, F), then mean and maximum over time."""

    def __init__(self, shape: tuple[int, ...], width: int, depth: int, dim: int) -> None:
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
        self.project = nn.Linear(2 * channels + 3 * shape[1], dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, F) -> (B, D)."""
        level = x.mean(1)
        spread = ((x - level[:, None]).square().mean(1) + 1e-6).sqrt()
        reach = x.amax(1) - x.amin(1)
        h = self.convolutions(x.transpose(1, 2))
        return self.project(torch.cat([h.mean(2), h.amax(2), level, spread, reach], 1))  # type: ignore[no-any-return]


class VectorEncoder(nn.Module):
    """Two layers over a feature vector (F,) or a coded table row (2F,)."""

    def __init__(self, features: int, width: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, F) -> (B, D)."""
        return self.layers(x)  # type: ignore[no-any-return]


class Words(nn.Module):
    """(B, L) token ids -> (B, L, width) vectors; 0 (padding) is the zero vector.

    Fixed vectors are public random ones, the same in every process and never on the wire
    (feature hashing, Weinberger et al. 2009, arXiv:0902.2206v5).
    """

    fixed: Tensor

    def __init__(self, vocabulary: int, width: int, *, learned: bool) -> None:
        super().__init__()
        if learned:
            self.table = nn.Embedding(vocabulary, width)
        else:
            generator = torch.Generator().manual_seed(20_240_229)
            vectors = torch.randn(vocabulary, width, generator=generator)
            self.register_buffer("fixed", vectors, persistent=False)
        self.learned = learned
        self.width = width

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (B, L, width), and which of them are words (B, L) bool."""
        seen = ids > 0
        vectors = self.table(ids) if self.learned else F.embedding(ids, self.fixed)
        return vectors * seen.unsqueeze(-1), seen


class TextBag(nn.Module):
    """The sum of the words' vectors and the sum of the word pairs', over the root of their number,
    then one layer.

    A pair's vector is the product of its words' vectors, the second one shifted by a place, so
    that order counts (binding by multiplication and permutation, Kanerva 2009,
    doi:10.1007/s12559-009-9009-8).
    """

    def __init__(self, words: Words, config: ModelConfig) -> None:
        super().__init__()
        self.words = words
        self.project = nn.Linear(2 * words.width, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, D)."""
        vectors, seen = self.words(ids)
        pairs = vectors[:, :-1] * vectors[:, 1:].roll(1, dims=2)
        both = torch.cat([vectors.sum(1), pairs.sum(1)], 1)
        return self.project(both / seen.sum(1, keepdim=True).clamp(min=1).sqrt())  # type: ignore[no-any-return]


class TextTransformer(nn.Module):
    """A small Transformer over words with fixed sinusoidal positions, then the mean."""

    def __init__(self, words: Words, config: ModelConfig) -> None:
        super().__init__()
        self.words = words
        self.blocks = nn.ModuleList(
            TransformerBlock(words.width, config.text_heads) for _ in range(config.text_layers)
        )
        self.norm = nn.LayerNorm(words.width)
        self.project = nn.Linear(words.width, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, D)."""
        x, seen = self.words(ids)
        x = x + _sinusoids(ids.shape[1], self.words.width, x)
        for block in self.blocks:
            x = block(x, seen)
        return self.project(masked_mean(self.norm(x), seen))  # type: ignore[no-any-return]


class TextGru(nn.Module):
    """A GRU (Cho et al. 2014, arXiv:1406.1078v3) built from Linear layers, whose per-record
    gradients are exact; padding leaves the state as it is."""

    def __init__(self, words: Words, config: ModelConfig) -> None:
        super().__init__()
        self.words = words
        width = words.width
        self.inputs = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(config.text_layers))
        self.states = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(config.text_layers))
        self.project = nn.Linear(width, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, D)."""
        x, seen = self.words(ids)
        for to_gates, from_state in zip(self.inputs, self.states, strict=True):
            x = _gru_layer(x, seen, to_gates, from_state)
        return self.project(x[:, -1])  # type: ignore[no-any-return]


def _gru_layer(x: Tensor, seen: Tensor, to_gates: nn.Module, from_state: nn.Module) -> Tensor:
    """(B, L, W) -> (B, L, W): the state after each word."""
    gates = to_gates(x)
    state = x.new_zeros(x.shape[0], x.shape[2])
    states = []
    for t in range(x.shape[1]):
        reset_in, update_in, new_in = gates[:, t].chunk(3, 1)
        reset_s, update_s, new_s = from_state(state).chunk(3, 1)
        reset, update = torch.sigmoid(reset_in + reset_s), torch.sigmoid(update_in + update_s)
        new = torch.tanh(new_in + reset * new_s)
        state = torch.where(seen[:, t : t + 1], (1 - update) * new + update * state, state)
        states.append(state)
    return torch.stack(states, 1)


def _sinusoids(length: int, width: int, like: Tensor) -> Tensor:
    """(L, width) fixed positions (Vaswani et al. 2017, section 3.5)."""
    half = (width + 1) // 2
    rates = torch.exp(
        torch.arange(half, device=like.device, dtype=like.dtype) * (-math.log(1e4) / half)
    )
    angle = torch.arange(length, device=like.device, dtype=like.dtype)[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width]
