"""Features of frozen pretrained encoders, computed once for each record and kept in its store.

They lie beside the records themselves, readable by the owner of the store only, and never leave it.
Where the store cannot be written to they are kept in this process. A file is named by a digest of
the weights and of what is made with them, so other weights never find it.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedfuse.data.dataset import Dataset
from fedfuse.models.backbone import PretrainedEncoder
from fedfuse.models.model import FusionModel

__all__ = ["with_features"]

_AT_ONCE = 32


def with_features(dataset: Dataset, model: nn.Module, device: torch.device) -> Dataset:
    """`dataset` with features in place of what frozen encoders of `model` would look at.

    The first call on a store runs the networks over each different content in it, whoever's: on a
    node that is a read of its records, so it comes after the books have reserved the round.
    """
    if not isinstance(model, FusionModel):
        return dataset
    features = {}
    for name, encoder in zip(model.names, model.encoders, strict=True):
        if isinstance(encoder, PretrainedEncoder) and encoder.frozen:
            found = _features(dataset, name, encoder, device)
            if found is not None:
                features[name] = found
    return dataset.with_features(features) if features else dataset


def _features(
    dataset: Dataset, name: str, encoder: PretrainedEncoder, device: torch.device
) -> NDArray[np.float32] | None:
    """(U, ...) of each different content."""
    if dataset.folder is None or not dataset.different(name):
        return _computed(dataset, name, encoder, device)
    made = f"{encoder.weights.sha256} {encoder.modality!r} {encoder.place is not None}"
    path = dataset.folder / f"features-{hashlib.sha256(made.encode()).hexdigest()[:32]}.npy"
    if path in _unwritten:
        return _unwritten[path]
    if not path.exists():
        found = _computed(dataset, name, encoder, device)
        if found is None or not _write(path, found):
            _unwritten[path] = found
            return found
    return _mapped(path, path.stat().st_mtime_ns)


_unwritten: dict[Path, NDArray[np.float32] | None] = {}
"""Of stores that cannot be written to, and of encoders that have no features to store."""


def _computed(
    dataset: Dataset, name: str, encoder: PretrainedEncoder, device: torch.device
) -> NDArray[np.float32] | None:
    parts = []
    for start in range(0, max(1, dataset.different(name)), _AT_ONCE):
        raw = dataset.contents(name, slice(start, start + _AT_ONCE))
        packed = encoder.pack(raw.to(device))
        if packed is None:
            return None
        parts.append(packed.cpu().numpy())
    return np.concatenate(parts)


def _write(path: Path, values: NDArray[np.float32]) -> bool:
    """Whole or not at all: several workers may do it at once."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "wb") as file:
            np.save(file, values, allow_pickle=False)
        part.replace(path)
    except OSError:
        return False
    return True


@lru_cache(maxsize=16)
def _mapped(path: Path, stamp: int) -> NDArray[np.float32]:
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
