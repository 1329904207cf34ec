"""Unit "node": the update of a whole round is clipped, summed with others, and noised.

    update   Delta_i = w_i - w, over all trained weights, scaled to norm C at most
    sum      of the Delta_i, plus noise of standard deviation sigma C in each coordinate
    mean     the sum over the number of nodes that were asked, which is public

McMahan et al. 2018 (arXiv:1710.06963v3), algorithm 1, with a fixed divisor.

Guarantees (unit: a node; neighbours: its training data is there, or it is empty and its update
zero, as in Kairouz et al. 2021, arXiv:2103.00039v3, zero-out)
    The sum moves by at most C. Noise by nodes: each node adds a share, whoever sees one update
    alone faces that share. Noise by the server: the server sees updates as they are.
Not covered
    Which nodes were asked, and which answered. Noise that a node was to add and did not.

Flower's own wrappers are not used: their noise is NumPy's global generator, 0-d weights escape
clipping and noise, and an update of zero divides by zero (seen in Flower 1.41).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fedfuse.privacy.noise import NoiseStream
from fedfuse.privacy.summation import RunningSum

__all__ = [
    "NoisyMean",
    "clipped_vector",
    "moved_by",
    "noisy_count",
    "noisy_mean",
    "private_update",
    "unclipped",
]

Arrays = Mapping[str, NDArray[np.generic]]
Update = dict[str, NDArray[np.float64]]


def private_update(
    start: Arrays,
    end: Arrays,
    trained: Iterable[str],
    *,
    clip_norm: float,
    noise_multiplier: float,
    stream: NoiseStream,
) -> dict[str, NDArray[np.generic]]:
    """`end`, moved to within C of `start` and noised; what is not `trained` is as in `start`.

    noise_multiplier  this node's share; 0: the server adds all of it
    """
    update = _noised(_clipped(start, end, trained, clip_norm), noise_multiplier * clip_norm, stream)
    return _moved(start, update)


class NoisyMean:
    """`start`, moved by the noised sum of clipped updates over the number of nodes asked.

    Each end is clipped and added as it comes, and not kept: memory is that of a few models. The
    order in which they come changes nothing.
    """

    def __init__(
        self,
        start: Arrays,
        trained: Iterable[str],
        *,
        asked: int,
        clip_norm: float,
        noise_multiplier: float,
        stream: NoiseStream,
    ) -> None:
        """noise_multiplier  0: the nodes clipped and noised already, so nothing is clipped here"""
        self._start = start
        self._names = sorted(trained)
        self._asked = asked
        self._bound = clip_norm if noise_multiplier else np.inf
        self._std = noise_multiplier * clip_norm
        self._stream = stream
        self._sum = RunningSum({name: start[name].shape for name in self._names})

    def add(self, end: Arrays) -> None:
        """Adds one node's update, the way from the start to `end`."""
        self._sum.add(_clipped(self._start, end, self._names, self._bound))

    def mean(self) -> dict[str, NDArray[np.generic]]:
        """The new weights. Draws the noise, so it is called once."""
        total = _noised(self._sum.total(), self._std, self._stream)
        return _moved(self._start, {name: part / self._asked for name, part in total.items()})


def unclipped(start: Arrays, end: Arrays, trained: Iterable[str], clip_norm: float) -> bool:
    """Whether the update is as long as it may be, or shorter: b_i of `adaptive`."""
    return _length(_update(start, end, trained)) <= clip_norm


def clipped_vector(
    start: Arrays, end: Arrays, trained: Iterable[str], clip_norm: float
) -> NDArray[np.float64]:
    """(d,) the clipped update, its weights one after the other by name; zero if not finite."""
    update = _clipped(start, end, trained, clip_norm)
    return np.concatenate([part.reshape(-1) for part in update.values()])


def moved_by(
    start: Arrays, trained: Iterable[str], vector: NDArray[np.float64]
) -> dict[str, NDArray[np.generic]]:
    """`start`, moved by a vector (d,) that is laid out as that of `clipped_vector`."""
    update, place = {}, 0
    for name in sorted(trained):
        shape, size = start[name].shape, start[name].size
        update[name] = vector[place : place + size].reshape(shape)
        place += size
    return _moved(start, update)


def noisy_count(count: float, std: float, stream: NoiseStream) -> float:
    """`count`, of bits less a half each, with Gaussian noise; 0: somebody else adds it."""
    return count + (float(stream.normal(1, std)) if std else 0.0)


def noisy_mean(
    start: Arrays,
    ends: Iterable[Arrays],
    trained: Iterable[str],
    *,
    asked: int,
    clip_norm: float,
    noise_multiplier: float,
    stream: NoiseStream,
) -> dict[str, NDArray[np.generic]]:
    """What `NoisyMean` gives of all `ends`."""
    fold = NoisyMean(
        start,
        trained,
        asked=asked,
        clip_norm=clip_norm,
        noise_multiplier=noise_multiplier,
        stream=stream,
    )
    for end in ends:
        fold.add(end)
    return fold.mean()


def _clipped(start: Arrays, end: Arrays, trained: Iterable[str], clip_norm: float) -> Update:
    """The update, in float64, at most `clip_norm` long; one that is not finite is zero."""
    update = _update(start, end, trained)
    norm = _length(update)
    if not np.isfinite(norm):
        return {name: np.zeros_like(part) for name, part in update.items()}
    factor = min(1.0, clip_norm / norm) if norm > 0 else 1.0
    return {name: part * factor for name, part in update.items()}


def _update(start: Arrays, end: Arrays, trained: Iterable[str]) -> Update:
    return {
        name: np.asarray(end[name], np.float64) - np.asarray(start[name], np.float64)
        for name in sorted(trained)
    }


def _length(update: Update) -> float:
    return float(np.sqrt(sum(float(np.square(part).sum()) for part in update.values())))


def _noised(update: Update, std: float, stream: NoiseStream) -> Update:
    if std == 0:
        return update
    sizes = [part.size for part in update.values()]
    noise = stream.normal(sum(sizes), std).split(sizes)
    return {
        name: part + _like(drawn, part)
        for (name, part), drawn in zip(update.items(), noise, strict=True)
    }


def _like(drawn: torch.Tensor, part: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(drawn.numpy(), np.float64).reshape(part.shape)


def _moved(start: Arrays, update: Update) -> dict[str, NDArray[np.generic]]:
    moved = {name: np.array(value) for name, value in start.items()}
    for name, part in update.items():
        whole = np.asarray(start[name], np.float64) + part
        moved[name] = whole.astype(start[name].dtype)
    return moved
