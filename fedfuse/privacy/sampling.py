"""Which records a private step sees: Poisson sampling at a declared rate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedfuse.privacy.noise import NoiseStream

__all__ = ["poisson_batches", "shuffled_batches"]


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
