"""What is learned: the loss of each record, and the figures that tell how well.

Per-record losses only: a mean over a batch would make one record's gradient depend on others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fedfuse.batch import Target, TargetKind

__all__ = ["Task"]

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Task:
    """A loss, metrics, and which of them is the headline.

    `loss`: outputs (B, C), target (B,) -> (B,). `metrics`: outputs (N, C), target (N,).
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[NDArray[np.floating], NDArray[np.generic]], Figures]
    headline: str
    higher_is_better: bool
    baseline: Callable[[NDArray[np.generic]], float]
    """The headline of the best constant prediction, for the targets given."""

    @classmethod
    def of(cls, target: Target) -> Task:
        """The task that a schema's target asks for."""
        match target.kind:
            case TargetKind.CLASSIFICATION:
                return cls(
                    loss=_cross_entropy,
                    metrics=_classification_metrics,
                    headline="accuracy",
                    higher_is_better=True,
                    baseline=_majority_share,
                )
            case TargetKind.REGRESSION:
                scale = target.scale
                return cls(
                    loss=_huber,
                    metrics=lambda outputs, y: _regression_metrics(outputs, y, scale),
                    headline="mae",
                    higher_is_better=False,
                    baseline=lambda y: scale * _deviation(y),
                )


def _cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target, reduction="none")


def _huber(outputs: Tensor, target: Tensor) -> Tensor:
    """Huber 1964 with threshold 1, in the target's public units."""
    return F.huber_loss(outputs.squeeze(-1), target, reduction="none")


def _classification_metrics(outputs: NDArray[np.floating], target: NDArray[np.generic]) -> Figures:
    """Accuracy, balanced accuracy (mean recall over the classes that occur), macro F1."""
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    guess = outputs.argmax(axis=1)
    classes = np.unique(target)
    return {
        "accuracy": float(accuracy_score(target, guess)),
        "balanced_accuracy": float(
            recall_score(target, guess, labels=classes, average="macro", zero_division=0)
        ),
        "macro_f1": float(
            f1_score(target, guess, labels=classes, average="macro", zero_division=0)
        ),
    }


def _regression_metrics(
    outputs: NDArray[np.floating], target: NDArray[np.generic], scale: float
) -> Figures:
    """Mean absolute error in the target's own units, Pearson's r (0 where undefined), R2."""
    guess = outputs.reshape(-1).astype(np.float64)
    truth = np.asarray(target, dtype=np.float64)
    spread = guess.std() * truth.std()
    centred = float(((guess - guess.mean()) * (truth - truth.mean())).mean())
    total = float(((truth - truth.mean()) ** 2).sum())
    return {
        "mae": scale * float(np.abs(guess - truth).mean()),
        "pearson_r": centred / float(spread) if spread > 0 else 0.0,
        "r2": 1 - float(((guess - truth) ** 2).sum()) / total if total > 0 else 0.0,
    }


def _deviation(target: NDArray[np.generic]) -> float:
    y = np.asarray(target, dtype=np.float64)
    return float(np.abs(y - np.median(y)).mean())


def _majority_share(target: NDArray[np.generic]) -> float:
    return float(torch.from_numpy(np.asarray(target)).bincount().max()) / len(target)
