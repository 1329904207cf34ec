"""Figures of the field for each kind of target, on records that the evaluator may see."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedfuse.batch import Target

__all__ = [
    "all_labels_f1",
    "calibration_error",
    "deviation",
    "majority_share",
    "of_classes",
    "of_labels",
    "of_numbers",
    "of_ordered",
]

Figures = dict[str, float]
Outputs = NDArray[np.floating]
Truth = NDArray[np.generic]
Array = NDArray[np.float64]

_BINS = 15


def of_classes(outputs: Outputs, target: Truth) -> Figures:
    """outputs (N, C) logits, target (N,): accuracy; balanced accuracy (the mean recall over the
    classes that occur, which is the unweighted average recall, UAR); macro F1; macro one-vs-rest
    AUROC (left out where no class can be told from others); expected calibration error."""
    from sklearn.metrics import accuracy_score, f1_score, recall_score

    guess = outputs.argmax(axis=1)
    occur = np.unique(target)
    chance = _softmax(outputs)
    return {
        "accuracy": float(accuracy_score(target, guess)),
        "balanced_accuracy": float(
            recall_score(target, guess, labels=occur, average="macro", zero_division=0)
        ),
        "macro_f1": float(f1_score(target, guess, labels=occur, average="macro", zero_division=0)),
        **_auroc(chance, target[:, None] == np.arange(chance.shape[1])),
        "calibration_error": calibration_error(chance.max(axis=1), guess == target),
    }


def of_labels(outputs: Outputs, target: Truth) -> Figures:
    """outputs (N, C) logits, target (N, C) of 0 and 1: macro F1 over the labels that occur, micro
    F1, the share of records with all labels right, macro AUROC, expected calibration error."""
    from sklearn.metrics import f1_score

    truth = np.asarray(target, dtype=np.float64) > 0.5
    guess, chance = outputs > 0, _sigmoid(outputs)
    occur = truth.any(axis=0)
    sure = np.maximum(chance, 1 - chance)
    macro = f1_score(truth[:, occur], guess[:, occur], average="macro", zero_division=0)
    return {
        "macro_f1": float(macro) if occur.any() else 0.0,
        "micro_f1": float(f1_score(truth.ravel(), guess.ravel(), zero_division=0)),
        "all_right": float((guess == truth).all(axis=1).mean()),
        **_auroc(chance, truth),
        "calibration_error": calibration_error(sure.ravel(), (guess == truth).ravel()),
    }


def of_ordered(outputs: Outputs, target: Truth) -> Figures:
    """outputs (N, C - 1) as `losses.corn` has them, target (N,): mean absolute error in classes,
    accuracy, balanced accuracy, quadratically weighted kappa (Cohen 1968; 0 where undefined).

    The class is the number of k with P(y > k) > 1/2, where P(y > k) is the product of the first
    k + 1 conditional chances (Shi, Cao and Raschka 2021, arXiv:2111.08851v5, equations 2 and 9).
    """
    from sklearn.metrics import accuracy_score, cohen_kappa_score, recall_score

    guess = (np.cumprod(_sigmoid(outputs), axis=1) > 0.5).sum(axis=1)
    spread = len(np.unique(np.concatenate([guess, target]))) > 1
    kappa = cohen_kappa_score(target, guess, weights="quadratic") if spread else 0.0
    return {
        "mae": float(np.abs(guess - target.astype(np.int64)).mean()),
        "accuracy": float(accuracy_score(target, guess)),
        "balanced_accuracy": float(
            recall_score(target, guess, labels=np.unique(target), average="macro", zero_division=0)
        ),
        "kappa": float(kappa),
    }


def of_numbers(outputs: Outputs, truth: Truth, target: Target) -> Figures:
    """outputs (N, 1), truth (N,) in public units: mean absolute error in the target's own units,
    Pearson's r (0 where undefined), R2.

    Where the declared range has 0 inside, as sentiment from -3 to 3 has, also accuracy of the sign
    in its two usual forms: acc2 of negative against the rest, acc2_nonzero of negative against
    positive, records with exactly 0 left out (Tsai et al. 2019, arXiv:1906.00295v1, section 4.1;
    Hazarika et al. 2020, arXiv:2005.03545v3, section 4.2). Where the range is -3 to 3, acc7 too:
    both rounded and cut to it.
    """
    guess = outputs.reshape(-1).astype(np.float64)
    if target.span:
        low, high = ((edge - target.centre) / target.scale for edge in target.span)
        guess = np.clip(guess, low, high)
    y = np.asarray(truth, dtype=np.float64)
    spread = guess.std() * y.std()
    centred = float(((guess - guess.mean()) * (y - y.mean())).mean())
    total = float(((y - y.mean()) ** 2).sum())
    return {
        "mae": target.scale * float(np.abs(guess - y).mean()),
        "pearson_r": centred / float(spread) if spread > 0 else 0.0,
        "r2": 1 - float(((guess - y) ** 2).sum()) / total if total > 0 else 0.0,
        **_sentiment(
            target.centre + target.scale * guess, target.centre + target.scale * y, target.span
        ),
    }


def calibration_error(sure: Array, right: NDArray[np.bool_]) -> float:
    """(N,) confidences, (N,) whether right: the expected calibration error over 15 equal bins of
    confidence (Guo et al. 2017, arXiv:1706.04599v2, equation 3)."""
    sure = np.nan_to_num(sure)  # of a model that diverged
    place = np.minimum((sure * _BINS).astype(np.int64), _BINS - 1)
    gaps = np.bincount(place, weights=right - sure, minlength=_BINS)
    return float(np.abs(gaps).sum() / max(1, len(sure)))


def deviation(target: Truth) -> float:
    """The mean distance from the median: the error of the best constant."""
    y = np.asarray(target, dtype=np.float64)
    return float(np.abs(y - np.median(y)).mean())


def majority_share(target: Truth) -> float:
    """The accuracy of the commonest class."""
    return float(np.bincount(np.asarray(target, dtype=np.int64)).max()) / len(target)


def all_labels_f1(target: Truth) -> float:
    """The macro F1 of saying every label of every record: 2 p / (1 + p) of one with share p."""
    share = np.asarray(target, dtype=np.float64).mean(axis=0)
    share = share[share > 0]
    return float((2 * share / (1 + share)).mean()) if len(share) else 0.0


def _auroc(score: Array, truth: NDArray[np.bool_]) -> Figures:
    """The mean over the columns that hold for some records and not for others."""
    from sklearn.metrics import roc_auc_score

    mixed = [k for k in range(truth.shape[1]) if 0 < truth[:, k].sum() < len(truth)]
    if not mixed or not np.isfinite(score).all():
        return {}
    truth, score = truth[:, mixed], score[:, mixed]
    if len(mixed) == 1:
        truth, score = truth[:, 0], score[:, 0]
    return {"auroc": float(roc_auc_score(truth, score, average="macro"))}


def _sentiment(guess: Array, truth: Array, span: tuple[float, ...]) -> Figures:
    if not span or not span[0] < 0 < span[1]:
        return {}
    told = truth != 0
    found = {"acc2": float(((guess >= 0) == (truth >= 0)).mean())}
    if told.any():
        found["acc2_nonzero"] = float(((guess > 0) == (truth > 0))[told].mean())
    if tuple(span) == (-3.0, 3.0):
        found["acc7"] = float((guess.clip(-3, 3).round() == truth.clip(-3, 3).round()).mean())
    return found


def _softmax(outputs: Outputs) -> Array:
    x = outputs.astype(np.float64)
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(x / x.sum(axis=1, keepdims=True))


def _sigmoid(outputs: Outputs) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * outputs.astype(np.float64))))
