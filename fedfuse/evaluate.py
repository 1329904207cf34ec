"""How well a model does on records that the evaluator may see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedfuse.train import Records

__all__ = ["Scorer", "evaluate", "predict", "slices"]


class TestRecords(Records, Protocol):
    """Records of which it is known whose they are and what they have."""

    @property
    def clients(self) -> NDArray[np.str_]:
        """(N,) whose each record is; "" where that is not said."""
        ...

    def present(self, name: str) -> NDArray[np.bool_]:
        """(N,) whether each record has the modality `name`."""
        ...


class Scorer(Protocol):
    """What an evaluation needs of a task."""

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """(B, C), (B,) -> (B,)."""
        ...

    def metrics(
        self, outputs: NDArray[np.floating], target: NDArray[np.generic]
    ) -> dict[str, float]:
        """(N, C), (N,) -> figures by name."""
        ...


def predict(
    model: nn.Module, records: Records, *, device: torch.device, batch_size: int = 512
) -> tuple[Tensor, Tensor]:
    """Outputs (N, C) and targets (N,), on the CPU."""
    model.eval()
    outputs, targets = [], []
    with torch.inference_mode():
        for start in range(0, max(1, len(records)), batch_size):
            rows = np.arange(start, min(start + batch_size, len(records)))
            batch = records.batch(rows)
            outputs.append(model(batch.to(device)).float().cpu())
            targets.append(batch.target)
    return torch.cat(outputs), torch.cat(targets)


def evaluate(
    model: nn.Module,
    records: Records,
    task: Scorer,
    *,
    device: torch.device,
    batch_size: int = 512,
) -> dict[str, float]:
    """The task's metrics and the mean "loss" over `records`, not private: for public records."""
    outputs, targets = predict(model, records, device=device, batch_size=batch_size)
    figures = task.metrics(outputs.numpy(), targets.numpy())
    return {"loss": float(task.loss(outputs, targets).mean()), **figures}


def slices(
    model: nn.Module,
    records: TestRecords,
    task: Scorer,
    names: Sequence[str],
    *,
    device: torch.device,
    batch_size: int = 512,
) -> dict[str, dict[str, dict[str, float]]]:
    """The metrics again, of the records with the same modalities ("present": "image + text") and
    of each client's ("client"), each with the number of "records".

    `names`: the modalities. Not private: for public records. A slice may be small, and its
    figures then say little.
    """
    outputs, targets = predict(model, records, device=device, batch_size=batch_size)
    there = np.stack([records.present(name) for name in names], 1)
    kinds = np.array([" + ".join(np.array(names)[row]) or "nothing" for row in there])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for what, owner in (("present", kinds), ("client", records.clients)):
        found[what] = {
            str(name): {
                "records": float((owner == name).sum()),
                **task.metrics(outputs.numpy()[owner == name], targets.numpy()[owner == name]),
            }
            for name in sorted(set(owner.tolist()) - {""})
        }
    return found
