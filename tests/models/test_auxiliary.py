"""Auxiliary losses are what their formulas say, of what is there, and in training alone."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.linalg import inv, sqrtm
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.batch import Target, TargetKind
from fedfuse.config import RunConfig
from fedfuse.errors import ConfigError, ModelError
from fedfuse.models.auxiliary import TEMPERATURE, Auxiliary, class_anchors, training_loss
from fedfuse.models.model import build_model
from fedfuse.models.spec import AuxiliaryConfig, ModelConfig
from fedfuse.tasks import Task
from tests.models.test_model import random_batch, schema_of

M, D = 3, 6
TARGET = Target(kind=TargetKind.CLASSIFICATION, classes=("dry", "leak", "large leak"))
TASK = Task.of(TARGET)
SEEN = torch.tensor(
    [[True, True, True], [True, False, True], [False, True, False], [False] * 3, [True] * 3]
)
Y = torch.tensor([0, 2, 1, 1, 2])


def tokens() -> Tensor:
    z = torch.randn(len(SEEN), M, D, generator=torch.Generator().manual_seed(1)).double()
    return torch.where(SEEN[..., None], z, torch.zeros(()).double())


def losses(name: str, weight: float = 1.0) -> tuple[Auxiliary, Tensor]:
    """The part, and what it adds to the loss of each record."""
    torch.manual_seed(0)
    config = AuxiliaryConfig(**{name: weight})
    part = Auxiliary(config, TARGET, M, D, heads=True).double()
    fused = torch.randn(len(SEEN), 3, generator=torch.Generator().manual_seed(2)).double()
    whole = training_loss(TASK.loss, config, TARGET, M)
    outputs = torch.cat([fused, part(tokens(), SEEN)], 1)
    return part, whole(outputs, Y) - TASK.loss(fused, Y)


def of_each(value: object) -> Tensor:
    """(B,) of `value`(row, modalities that are there)."""
    return torch.stack(
        [
            torch.as_tensor(value(row, SEEN[row].nonzero().flatten().tolist())).double()  # type: ignore[operator]
            for row in range(len(SEEN))
        ]
    )


def sides(part: Auxiliary) -> list[Tensor]:
    return [F.normalize(layer(tokens()[:, m]), dim=1) for m, layer in enumerate(part.project)]


def test_unimodal_is_the_sum_over_the_heads_of_what_is_there() -> None:
    part, found = losses("unimodal", 0.5)

    def expected(row: int, here: list[int]) -> Tensor:
        each = [F.cross_entropy(part.own[m](tokens()[row, m]), Y[row]) for m in here]
        return 0.5 * sum(each, torch.zeros(()))

    torch.testing.assert_close(found, of_each(expected))


def test_reconstruction_is_of_what_is_there_from_what_is_there() -> None:
    part, found = losses("reconstruction")
    z = tokens()

    def expected(row: int, here: list[int]) -> Tensor:
        total = torch.zeros(()).double()
        for m in here:
            others = [k for k in here if k != m]
            if others:
                given = torch.zeros(M, D).double()
                given[others] = z[row, others]
                flags = torch.tensor([float(k in others) for k in range(M)]).double()
                told = part.predict[m](torch.cat([given.flatten(), flags]))
                total = total + (told - z[row, m]).square().mean()
        return total

    torch.testing.assert_close(found, of_each(expected))


def test_alignment_is_one_less_the_cosine_of_pairs_that_are_there() -> None:
    part, found = losses("alignment")
    unit = sides(part)

    def expected(row: int, here: list[int]) -> Tensor:
        pairs = [1 - unit[a][row] @ unit[b][row] for a, b in combinations(here, 2)]
        return sum(pairs, torch.zeros(()))

    torch.testing.assert_close(found, of_each(expected))


def test_anchors_are_told_apart_by_cosines() -> None:
    part, found = losses("anchors")
    unit, anchors = sides(part), class_anchors(TARGET.classes, D).double()

    def expected(row: int, here: list[int]) -> Tensor:
        near = [F.cross_entropy(anchors @ unit[m][row] / TEMPERATURE, Y[row]) for m in here]
        return sum(near, torch.zeros(()))

    torch.testing.assert_close(found, of_each(expected))


def test_contrast_looks_for_the_other_half_in_the_batch() -> None:
    part, found = losses("contrast")
    unit = sides(part)

    def expected(row: int, here: list[int]) -> Tensor:
        total = torch.zeros(()).double()
        for a, b in combinations(here, 2):
            both = (SEEN[:, a] & SEEN[:, b]).nonzero().flatten()
            place = (both == row).nonzero()[0, 0]
            for x, y in ((a, b), (b, a)):
                total = total + F.cross_entropy(unit[y][both] @ unit[x][row] / 0.1, place) / 2
        return total

    torch.testing.assert_close(found, of_each(expected))


def test_correlation_is_that_of_whitened_sides() -> None:
    """Against matrix square roots, where the code has Cholesky factors."""
    part, found = losses("correlation")
    plain = [layer(tokens()[:, m]).detach().numpy() for m, layer in enumerate(part.project)]
    of_pair = {}
    for a, b in combinations(range(M), 2):
        both = (SEEN[:, a] & SEEN[:, b]).numpy()
        x, y = (plain[m][both] - plain[m][both].mean(0) for m in (a, b))
        count = max(1, len(x) - 1)
        Sx, Sy = (s.T @ s / count + 1e-2 * np.eye(D) for s in (x, y))
        T = inv(sqrtm(Sx)) @ (x.T @ y / count) @ inv(sqrtm(Sy))
        of_pair[a, b] = float((T**2).sum() / D)
    pairs = {(0, 2), (0, 1), (1, 2)}

    def expected(row: int, here: list[int]) -> float:
        return -sum(of_pair[pair] for pair in pairs if set(pair) <= set(here))

    torch.testing.assert_close(found.detach(), of_each(expected))


def test_anchors_follow_from_names_alone_and_share_words() -> None:
    torch.manual_seed(3)
    one = class_anchors(("large leak", "small leak", "dry"), 64)
    torch.manual_seed(4)
    two = class_anchors(("dry", "large leak"), 64)
    assert torch.equal(one[0], two[1])
    torch.testing.assert_close(one.norm(dim=1), torch.ones(3))
    assert float(one[0] @ one[1]) > float(one[0] @ one[2]) + 0.1


def test_anchors_need_classes() -> None:
    schema = schema_of("vector")
    with pytest.raises(ModelError, match="the target is regression"):
        build_model(schema, ModelConfig(auxiliary=AuxiliaryConfig(anchors=1.0)))


def test_early_fusion_has_no_tokens_to_teach() -> None:
    with pytest.raises(ConfigError, match="about tokens"):
        RunConfig().with_values({"model.fusion": "early", "model.auxiliary.unimodal": 1})


def test_outside_of_training_there_are_outputs_alone() -> None:
    schema = schema_of("image", "vector", target=TARGET)
    batch = random_batch(schema, 4, 0)
    config = ModelConfig(auxiliary=AuxiliaryConfig(unimodal=1.0, anchors=1.0))
    model = build_model(schema, config)
    assert model(batch).shape == (4, 3 + 2 * 3 + 2 * 3 + 2 + 1)
    taught = model.eval()(batch)
    plain = build_model(schema, ModelConfig()).eval()(batch)
    assert torch.equal(taught, plain)  # the first weights of all else are the same


def test_without_weights_nothing_is_added() -> None:
    schema = schema_of("image", "vector", target=TARGET)
    model = build_model(schema, ModelConfig())
    assert model.auxiliary is None
    assert model(random_batch(schema, 4, 0)).shape == (4, 3)
    assert training_loss(TASK.loss, AuxiliaryConfig(), TARGET, 2) is TASK.loss


@pytest.mark.parametrize("absent", ["zero", "learned"])
@pytest.mark.parametrize("fusion", ["concat", "late", "cross-attention"])
def test_what_is_absent_teaches_no_head(fusion: str, absent: str) -> None:
    schema = schema_of("image", "vector", target=TARGET)
    weights = AuxiliaryConfig(unimodal=1.0, reconstruction=1.0, alignment=1.0, anchors=1.0)
    model = build_model(schema, ModelConfig(fusion=fusion, absent=absent, auxiliary=weights))
    batch = random_batch(schema, 4, 0, chance=1.1)
    batch.present["vector"][:] = False
    loss = training_loss(TASK.loss, weights, TARGET, 2)
    loss(model(batch), torch.tensor([0, 1, 2, 1])).sum().backward()
    assert model.auxiliary is not None

    def moved(layers: nn.ModuleList, m: int) -> bool:
        return any(p.grad is not None and bool(p.grad.any()) for p in layers[m].parameters())

    assert moved(model.auxiliary.project, 0)
    assert not moved(model.auxiliary.project, 1)
    assert not moved(model.auxiliary.predict, 0)  # there is nothing to tell it from
    assert not moved(model.encoders, 1)
    if fusion != "late":
        assert moved(model.auxiliary.own, 0)
        assert not moved(model.auxiliary.own, 1)
