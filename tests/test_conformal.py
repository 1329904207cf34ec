"""Sets and intervals hold the truth as often as they say, and a smaller threshold does not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedfuse.batch import TargetKind
from fedfuse.conformal import Calibration, intervals, likeliest, sets

Array = NDArray[np.float64]
KINDS = list(TargetKind)


def draw(kind: TargetKind, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """(what a model that is wrong in its own way tells, the truth) of `count` records."""
    if kind is TargetKind.REGRESSION:
        x = rng.normal(size=(count, 1))
        return x, (1.3 * x[:, 0] + rng.standard_t(3, count))
    logits = rng.normal(size=(count, 4))
    if kind is TargetKind.MULTILABEL:
        return 1 / (1 + np.exp(-3 * logits)), (rng.random((count, 4)) < 1 / (1 + np.exp(-logits)))
    p = np.exp(3 * logits)
    p /= p.sum(1, keepdims=True)
    real = np.exp(logits)
    real /= real.sum(1, keepdims=True)
    return p, (rng.random((count, 1)) > real.cumsum(1)).sum(1).clip(max=3)


def held(kind: TargetKind, told: Array, truth: Array, threshold: Array) -> Array:
    """By record (and label): whether the truth is in the set."""
    if kind is TargetKind.REGRESSION:
        ends = intervals(told, threshold)
        return (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    chosen = sets(kind, told, threshold)
    if kind is TargetKind.MULTILABEL:
        return np.take_along_axis(chosen, truth.astype(int)[:, :, None], 2)[:, :, 0]
    return np.take_along_axis(chosen, truth.astype(int)[:, None], 1)[:, 0]


def covered(kind: TargetKind, coverage: float, *, said: float | None = None) -> Array:
    """The mean coverage over 400 calibrations with 60 records each, by label."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(400):
        told, truth = draw(kind, 60, rng)
        threshold = Calibration.of(kind, told, truth).threshold(coverage)
        assert threshold is not None
        new, true = draw(kind, 100, rng)
        found.append(held(kind, new, true, threshold).mean(0))
    return np.mean(found, axis=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coverage", [0.7, 0.9])
def test_the_truth_is_held_as_often_as_stated(kind: TargetKind, coverage: float) -> None:
    # 40,000 records in 400 groups: the standard error is at most 0.004; four of them.
    found = covered(kind, coverage)
    assert np.all(found > coverage - 0.016)
    if kind is TargetKind.REGRESSION:  # no ties and no likeliest class: at most 1 / (n + 1) more
        assert np.all(found < coverage + 1 / 61 + 0.016)


@pytest.mark.parametrize("kind", KINDS)
def test_the_models_own_probabilities_would_not_do(kind: TargetKind) -> None:
    """The made models are overconfident, so the test above can fail."""
    rng = np.random.default_rng(5)
    told, truth = draw(kind, 40_000, rng)
    size = told.shape[1] if kind is TargetKind.MULTILABEL else 1
    threshold = np.full(
        size, 0.4 if kind is TargetKind.ORDINAL else 1.0 if kind is TargetKind.REGRESSION else 0.3
    )
    assert np.all(held(kind, told, truth, threshold).mean(0) < 0.88)


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_too_few_records_give_no_threshold(coverage: float) -> None:
    needed = Calibration.needed(coverage)
    rng = np.random.default_rng(0)
    for count in (0, needed - 1, needed):
        told, truth = draw(TargetKind.REGRESSION, count, rng)
        found = Calibration.of(TargetKind.REGRESSION, told, truth).threshold(coverage)
        assert (found is None) == (count < needed)
    assert math.ceil((needed + 1) * coverage) == needed or coverage == 0.5


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=6), st.floats(-0.4, 0.5))
def test_a_set_of_ordered_classes_has_no_gap_and_holds_the_median(
    weights: list[float], threshold: float
) -> None:
    p = np.array([weights]) / sum(weights)
    (chosen,) = sets(TargetKind.ORDINAL, p, np.array([threshold]))
    places = np.flatnonzero(chosen)
    assert len(places)
    assert places.tolist() == list(range(places[0], places[-1] + 1))
    median = int(likeliest(TargetKind.ORDINAL, p)[0])
    assert chosen[median]
    assert p[0, : median + 1].sum() > 0.5 - 1e-9
    assert p[0, median:].sum() > 0.5 - 1e-9


@given(st.integers(0, 10_000), st.floats(0.0, 0.9))
def test_larger_thresholds_only_add(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    for kind in (TargetKind.CLASSIFICATION, TargetKind.MULTILABEL, TargetKind.ORDINAL):
        told, _ = draw(kind, 3, rng)
        small, large = (
            sets(kind, told, np.full(4 if kind is TargetKind.MULTILABEL else 1, t))
            for t in (threshold, threshold + 0.1)
        )
        assert np.all(large >= small)


def test_what_is_stored_is_sorted_and_gives_the_same_threshold() -> None:
    told, truth = draw(TargetKind.MULTILABEL, 30, np.random.default_rng(1))
    made = Calibration.of(TargetKind.MULTILABEL, told, truth)
    again = Calibration.from_dict(json.loads(json.dumps(made.as_dict())))
    first, second = made.threshold(0.9), again.threshold(0.9)
    assert first is not None
    assert second is not None
    assert first.tolist() == second.tolist()
    assert np.all(np.diff(made.scores, axis=0) >= 0)
    with pytest.raises(ValueError, match="no scores"):
        Calibration.from_dict({"kind": "regression", "scores": [1.0]})
