"""Modality dropout: in a training step, records lose modalities that they have."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from fedfuse.batch import Batch

__all__ = ["drop_modalities"]


def drop_modalities(batch: Batch, chance: float, uniform: NDArray[np.float64]) -> Batch:
    """`batch` (B records, M modalities) in which each modality that is there is hidden with
    `chance`; where that would hide all that a record has, the one with the largest number stays.

    uniform  (B M,) in [0, 1): each record's own numbers

    What happens to a record depends on it and on its own numbers alone, so a record's loss is
    still its own (ModDrop, Neverova et al. 2015, arXiv:1501.00102v2, section 3.3).
    """
    names = list(batch.present)
    there = torch.stack([batch.present[name] for name in names], 1)
    drawn = torch.from_numpy(uniform.reshape(len(batch), len(names))).to(there.device)
    drawn = torch.where(there, drawn, -1.0)
    kept = drawn >= chance
    last = torch.zeros_like(kept)
    if len(batch):
        last.scatter_(1, drawn.argmax(1, keepdim=True), True)
    kept = torch.where(kept.any(1, keepdim=True), kept, last & there)
    return Batch(batch.inputs, {name: kept[:, m] for m, name in enumerate(names)}, batch.target)
