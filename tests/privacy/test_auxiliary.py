"""Auxiliary losses under a promise: a record's gradient is its own, and what is not is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.config import RunConfig
from fedfuse.errors import ConfigError, ModelError
from fedfuse.models.auxiliary import training_loss
from fedfuse.models.model import FusionModel
from fedfuse.models.spec import FUSIONS, AuxiliaryConfig
from fedfuse.privacy.dpsgd import Loss
from fedfuse.privacy.safety import check_model
from fedfuse.privacy.spec import CLIPPINGS
from tests.privacy.test_clipping import (
    SCHEMA,
    TASK,
    assert_same,
    batch_of,
    clipped_sum,
    model_with,
    oracle,
)

OWN = ("unimodal", "reconstruction", "alignment", "anchors")
COUPLED = ("contrast", "correlation")
TOKENS = sorted(set(FUSIONS) - {"early"})


def made(fusion: str = "concat", **weights: float) -> tuple[FusionModel, Loss]:
    config = AuxiliaryConfig(**weights)
    model = model_with(fusion=fusion, auxiliary=config)
    return model, training_loss(TASK.loss, config, SCHEMA.target, len(SCHEMA.names))


@settings(max_examples=15, deadline=None)
@given(
    names=st.sets(st.sampled_from(OWN), min_size=1),
    fusion=st.sampled_from(TOKENS),
    clipping=st.sampled_from(CLIPPINGS),
    size=st.integers(0, 6),
    present=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**32 - 1),
)
def test_clipped_sum_is_that_of_a_loop_with_any_auxiliary_loss_and_mask(
    names: set[str], fusion: str, clipping: str, size: int, present: float, seed: int
) -> None:
    model, loss = made(fusion, **dict.fromkeys(names, 0.7))
    batch = batch_of(size, seed, present)
    found = clipped_sum(model, batch, 0.3, clipping=clipping, loss_of=loss)
    assert_same(found, oracle(model, batch, 0.3, loss))


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("fusion", ["concat", "late"])
def test_each_auxiliary_loss_is_clipped_with_the_rest_as_one(fusion: str, name: str) -> None:
    model, loss = made(fusion, **{name: 2.0})
    batch = batch_of(6, seed=3)
    for clipping in CLIPPINGS:
        for C in (0.05, 100.0):
            found = clipped_sum(model, batch, C, clipping=clipping, loss_of=loss)
            assert_same(found, oracle(model, batch, C, loss))


def gradient_of_the_first(model: FusionModel, loss: Loss, others: int) -> torch.Tensor:
    """Of the first record's loss, in a batch with so many others."""
    batch = batch_of(6, seed=9, chance_present=1.0)[slice(0, 1 + others)]
    parameters = list(model.parameters())
    first = loss(model(batch), batch.target)[0]
    found = torch.autograd.grad(first, parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("name", OWN)
def test_a_loss_of_one_record_does_not_know_of_the_others(name: str) -> None:
    model, loss = made(**{name: 1.0})
    alone, among = (gradient_of_the_first(model, loss, others) for others in (0, 5))
    torch.testing.assert_close(alone, among)


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_over_the_batch_depends_on_others_and_is_refused_with_a_promise(name: str) -> None:
    model, loss = made(**{name: 1.0})
    some, more = (gradient_of_the_first(model, loss, others) for others in (3, 5))
    assert float((some - more).norm()) > 1e-3 * float(some.norm())
    with pytest.raises(ModelError, match="loss over the whole batch"):
        check_model(model)
    for unit in ("record", "subject", "node"):
        with pytest.raises(ConfigError, match="couples the records of a batch") as caught:
            RunConfig().with_values({f"model.auxiliary.{name}": 0.5, "privacy.unit": unit})
        assert "anchors" in caught.value.hint
    config = RunConfig().with_values({f"model.auxiliary.{name}": 0.5, "privacy.unit": "none"})
    assert config.model.auxiliary.couples
