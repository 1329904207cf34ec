"""Records as they are, for early fusion: fixed features with nothing to learn."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.batch import Kind, Modality
from fedfuse.models.cosines import cosine_terms, cosines, frame_terms, over_time
from fedfuse.models.encoders import as_plane, summary_of_series
from fedfuse.models.spec import ModelConfig
from fedfuse.models.text import Words, bag_of_words
from fedfuse.models.video import TIMES, as_clip

__all__ = ["RawFeatures", "raw_width"]

_STEPS = 16


class RawFeatures(nn.Module):
    """(B, *modality.shape) -> (B, width) without a learned layer (but for `learned_words`).

    Images and sounds give their cosine terms (see `cosines`), a video those of its frames over
    time, a series its summary and at most 16 stretches of time, text its bag of words and word
    pairs, vectors, tables and whatever else themselves.
    """

    rows: Tensor
    columns: Tensor
    times: Tensor

    def __init__(self, modality: Modality, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.kind = modality.kind
        shape = modality.shape
        match modality.kind:
            case Kind.IMAGE | Kind.AUDIO | Kind.VIDEO:
                terms = _terms(modality, config)
                self.register_buffer("rows", cosines(shape[-2], terms), persistent=False)
                self.register_buffer("columns", cosines(shape[-1], terms), persistent=False)
                self.register_buffer("times", cosines(shape[0], TIMES), persistent=False)
            case Kind.TEXT:
                self.words = Words(vocabulary, config.text_width, learned=config.learned_words)
            case _:
                pass

    def forward(self, x: Tensor) -> Tensor:
        """(B, *shape) -> (B, width)."""
        match self.kind:
            case Kind.IMAGE | Kind.AUDIO:
                return cosine_terms(as_plane(x), self.rows, self.columns)
            case Kind.VIDEO:
                return over_time(frame_terms(as_clip(x), self.rows, self.columns), self.times)
            case Kind.SERIES:
                steps = x.transpose(1, 2)
                if steps.shape[2] > _STEPS:
                    steps = F.adaptive_avg_pool1d(steps, _STEPS)
                return torch.cat([summary_of_series(x), steps.flatten(1)], 1)
            case Kind.TEXT:
                return bag_of_words(*self.words(x))
            case _:
                return x.flatten(1)


def raw_width(modality: Modality, config: ModelConfig) -> int:
    """The number of raw features of one record."""
    shape = modality.shape
    match modality.kind:
        case Kind.IMAGE | Kind.AUDIO | Kind.VIDEO:
            terms = _terms(modality, config)
            channels = 1 if modality.kind is Kind.AUDIO else shape[-3]
            times = min(TIMES, shape[0]) if modality.kind is Kind.VIDEO else 1
            return times * channels * min(terms, shape[-2]) * min(terms, shape[-1])
        case Kind.SERIES:
            return (3 + min(shape[0], _STEPS)) * shape[1]
        case Kind.TEXT:
            return 2 * config.text_width
        case _:
            return math.prod(shape)


def _terms(modality: Modality, config: ModelConfig) -> int:
    match modality.kind:
        case Kind.IMAGE:
            return config.image_terms or 8
        case Kind.VIDEO:
            return config.video_terms or 8
        case _:
            return config.audio_terms or 8
