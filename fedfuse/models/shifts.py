"""Shifts: in a training step, records are moved a little in time, or in their plane.

What a record means does not change when its sound begins a moment later, and a model that has seen
it so learns more of few records (Krizhevsky, Sutskever and Hinton 2012, section 4.1, for images).
A record is moved by its own numbers and once a step, so its loss is still its own and it is clipped
as any (De et al. 2022, arXiv:2204.13650v2, section 3.2, average several; one is taken here).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedfuse.batch import Batch, Kind, Schema
from fedfuse.models.spec import ModelConfig

__all__ = ["Shift", "moved", "shift_records", "shifts_of"]

_TIME = {Kind.AUDIO: (2,), Kind.SERIES: (1,)}  # of a waveform (B, samples): the only axis
_PLACE = {Kind.IMAGE: (2, 3), Kind.VIDEO: (3, 4)}


@dataclass(frozen=True, slots=True)
class Shift:
    """Along which axis of a modality's inputs (B, ...) records move, and how far at most."""

    modality: str
    axis: int
    most: int


def shifts_of(schema: Schema, config: ModelConfig) -> tuple[Shift, ...]:
    """What `config` asks for in modalities that have time or place; () for nothing.

    A frozen pretrained encoder sees each record once, before the run: its records stay in place.
    """
    encoder = config.encoder
    found = [
        Shift(modality.name, axis, round(share * modality.shape[axis - 1]))
        for modality in schema.modalities
        if not (encoder.pretrained(modality.kind.value) and encoder.tuning == "frozen")
        for share, axes in ((config.time_shift, _TIME), (config.image_shift, _PLACE))
        for axis in (min(one, len(modality.shape)) for one in axes.get(modality.kind, ()))
    ]
    return tuple(shift for shift in found if shift.most)


def shift_records(batch: Batch, shifts: Sequence[Shift], uniform: NDArray[np.float64]) -> Batch:
    """`batch` (B records) with each record moved by -most to most, all of them alike likely.

    uniform  (B S,) in [0, 1): each record's own numbers, one for each of the S shifts
    """
    drawn = torch.from_numpy(uniform.reshape(len(batch), len(shifts)))
    inputs = dict(batch.inputs)
    for number, shift in enumerate(shifts):
        x = inputs[shift.modality]
        by = (drawn[:, number] * (2 * shift.most + 1)).floor().long() - shift.most
        inputs[shift.modality] = moved(x, by.to(x.device), shift.axis)
    return replace(batch, inputs=inputs)


def moved(x: Tensor, by: Tensor, axis: int) -> Tensor:
    """x (B, ...), by (B,) int64: row i moved by[i] places along `axis`, 0 where nothing comes from.

    >>> moved(torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([1, -2]), 1).tolist()
    [[0, 1, 2], [3, 0, 0]]
    """
    length = x.shape[axis]
    source = torch.arange(length, device=x.device) - by[:, None]
    form = [len(x), *[1] * (axis - 1), length, *[1] * (x.dim() - axis - 1)]
    there = ((source >= 0) & (source < length)).view(form)
    found = x.gather(axis, source.clamp(0, length - 1).view(form).expand_as(x))
    return torch.where(there, found, found.new_zeros(()))
