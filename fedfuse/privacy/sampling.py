"""Which units a private step sees: Poisson sampling at a declared rate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedfuse.privacy.noise import NoiseStream

__all__ = ["poisson_batches", "poisson_subjects", "shuffled_batches"]


def poisson_batches(
    records: int, sample_rate: float, steps: int, stream: NoiseStream
) -> Iterator[NDArray[np.int64]]:
    """For each of `steps` steps the rows drawn, each row with chance `sample_rate` on its own.

    Guarantees: rows are drawn independently of each other, of the data and of other steps, as
    the accountant assumes (Mironov, Talwar, Zhang 2019, arXiv:1908.10530v1, definition 6). The
    rate is the one declared, whatever `records` is; empty batches are yielded, not skipped.
    """
    for _ in range(steps):
        yield np.flatnonzero(stream.uniform(records) < sample_rate)


def poisson_subjects(
    subjects: NDArray[np.int64], sample_rate: float, steps: int, most: int, stream: NoiseStream
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each of `steps` steps (rows, owners): each subject is drawn with chance `sample_rate`.

    subjects  (N,) the number of each record's subject, 0 to S - 1
    most      records that a drawn subject contributes: as many of its own at random, if it has more

    `owners` ascends from 0 and says whose each row is. Guarantees: as `poisson_batches`, of
    subjects; what one subject contributes depends on no other.
    """
    count = int(subjects.max()) + 1 if len(subjects) else 0
    for _ in range(steps):
        drawn = stream.uniform(count) < sample_rate
        keys = stream.uniform(len(subjects))
        order = np.lexsort((keys, subjects))
        order = order[drawn[subjects[order]]]
        own = subjects[order]
        rank = np.arange(len(own)) - np.searchsorted(own, own)
        rows, own = order[rank < most], own[rank < most]
        yield rows, np.unique(own, return_inverse=True)[1].astype(np.int64)


def shuffled_batches(
    records: int, batch_size: int, steps: int, stream: NoiseStream
) -> Iterator[NDArray[np.int64]]:
    """For each of `steps` steps up to `batch_size` rows, in passes over all rows. NOT PRIVATE."""
    queue = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        if len(queue) == 0:
            queue = np.argsort(stream.uniform(records))
        yield queue[:batch_size]
        queue = queue[batch_size:]
