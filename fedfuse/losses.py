"""Losses of single records: outputs (B, C) and targets of B -> (B,). Nothing couples the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Loss",
    "absolute",
    "corn",
    "cross_entropy",
    "focal",
    "huber",
    "label_cross_entropy",
    "label_focal",
    "squared",
]

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, target: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """outputs (B, C), target (B,) int64; `weights` (C,) of the true class."""
    loss = F.cross_entropy(outputs, target, reduction="none")
    return loss if weights is None else loss * weights.to(outputs)[target]


def focal(
    outputs: Tensor, target: Tensor, *, gamma: float, weights: Tensor | None = None
) -> Tensor:
    """(1 - p)^gamma of cross-entropy, p that of the true class (Lin et al. 2017,
    arXiv:1708.02002v2, equation 5, for more than two classes)."""
    loss = F.cross_entropy(outputs, target, reduction="none")
    # From the loss, not from 1 - exp(-loss): that is 0 at p = 1, where its root has no slope.
    wrong = -torch.expm1(-loss.clamp(min=1e-7))
    loss = wrong**gamma * loss
    return loss if weights is None else loss * weights.to(outputs)[target]


def label_cross_entropy(
    outputs: Tensor, target: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """outputs (B, C), target (B, C) of 0 and 1: the mean over the C labels, which are as many in
    each record; `weights` (C,) of a label that holds."""
    weight = None if weights is None else weights.to(outputs)
    loss = F.binary_cross_entropy_with_logits(
        outputs, target.to(outputs), pos_weight=weight, reduction="none"
    )
    return loss.mean(1)


def label_focal(
    outputs: Tensor, target: Tensor, *, gamma: float, weights: Tensor | None = None
) -> Tensor:
    """The focal form of `label_cross_entropy` (Lin et al. 2017, arXiv:1708.02002v2, equation 4)."""
    holds = target.to(outputs)
    loss = F.binary_cross_entropy_with_logits(outputs, holds, reduction="none")
    wrong = -torch.expm1(-loss.clamp(min=1e-7))
    loss = wrong**gamma * loss
    if weights is not None:
        loss = torch.where(holds > 0.5, loss * weights.to(outputs), loss)
    return loss.mean(1)


def corn(outputs: Tensor, target: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """outputs (B, C - 1), target (B,) int64 in 0 .. C - 1: conditional ordinal regression (Shi,
    Cao and Raschka 2021, CORN, arXiv:2111.08851v5, equation 5).

    Output k is the logit of y > k given y >= k, so it learns from records with y >= k alone. The
    paper divides by their number in the batch, which would couple records: here a record's terms
    are averaged over the C - 1 outputs.
    """
    step = torch.arange(outputs.shape[1], device=outputs.device)
    asked = target[:, None] >= step
    loss = F.binary_cross_entropy_with_logits(
        outputs, (target[:, None] > step).to(outputs), reduction="none"
    )
    loss = torch.where(asked, loss, torch.zeros_like(loss)).mean(1)
    return loss if weights is None else loss * weights.to(outputs)[target]


def huber(outputs: Tensor, target: Tensor) -> Tensor:
    """outputs (B, 1), target (B,): Huber 1964 with threshold 1, in the target's public units."""
    return F.huber_loss(outputs.squeeze(-1), target, reduction="none")


def squared(outputs: Tensor, target: Tensor) -> Tensor:
    """outputs (B, 1), target (B,): the squared error, in the target's public units."""
    return F.mse_loss(outputs.squeeze(-1), target, reduction="none")


def absolute(outputs: Tensor, target: Tensor) -> Tensor:
    """outputs (B, 1), target (B,): the absolute error, in the target's public units."""
    return F.l1_loss(outputs.squeeze(-1), target, reduction="none")
