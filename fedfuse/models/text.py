"""Encoders of text: token ids (B, L), 0 is padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.models.encoder import Encoder, Features
from fedfuse.models.spec import ModelConfig
from fedfuse.models.steps import STEPS

__all__ = ["TextBag", "TextSteps", "Words", "bag_of_words"]


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


def bag_of_words(vectors: Tensor, seen: Tensor) -> Tensor:
    """(B, L, W), (B, L) bool -> (B, 2W): the sum of the words' vectors and the sum of the word
    pairs', over the root of the words' number.

    A pair's vector is the product of its words' vectors, the second one shifted by a place, so
    that order counts (binding by multiplication and permutation, Kanerva 2009,
    doi:10.1007/s12559-009-9009-8).
    """
    pairs = vectors[:, :-1] * vectors[:, 1:].roll(1, dims=2)
    both = torch.cat([vectors.sum(1), pairs.sum(1)], 1)
    return both / seen.sum(1, keepdim=True).clamp(min=1).sqrt()


class TextBag(Encoder):
    """Words and word pairs, summed up, then one layer."""

    def __init__(self, words: Words, config: ModelConfig, *, sequence: bool) -> None:
        super().__init__()
        self.words = words
        self._ends(2 * words.width, words.width, config.dim, sequence=sequence)

    def features(self, x: Tensor) -> Features:
        """(B, L) -> the bag (B, 2W), and the words (B, L, W)."""
        vectors, seen = self.words(x)
        return Features(bag_of_words(vectors, seen), vectors, seen)


class TextSteps(Encoder):
    """Words one after the other, each in its context."""

    def __init__(self, words: Words, name: str, config: ModelConfig, *, sequence: bool) -> None:
        super().__init__()
        self.steps = STEPS[name](words.width, config.text_layers, config.text_heads)
        self.words = words
        self._ends(words.width, words.width, config.dim, sequence=sequence)

    def features(self, x: Tensor) -> Features:
        """(B, L) -> the text as one vector (B, W), and its words (B, L, W)."""
        vectors, seen = self.words(x)
        whole, parts = self.steps(vectors, seen)
        return Features(whole, parts, seen)
