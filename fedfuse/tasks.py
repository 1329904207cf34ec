"""What is learned: the loss of each record, and the figures that tell how well.

Per-record losses only: a mean over a batch, or a weight that depends on who else was drawn, would
make one record's gradient depend on others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedfuse import losses, metrics
from fedfuse.batch import Target, TargetKind
from fedfuse.errors import ConfigError
from fedfuse.models.spec import ModelConfig

__all__ = ["Task"]

Figures = dict[str, float]
Outputs = NDArray[np.floating]
Truth = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Task:
    """A loss, metrics, and which of them is the headline.

    `loss`: outputs (B, C), target (B,) or (B, C) -> (B,). `metrics`: outputs (N, C), targets of N.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[Outputs, Truth], Figures]
    headline: str
    higher_is_better: bool
    baseline: Callable[[Truth], float]
    """The headline of the best constant prediction, for the targets given."""

    @classmethod
    def of(cls, target: Target, config: ModelConfig | None = None) -> Task:
        """The task that a schema's target asks for, with the loss that `config` names.

        Raises ConfigError where the loss is none for such a target, or priors are not declared.
        """
        config = config or ModelConfig()
        loss = _loss(target, config)
        match target.kind:
            case TargetKind.CLASSIFICATION:
                return cls(loss, metrics.of_classes, "accuracy", True, metrics.majority_share)
            case TargetKind.MULTILABEL:
                return cls(loss, metrics.of_labels, "macro_f1", True, metrics.all_labels_f1)
            case TargetKind.ORDINAL:
                return cls(loss, metrics.of_ordered, "mae", False, metrics.deviation)
            case TargetKind.REGRESSION:
                scale = target.scale
                return cls(
                    loss,
                    partial(metrics.of_numbers, target=target),
                    "mae",
                    False,
                    lambda y: scale * metrics.deviation(y),
                )


def _loss(target: Target, config: ModelConfig) -> losses.Loss:
    name, kind = config.loss, target.kind
    weights = _class_weights(target, config)
    match kind, name:
        case TargetKind.CLASSIFICATION, "auto" | "cross-entropy":
            return partial(losses.cross_entropy, weights=weights)
        case TargetKind.CLASSIFICATION, "focal":
            return partial(losses.focal, gamma=config.focal_gamma, weights=weights)
        case TargetKind.MULTILABEL, "auto" | "cross-entropy":
            return partial(losses.label_cross_entropy, weights=weights)
        case TargetKind.MULTILABEL, "focal":
            return partial(losses.label_focal, gamma=config.focal_gamma, weights=weights)
        case TargetKind.ORDINAL, "auto":
            return partial(losses.corn, weights=weights)
        case TargetKind.REGRESSION, "auto" | "huber":
            return losses.huber
        case TargetKind.REGRESSION, "mse":
            return losses.squared
        case TargetKind.REGRESSION, "mae":
            return losses.absolute
    raise ConfigError(
        f"model.loss = {name!r}, but the target is {kind.value}",
        where="model.loss",
        hint='"auto" fits each target',
    )


def _class_weights(target: Target, config: ModelConfig) -> Tensor | None:
    """(C,) from the declared shares p: 1 / (C p) of a class, (1 - p) / p of a label that holds."""
    if config.class_weights == "none":
        return None
    if not target.priors or target.kind is TargetKind.REGRESSION:
        raise ConfigError(
            'model.class_weights = "priors", but no shares of classes are declared',
            where="model.class_weights",
            hint="declare them, as public facts: priors = [0.9, 0.1] in dataset.toml",
        )
    shares = torch.tensor(target.priors, dtype=torch.float64)
    if target.kind is TargetKind.MULTILABEL:
        return (1 - shares) / shares
    return 1 / (len(shares) * shares)
