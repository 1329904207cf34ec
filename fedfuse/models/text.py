"""Encoders of text: token ids (B, L), 0 is padding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.models.blocks import TransformerBlock, masked_mean, sinusoids
from fedfuse.models.encoder import Encoder, Features
from fedfuse.models.spec import ModelConfig

__all__ = ["TextBag", "TextGru", "TextTransformer", "Words", "bag_of_words"]


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


class TextTransformer(Encoder):
    """A small Transformer over words with fixed sinusoidal positions, then the mean."""

    def __init__(self, words: Words, config: ModelConfig, *, sequence: bool) -> None:
        super().__init__()
        self.words = words
        self.blocks = nn.ModuleList(
            TransformerBlock(words.width, config.text_heads) for _ in range(config.text_layers)
        )
        self.norm = nn.LayerNorm(words.width)
        self._ends(words.width, words.width, config.dim, sequence=sequence)

    def features(self, x: Tensor) -> Features:
        """(B, L) -> the mean (B, W), and the words in their context (B, L, W)."""
        h, seen = self.words(x)
        h = h + sinusoids(x.shape[1], self.words.width, h)
        for block in self.blocks:
            h = block(h, seen)
        h = self.norm(h)
        return Features(masked_mean(h, seen), h, seen)


class TextGru(Encoder):
    """A GRU (Cho et al. 2014, arXiv:1406.1078v3) built from Linear layers, whose per-record
    gradients are exact; padding leaves the state as it is."""

    def __init__(self, words: Words, config: ModelConfig, *, sequence: bool) -> None:
        super().__init__()
        self.words = words
        width = words.width
        self.inputs = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(config.text_layers))
        self.states = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(config.text_layers))
        self._ends(width, width, config.dim, sequence=sequence)

    def features(self, x: Tensor) -> Features:
        """(B, L) -> the last state (B, W), and the state after each word (B, L, W)."""
        h, seen = self.words(x)
        for to_gates, from_state in zip(self.inputs, self.states, strict=True):
            h = _gru_layer(h, seen, to_gates, from_state)
        return Features(h[:, -1], h, seen)


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
