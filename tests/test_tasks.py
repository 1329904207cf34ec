"""Losses are per record, and the figures are those of the field."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import mean_absolute_error, r2_score

from fedfuse.batch import Target, TargetKind
from fedfuse.tasks import Task

CLASSES = Task.of(Target(kind=TargetKind.CLASSIFICATION, classes=("a", "b", "c")))
NUMBER = Task.of(Target(kind=TargetKind.REGRESSION, centre=5.0, scale=4.0))


@pytest.mark.parametrize(
    ("task", "outputs", "target"),
    [
        (CLASSES, torch.randn(7, 3), torch.randint(0, 3, (7,))),
        (NUMBER, torch.randn(7, 1), torch.randn(7)),
    ],
)
def test_loss_of_a_record_does_not_depend_on_others(
    task: Task, outputs: torch.Tensor, target: torch.Tensor
) -> None:
    whole = task.loss(outputs, target)
    assert whole.shape == (7,)
    alone = torch.cat([task.loss(outputs[i : i + 1], target[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(whole, alone)


def test_classification_figures() -> None:
    outputs = np.eye(3)[[0, 0, 1, 2, 2, 0]]
    target = np.array([0, 0, 1, 1, 2, 2])
    figures = CLASSES.metrics(outputs, target)
    assert figures["accuracy"] == pytest.approx(4 / 6)
    assert figures["balanced_accuracy"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert CLASSES.baseline(target) == pytest.approx(2 / 6)


def test_regression_figures_are_in_the_targets_own_units() -> None:
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(50)
    guess = truth + rng.standard_normal(50)
    figures = NUMBER.metrics(guess[:, None], truth)
    assert figures["mae"] == pytest.approx(mean_absolute_error(4 * truth + 5, 4 * guess + 5))
    assert figures["pearson_r"] == pytest.approx(stats.pearsonr(truth, guess)[0])
    assert figures["r2"] == pytest.approx(r2_score(truth, guess))
    assert NUMBER.baseline(truth) == pytest.approx(4 * np.abs(truth - np.median(truth)).mean())


def test_constant_guess_has_no_correlation() -> None:
    assert NUMBER.metrics(np.zeros((5, 1)), np.arange(5.0))["pearson_r"] == 0.0
