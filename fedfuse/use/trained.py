"""A trained model and all that its use needs, opened from a run folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedfuse.batch import Batch
from fedfuse.conformal import Calibration
from fedfuse.data.reading import Reading
from fedfuse.errors import DataError, RunFolderError
from fedfuse.federation.released import open_model
from fedfuse.models.answer import answer
from fedfuse.models.model import FusionModel
from fedfuse.runfolder import RunFolder

__all__ = ["Predictor", "Trained", "open_trained", "same_records"]

Array = NDArray[np.floating[Any]]


class Predictor(Protocol):
    """What a prediction needs of a model, wherever it runs."""

    @property
    def reading(self) -> Reading:
        """How its records are read."""
        ...

    @property
    def calibration(self) -> Calibration | None:
        """What sets and intervals rest on; None where there was nothing to calibrate on."""
        ...

    @property
    def statement(self) -> str:
        """What was promised about the records that it was trained on."""
        ...

    def tell(self, batch: Batch) -> tuple[Array, Array]:
        """B records -> the model's outputs (B, K), and what they say: see `models.answer`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A run's model in torch."""

    folder: RunFolder
    model: FusionModel
    reading: Reading
    calibration: Calibration | None
    statement: str
    digest: str
    """SHA-256 of the weights' file."""
    concepts: tuple[str, ...]
    """The names of a knowledge graph's concepts, in the model's order; () where there is none."""

    def tell(self, batch: Batch) -> tuple[Array, Array]:
        """See `Predictor`."""
        device = next(self.model.parameters()).device
        with torch.inference_mode():
            outputs = self.model(batch.to(device)).float()
            told = answer(outputs, self.reading.target)
        return outputs.cpu().numpy(), told.cpu().numpy()


def open_trained(path: Path, device: str = "cpu") -> Trained:
    """The model of the run at `path`, ready to be used.

    Raises RunFolderError where there is none, or its folder does not say how records are read.
    """
    from fedfuse.models.knowledge import Graph

    folder = RunFolder.open(path)
    model, schema = open_model(folder, device)
    try:
        reading = Reading.from_dict(folder.reading(), where=str(path))
        found = folder.calibration()
        calibration = None if found is None else Calibration.from_dict(found)
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise _unusable(path, str(error).splitlines()[0]) from None
    if not same_records(reading, schema.names, [m.shape for m in schema.modalities]):
        raise _unusable(path, "reading.json is of another model")
    known = folder.model()[1].get("knowledge")
    return Trained(
        folder=folder,
        model=model,
        reading=reading,
        calibration=calibration,
        statement=statement_of(folder),
        digest=hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest(),
        concepts=Graph.of(known["triples"]).concepts if known else (),
    )


def statement_of(folder: RunFolder) -> str:
    """What the run promised, as its summary says; that nothing is known, where it has none."""
    summary = folder.summary()
    if summary is None:
        return "UNKNOWN: the run has no summary, so nothing is said about what was promised."
    return str(summary["privacy"]["statement"])


def same_records(reading: Reading, names: tuple[str, ...], shapes: list[tuple[int, ...]]) -> bool:
    """Whether what `reading` gives are records with these modalities."""
    schema = reading.schema
    return schema.names == names and [m.shape for m in schema.modalities] == shapes


def _unusable(path: Path, what: str) -> RunFolderError:
    return RunFolderError(
        what, where=str(path), hint="the folder must be complete, as its run left it"
    )
