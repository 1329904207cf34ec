"""How well a model does on records that the evaluator may see."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedfuse.train import Records

__all__ = ["Scorer", "evaluate", "predict"]


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
