"""Losses beside the fused one: what ties modalities together, or teaches each by itself.

They are there in training alone. A model that has any then gives more columns than the outputs,
and `training_loss` makes of them one loss a record:

    outputs C | each modality's own outputs, M C | its nearness to the anchors, M K | there, M | 1

What each does to the guarantee:

| loss           | a record's gradient depends on               | with a promise        |
|----------------|----------------------------------------------|-----------------------|
| unimodal       | the record                                   | as any loss           |
| reconstruction | the record                                   | as any loss           |
| alignment      | the record                                   | as any loss           |
| anchors        | the record, and the public names of classes  | as any loss           |
| contrast       | all records of the batch                     | refused               |
| correlation    | all records of the batch                     | refused               |

The first four are part of the record's own loss, so its whole gradient is clipped at C.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.batch import Target, TargetKind
from fedfuse.errors import ModelError
from fedfuse.models.fusion.operator import flags, hide
from fedfuse.models.spec import AuxiliaryConfig

__all__ = ["Auxiliary", "class_anchors", "training_loss"]

Loss = Callable[[Tensor, Tensor], Tensor]

TEMPERATURE = 0.1
"""Of cosines that are compared by a softmax."""
_RIDGE = 1e-2


class Auxiliary(nn.Module):
    """tokens z (B, M, D), seen (B, M) -> (B, M C + M K + M + 1), as the file's head says.

    unimodal        a linear head of each modality (Wang, Tran and Feiszli 2020, arXiv:1905.12681:
                    the loss of each modality's head beside the fused one, by fixed weights)
    reconstruction  each token that is there from the others that are, by a linear layer: the mean
                    square from the token, which is taken as it stands (after Pham et al. 2019,
                    arXiv:1812.07809, who translate one modality to another)
    alignment       1 - cosine of two tokens of a record, each through a layer of its modality (the
                    alignment of Wang and Isola 2020, arXiv:2005.10242; their uniformity couples
                    the batch, and is left out)
    anchors         the class among all classes by the cosine of a token to fixed vectors of their
                    names (contrast as in CLIP, Radford et al. 2021, arXiv:2103.00020, with public
                    anchors in the place of the batch)
    contrast        InfoNCE over the batch (van den Oord, Li and Vinyals 2018, arXiv:1807.03748)
    correlation     less the mean squared canonical correlation of two modalities over the batch
                    (after Andrew et al. 2013, "Deep Canonical Correlation Analysis", ICML)

    Pairs count where both modalities are there. Sums are over modalities, or pairs of them.
    """

    anchors: Tensor

    def __init__(
        self, config: AuxiliaryConfig, target: Target, modalities: int, dim: int, *, heads: bool
    ) -> None:
        """`heads`: whether it makes heads of its own, or is told what those of the operator say.

        Raises ModelError where anchors are asked for, but the target has no single class.
        """
        super().__init__()
        self.config = config
        self.mixes_records = config.couples
        self.pairs = tuple(combinations(range(modalities), 2))
        if config.anchors and target.kind not in (TargetKind.CLASSIFICATION, TargetKind.ORDINAL):
            raise ModelError(
                f"model.auxiliary.anchors are the names of classes, but the target is "
                f"{target.kind.value}",
                where="model.auxiliary",
                hint="take model.auxiliary.alignment",
            )

        def layers(wanted: float | bool, inputs: int, outputs: int) -> nn.ModuleList:
            count = modalities if wanted else 0
            return nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(count))

        paired = config.alignment or config.anchors or config.couples
        self.own = layers(config.unimodal if heads else 0.0, dim, target.outputs)
        self.predict = layers(config.reconstruction, modalities * (dim + 1), dim)
        self.project = layers(paired, dim, dim)
        names = target.classes if config.anchors else ()
        self.register_buffer("anchors", class_anchors(names, dim), persistent=False)

    def forward(self, z: Tensor, seen: Tensor, own: Tensor | None = None) -> Tensor:
        """own (B, M, C): what the operator's heads say, where it has them."""
        config, parts, penalty = self.config, [], z.new_zeros(len(z))
        if config.unimodal:
            if own is None:
                own = torch.stack([head(z[:, m]) for m, head in enumerate(self.own)], 1)
            parts.append(own.flatten(1))
        if self.predict:
            penalty = penalty + config.reconstruction * self._reconstruction(z, seen)
        if self.project:
            sides = [layer(z[:, m]) for m, layer in enumerate(self.project)]
            unit = F.normalize(torch.stack(sides, 1), dim=2, eps=1e-6)
            if config.anchors:
                near = unit @ self.anchors.to(unit).T / TEMPERATURE
                parts.append(near.flatten(1))
            for a, b in self.pairs:
                both = seen[:, a] & seen[:, b]
                if config.alignment:
                    apart = 1 - (unit[:, a] * unit[:, b]).sum(1)
                    penalty = penalty + config.alignment * hide(apart, both)
                if config.contrast:
                    penalty = penalty + config.contrast * _contrast(unit[:, a], unit[:, b], both)
                if config.correlation:
                    least = _correlation(sides[a][both], sides[b][both])
                    penalty = penalty - config.correlation * hide(least.expand(len(z)), both)
        return torch.cat([*parts, flags(seen, z), penalty.unsqueeze(1)], 1)

    def _reconstruction(self, z: Tensor, seen: Tensor) -> Tensor:
        """(B,): the sum over the modalities that are there beside another one."""
        total = z.new_zeros(len(z))
        for m, layer in enumerate(self.predict):
            others = seen.clone()
            others[:, m] = False
            told = layer(torch.cat([hide(z, others).flatten(1), flags(others, z)], 1))
            wrong = (told - z[:, m].detach()).square().mean(1)
            total = total + hide(wrong, others.any(1) & seen[:, m])
        return total


def training_loss(loss: Loss, config: AuxiliaryConfig, target: Target, modalities: int) -> Loss:
    """The loss of each record of what a model gives in training; `loss` itself without any other.

    (B, outputs and more), targets of B -> (B,): what is not there has no part in it.
    """
    if not config.any:
        return loss
    C, K = target.outputs, len(target.classes)
    own, near = modalities * C * bool(config.unimodal), modalities * K * bool(config.anchors)

    def whole(outputs: Tensor, y: Tensor) -> Tensor:
        fused, said, close, there, penalty = outputs.split([C, own, near, modalities, 1], 1)
        total: Tensor = loss(fused, y) + penalty.squeeze(1)
        seen = there > 0.5
        each = y.repeat_interleave(modalities, 0)
        if own:
            alone = loss(said.reshape(-1, C), each).view(seen.shape)
            total = total + config.unimodal * hide(alone, seen).sum(1)
        if near:
            wrong = F.cross_entropy(close.reshape(-1, K), each, reduction="none").view(seen.shape)
            total = total + config.anchors * hide(wrong, seen).sum(1)
        return total

    return whole


def class_anchors(names: tuple[str, ...], dim: int) -> Tensor:
    """(K, dim) of norm 1: the sum of fixed vectors of the words of a name and of the whole name, so
    that classes with words in common are near each other. They follow from the names alone."""

    def vector(word: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") >> 1
        return torch.randn(dim, generator=torch.Generator().manual_seed(seed))

    rows = [
        sum((vector(w) for w in re.findall(r"\w+", name.lower())), vector(f"class {name}"))
        for name in names
    ]
    return F.normalize(torch.stack(rows), dim=1) if rows else torch.zeros(0, dim)


def _contrast(a: Tensor, b: Tensor, both: Tensor) -> Tensor:
    """(B, D), (B, D) of norm 1 -> (B,): each record's b among the batch's by its a, and back."""
    score = (a @ b.T / TEMPERATURE).masked_fill(~both, -1e4)
    back = (b @ a.T / TEMPERATURE).masked_fill(~both, -1e4)
    place = torch.arange(len(a), device=a.device)
    found = F.cross_entropy(score, place, reduction="none")
    return hide((found + F.cross_entropy(back, place, reduction="none")) / 2, both)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """(N, D), (N, D) -> the mean squared canonical correlation, with a ridge; 0 where N < 2.

    With L L' = S_aa it is |L_a^-1 S_ab L_b^-T|^2 / D: whitening by any root gives the same.
    """
    if len(a) < 2:
        return a.new_zeros(())
    a, b = a - a.mean(0), b - b.mean(0)
    ridge = _RIDGE * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    La, Lb = (torch.linalg.cholesky(x.T @ x / (len(x) - 1) + ridge) for x in (a, b))
    T = torch.linalg.solve_triangular(La, a.T @ b / (len(a) - 1), upper=False)
    T = torch.linalg.solve_triangular(Lb, T.T, upper=False)
    shared: Tensor = T.square().sum() / a.shape[1]
    return shared
