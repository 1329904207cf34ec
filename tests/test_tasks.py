"""Losses are per record, and the figures are those of the field."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import cohen_kappa_score, mean_absolute_error, r2_score, roc_auc_score

from fedfuse import metrics
from fedfuse.batch import Target, TargetKind
from fedfuse.errors import ConfigError
from fedfuse.models.answer import answer
from fedfuse.models.spec import ModelConfig
from fedfuse.tasks import Task

CLASSES = Task.of(Target(kind=TargetKind.CLASSIFICATION, classes=("a", "b", "c")))
NUMBER = Task.of(Target(kind=TargetKind.REGRESSION, centre=5.0, scale=4.0))
PRIORS = (0.5, 0.3, 0.2)
LABELS = Target(kind=TargetKind.MULTILABEL, classes=("a", "b", "c"), priors=PRIORS)
ORDERED = Target(kind=TargetKind.ORDINAL, classes=("a", "b", "c"), priors=PRIORS)
NAMED = Target(kind=TargetKind.CLASSIFICATION, classes=("a", "b", "c"), priors=PRIORS)
SENTIMENT = Target(kind=TargetKind.REGRESSION, centre=0.0, scale=3.0, span=(-3.0, 3.0))
EACH = {
    TargetKind.CLASSIFICATION: (torch.randn(7, 3), torch.randint(0, 3, (7,))),
    TargetKind.MULTILABEL: (torch.randn(7, 3), torch.randint(0, 2, (7, 3)).float()),
    TargetKind.ORDINAL: (torch.randn(7, 2), torch.randint(0, 3, (7,))),
    TargetKind.REGRESSION: (torch.randn(7, 1), torch.randn(7)),
}


@pytest.mark.parametrize("weights", ["none", "priors"])
@pytest.mark.parametrize(
    ("target", "loss"),
    [
        (NAMED, "auto"), (NAMED, "focal"), (LABELS, "cross-entropy"), (LABELS, "focal"),
        (ORDERED, "auto"), (SENTIMENT, "huber"), (SENTIMENT, "mse"), (SENTIMENT, "mae"),
    ],
)  # fmt: skip
def test_loss_of_a_record_does_not_depend_on_others(
    target: Target, loss: str, weights: str
) -> None:
    if target is SENTIMENT:
        weights = "none"
    task = Task.of(target, ModelConfig(loss=loss, class_weights=weights))
    outputs, target = EACH[target.kind]
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


def test_focal_loss_without_gamma_is_cross_entropy_and_with_it_plays_down_what_is_right() -> None:
    for target in (NAMED, LABELS):
        outputs, truth = EACH[target.kind]
        plain = Task.of(target).loss(outputs, truth)
        flat = Task.of(target, ModelConfig(loss="focal", focal_gamma=0.0)).loss(outputs, truth)
        torch.testing.assert_close(flat, plain)
    focal = Task.of(NAMED, ModelConfig(loss="focal", focal_gamma=2.0))
    outputs = torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)
    p = outputs.softmax(1)[0, 0]
    expected = -((1 - p) ** 2) * p.log()
    torch.testing.assert_close(focal.loss(outputs, torch.tensor([0]))[0], expected)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_a_certain_answer_has_a_finite_gradient(gamma: float) -> None:
    for target, truth in ((NAMED, torch.tensor([0])), (LABELS, torch.tensor([[1.0, 0, 0]]))):
        task = Task.of(target, ModelConfig(loss="focal", focal_gamma=gamma))
        outputs = torch.tensor([[500.0, -500.0, -500.0]], requires_grad=True)
        task.loss(outputs, truth).sum().backward()
        assert outputs.grad is not None
        assert torch.isfinite(outputs.grad).all()


def test_declared_shares_weigh_classes_and_labels_that_hold() -> None:
    config = ModelConfig(class_weights="priors")
    outputs, truth = EACH[TargetKind.CLASSIFICATION]
    ratio = Task.of(NAMED, config).loss(outputs, truth) / Task.of(NAMED).loss(outputs, truth)
    torch.testing.assert_close(ratio, (1 / (3 * torch.tensor(PRIORS)))[truth])
    # With the true shares, weights are 1 on average, so the learning rate means what it did.
    assert sum(p / (3 * p) for p in PRIORS) == pytest.approx(1)
    outputs, truth = EACH[TargetKind.MULTILABEL]
    weight = (1 - torch.tensor(PRIORS)) / torch.tensor(PRIORS)
    p = outputs.sigmoid()
    terms = -(weight * truth * p.log() + (1 - truth) * (1 - p).log())
    torch.testing.assert_close(Task.of(LABELS, config).loss(outputs, truth), terms.mean(1))


def test_weights_without_declared_shares_are_refused() -> None:
    bare = Target(kind=TargetKind.CLASSIFICATION, classes=("a", "b"))
    with pytest.raises(ConfigError, match="no shares of classes are declared"):
        Task.of(bare, ModelConfig(class_weights="priors"))


@pytest.mark.parametrize(
    ("target", "loss"), [(ORDERED, "focal"), (SENTIMENT, "cross-entropy"), (NAMED, "mse")]
)
def test_a_loss_for_another_target_is_refused(target: Target, loss: str) -> None:
    with pytest.raises(ConfigError, match=rf"{loss}.*{target.kind.value}"):
        Task.of(target, ModelConfig(loss=loss))


def test_ordinal_loss_is_the_likelihood_of_the_class() -> None:
    outputs, truth = EACH[TargetKind.ORDINAL]
    outputs = outputs.double()
    p = outputs.sigmoid()
    chance = torch.stack([1 - p[:, 0], p[:, 0] * (1 - p[:, 1]), p[:, 0] * p[:, 1]], 1)
    expected = -chance.gather(1, truth[:, None])[:, 0].log() / 2  # two outputs, averaged
    torch.testing.assert_close(Task.of(ORDERED).loss(outputs, truth), expected)


def test_ordinal_figures() -> None:
    # P(y > 0), P(y > 1 | y > 0): class 0; class 2; class 1, as 0.9 x 0.55 is below a half
    p = np.array([[0.4, 0.9], [0.9, 0.8], [0.9, 0.55]])
    outputs = np.log(p / (1 - p))
    found = Task.of(ORDERED).metrics(outputs, np.array([0, 1, 1]))
    assert found["mae"] == pytest.approx(1 / 3)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["kappa"] == pytest.approx(
        cohen_kappa_score([0, 1, 1], [0, 2, 1], weights="quadratic")
    )
    assert Task.of(ORDERED).metrics(outputs[:1], np.array([0]))["kappa"] == 0.0
    assert Task.of(ORDERED).baseline(np.array([0, 1, 1])) == pytest.approx(1 / 3)


def test_label_figures() -> None:
    outputs = np.array([[1.0, -1, -1], [1, 1, -1], [-1, -1, -1]])
    truth = np.array([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])
    task = Task.of(LABELS)
    found = task.metrics(outputs, truth)
    assert found["macro_f1"] == pytest.approx((0.5 + 1.0) / 2)  # c never holds
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["all_right"] == pytest.approx(1 / 3)
    everything = task.metrics(np.ones_like(outputs), truth)
    assert task.baseline(truth) == pytest.approx(everything["macro_f1"])


def test_areas_under_the_curve_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    outputs, truth = rng.standard_normal((60, 3)), rng.integers(0, 3, 60)
    chance = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    found = CLASSES.metrics(outputs, truth)
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, chance, multi_class="ovr"))
    assert "auroc" not in CLASSES.metrics(outputs, np.zeros(60, dtype=np.int64))


def test_calibration_error() -> None:
    sure = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = np.array([True, True, True, False, True, False])
    expected = (4 * abs(0.75 - 0.95) + 2 * abs(0.5 - 0.55)) / 6
    assert metrics.calibration_error(sure, right) == pytest.approx(expected)
    assert metrics.calibration_error(np.ones(3), np.array([True] * 3)) == 0.0


def test_sentiment_figures_need_the_range_from_minus_3_to_3() -> None:
    truth, guess = np.array([-2.0, 0.0, 1.0, 3.0]), np.array([-1.6, -0.2, 2.0, 5.0])
    found = Task.of(SENTIMENT).metrics(guess[:, None] / 3, truth / 3)
    assert found["acc2"] == pytest.approx(3 / 4)  # 0 counts as not negative
    assert found["acc2_nonzero"] == 1.0
    assert found["acc7"] == pytest.approx(3 / 4)  # -2, 0 and 3 after rounding and cutting
    assert "acc2" not in NUMBER.metrics(guess[:, None], truth)


@pytest.mark.parametrize("target", [NAMED, LABELS, ORDERED, SENTIMENT])
def test_figures_of_a_model_that_diverged_are_no_error(target: Target) -> None:
    outputs, truth = EACH[target.kind]
    Task.of(target).metrics(np.full(outputs.shape, np.nan), truth.numpy())


def test_no_answer_leaves_the_declared_range() -> None:
    outputs, truth = np.array([[90.0], [-90.0], [0.5]]), np.array([1.0, -1.0, 0.5])
    assert Task.of(SENTIMENT).metrics(outputs, truth)["mae"] == 0
    said = answer(torch.tensor(outputs), SENTIMENT)
    assert said.flatten().tolist() == [3.0, -3.0, 1.5]
    free = Target(kind=TargetKind.REGRESSION, centre=0.0, scale=3.0)
    assert answer(torch.tensor(outputs), free).flatten().tolist() == [270.0, -270.0, 1.5]
