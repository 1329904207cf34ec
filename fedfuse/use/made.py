"""Made records in every pattern of absent modalities: to compare a model's copies on."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from fedfuse.batch import Batch, Kind
from fedfuse.data.reading import Channel, Reading

__all__ = ["MOST_PATTERNS", "made_records", "patterns"]

MOST_PATTERNS = 256
"""Above eight modalities patterns are drawn at random."""


def patterns(modalities: int, generator: torch.Generator) -> Tensor:
    """(P, M) bool: each of the 2^M patterns once, or the full, the empty and random ones."""
    if 2**modalities <= MOST_PATTERNS:
        return torch.tensor(list(product((True, False), repeat=modalities)))
    drawn = torch.rand(MOST_PATTERNS, modalities, generator=generator) < 0.5
    drawn[0], drawn[1] = True, False
    return drawn


def made_records(reading: Reading, seed: int = 0) -> Batch:
    """A record for each pattern; what is absent has content too, which must not count."""
    generator = torch.Generator().manual_seed(seed)
    there = patterns(len(reading.channels), generator)
    inputs, present = {}, {}
    for m, channel in enumerate(reading.channels):
        inputs[channel.source.name] = _content(channel, len(there), generator)
        present[channel.source.name] = there[:, m].clone()
    return Batch(inputs, present, torch.zeros(len(there)))


def _content(channel: Channel, count: int, generator: torch.Generator) -> Tensor:
    shape = (count, *channel.spec.shape)
    match channel.source.kind:
        case Kind.TEXT:
            vocabulary = getattr(channel.spec, "vocabulary", 2)
            ids = torch.randint(1, vocabulary, shape, generator=generator)
            length = torch.randint(0, shape[1] + 1, (count, 1), generator=generator)
            return torch.where(torch.arange(shape[1]) < length, ids, 0)
        case Kind.IMAGE | Kind.VIDEO:
            return torch.rand(shape, generator=generator)
        case _:
            return torch.randn(shape, generator=generator)
