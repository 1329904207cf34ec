"""What a model's outputs say: probabilities, or a number in the target's own units."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedfuse.batch import Target, TargetKind

__all__ = ["answer"]


def answer(outputs: Tensor, target: Target) -> Tensor:
    """outputs (B, target.outputs) -> (B, C) float32.

    Classes: their probabilities. Labels: of each the probability that it holds. Ordered classes:
    their probabilities, as differences of P(y > k), which is the product of the first k + 1
    conditional chances (Shi, Cao and Raschka 2021, arXiv:2111.08851v5, equation 2). A
    number: itself (B, 1), in its own units, within the declared range.
    """
    match target.kind:
        case TargetKind.CLASSIFICATION:
            return outputs.softmax(1)
        case TargetKind.MULTILABEL:
            return outputs.sigmoid()
        case TargetKind.ORDINAL:
            # A sum of logarithms: ONNX has no running product.
            above = logsigmoid(outputs).cumsum(1).exp()
            one = torch.ones_like(above[:, :1])
            return torch.cat([one, above], 1) - torch.cat([above, torch.zeros_like(one)], 1)
        case TargetKind.REGRESSION:
            number = target.centre + target.scale * outputs
            return number.clamp(*target.span) if target.span else number
