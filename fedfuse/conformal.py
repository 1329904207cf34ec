"""Sets and intervals that hold the truth as often as stated, by split-conformal prediction.

The model is fixed before a calibration record is looked at; each of n calibration records gets a
score of how badly the model's answer fits the truth, and a new answer's set has all values whose
score is no larger than the ceil((n + 1) coverage)-th smallest. Then a new record's truth lies in
its set with a chance of at least `coverage`, whatever the model and the distribution, where it and
the calibration records are exchangeable (Vovk, Gammerman and Shafer 2005; Angelopoulos and Bates
2021, arXiv:2107.07511v6, section 1). The chance is over both, on average over records: not for each
class, each client or each set of modalities that are present.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedfuse.batch import TargetKind

__all__ = ["Calibration", "intervals", "likeliest", "sets"]

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The scores of the calibration records: which record has which is not kept."""

    kind: TargetKind
    scores: Array
    """(N, K), each column sorted: K is 1, or one for each label of a multi-label target."""

    @classmethod
    def of(cls, kind: TargetKind, told: Array, truth: NDArray[np.generic]) -> Calibration:
        """From `told` (N, C), what the model answers (see `models.answer`), and the `truth`: (N,)
        classes, (N, C) labels of 0 and 1, or (N,) numbers in their own units."""
        p, y = np.asarray(told, dtype=np.float64), np.asarray(truth)
        match kind:
            case TargetKind.MULTILABEL:
                scores = np.where(y > 0.5, 1 - p, p)
            case TargetKind.REGRESSION:
                scores = np.abs(p - y.reshape(-1, 1))
            case _:
                scores = np.take_along_axis(_scores(kind, p), y.reshape(-1, 1).astype(int), 1)
        return cls(kind=kind, scores=np.sort(scores, axis=0))

    def threshold(self, coverage: float) -> Array | None:
        """(K,) the largest score that a set admits; None where the records are too few to tell."""
        count = len(self.scores)
        place = math.ceil((count + 1) * coverage)
        return None if place > count else np.asarray(self.scores[place - 1])

    @staticmethod
    def needed(coverage: float) -> int:
        """How many calibration records a coverage takes at least.

        >>> Calibration.needed(0.9)
        9
        """
        return next(n for n in range(1, 1 << 20) if math.ceil((n + 1) * coverage) <= n)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "method": "split conformal",
            "kind": self.kind.value,
            "records": len(self.scores),
            "scores": self.scores.tolist(),
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Calibration:
        """What `as_dict` gave. Raises KeyError, TypeError or ValueError where it is none."""
        scores = np.array(tree["scores"], dtype=np.float64)
        if scores.ndim != 2 or not np.isfinite(scores).all():
            raise ValueError("no scores")
        return cls(kind=TargetKind(tree["kind"]), scores=np.sort(scores, axis=0))


_TIE = 1e-5
"""What a score may be above the threshold and still count as equal to it: torch and other runtimes
round differently, and sets that are a little larger hold no less."""


def sets(kind: TargetKind, told: Array, threshold: Array) -> NDArray[np.bool_]:
    """(N, C) probabilities -> which values are in each record's set.

    Classes and ordered classes: (N, C); of the latter a set has no gap. The likeliest (the median)
    is always in it, which makes coverage only larger. Labels: (N, C, 2), whether "does not hold"
    and "holds" are possible, each label by itself.
    """
    p = np.asarray(told, dtype=np.float64)
    if kind is TargetKind.MULTILABEL:
        both = np.stack([p, 1 - p], 2)
        likelier = np.stack([p <= 0.5, p > 0.5], 2)
        return np.asarray((both <= threshold[:, None] + _TIE) | likelier)
    own = np.arange(p.shape[1]) == likeliest(kind, p)[:, None]
    return np.asarray((_scores(kind, p) <= threshold + _TIE) | own)


def likeliest(kind: TargetKind, told: Array) -> NDArray[np.intp]:
    """(N, C) probabilities of classes -> (N,) the likeliest, or of ordered classes the median."""
    if kind is TargetKind.ORDINAL:
        return np.asarray((1 - np.cumsum(told, axis=1)[:, :-1] > 0.5).sum(1))
    return np.asarray(told.argmax(1))


def intervals(told: Array, threshold: Array) -> Array:
    """(N, 1) numbers -> (N, 2): the lowest and the highest, by absolute residuals."""
    return np.concatenate([told - threshold, told + threshold], axis=1)


def _scores(kind: TargetKind, p: Array) -> Array:
    """(N, C) probabilities -> (N, C), how badly each class fits.

    Classes: 1 - p_y (Sadinle, Lei and Wasserman 2019, arXiv:1609.00451v2, section 2). Ordered
    classes, with F(y) = P(Y <= y): max(1/2 - F(y), F(y - 1) - 1/2), the distance from the median in
    probability, which grows on both sides (the form of Romano, Patterson and Candes 2019,
    arXiv:1905.03222v1, equation 6, with the model's own median in place of two quantiles).
    """
    if kind is not TargetKind.ORDINAL:
        return 1 - p
    upto = np.cumsum(p, axis=1)
    return np.maximum(0.5 - upto, upto - p - 0.5)
