"""Each encoder of each kind: exact clipped sums, rows that do not mix, silence where absent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.batch import Batch, Kind, Modality, Schema
from fedfuse.models.model import FusionModel, build_model
from fedfuse.models.spec import ENCODERS, EncoderConfig, ModelConfig
from fedfuse.privacy.spec import CLIPPINGS
from tests.privacy.test_clipping import SCHEMA as CLASSES
from tests.privacy.test_clipping import TASK, assert_same, clipped_sum, oracle

SHAPES = {
    Kind.IMAGE: (3, 6, 7),
    Kind.AUDIO: (5, 9),
    Kind.VIDEO: (4, 2, 6, 5),
    Kind.TEXT: (5,),
    Kind.SERIES: (9, 3),
    Kind.VECTOR: (4,),
    Kind.TABLE: (6,),
}
ALL = [(kind, name) for kind in Kind for name in ENCODERS.get(kind, (kind.value,))]
FUSION = ("concat", "co-attention")
"""Of tokens, and of parts."""
SMALL = {
    "dim": 4, "fusion_heads": 2, "head_width": 3, "image_width": 2, "image_depth": 2,
    "image_terms": 2, "audio_width": 2, "audio_depth": 2, "audio_terms": 3, "video_width": 2,
    "video_depth": 2, "video_terms": 2, "series_width": 4, "steps_width": 4, "vector_width": 3,
    "text_width": 4, "text_heads": 2,
}  # fmt: skip


def model_of(kind: Kind, name: str, fusion: str) -> FusionModel:
    """Of the modality and a vector beside it."""
    choice = EncoderConfig(**{kind.value: name} if kind in ENCODERS else {})
    config = ModelConfig(fusion=fusion, encoder=choice, **SMALL)
    return build_model(schema_of(kind), config, vocabulary=20, seed=1).double()


def schema_of(kind: Kind) -> Schema:
    own = Modality(name="own", kind=kind, shape=SHAPES[kind])
    return Schema(
        modalities=(own, Modality(name="other", kind=Kind.VECTOR, shape=(2,))),
        target=CLASSES.target,
    )


def batch_of(kind: Kind, size: int, seed: int, chance: float = 0.7) -> Batch:
    rng = np.random.default_rng(seed)
    inputs, present = {}, {}
    for modality in schema_of(kind).modalities:
        shape = (size, *modality.shape)
        drawn = (
            rng.integers(0, 20, shape)
            if modality.kind is Kind.TEXT
            else 3 * rng.standard_normal(shape)
        )
        here = torch.from_numpy(rng.random(size) < chance)
        value = torch.from_numpy(drawn)
        inputs[modality.name] = value * here.view(-1, *[1] * len(modality.shape))
        present[modality.name] = here
    return Batch(inputs, present, torch.from_numpy(rng.integers(0, 3, size)))


@settings(max_examples=40, deadline=None)
@given(
    encoder=st.sampled_from(ALL),
    fusion=st.sampled_from(FUSION),
    clipping=st.sampled_from(CLIPPINGS),
    size=st.integers(0, 5),
    physical=st.integers(1, 6),
    chance=st.floats(0.0, 1.0),
    clip_norm=st.sampled_from([0.05, 1.0, 50.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_clipped_sum_equals_a_loop_over_records(
    encoder: tuple[Kind, str],
    fusion: str,
    clipping: str,
    size: int,
    physical: int,
    chance: float,
    clip_norm: float,
    seed: int,
) -> None:
    model = model_of(*encoder, fusion)
    batch = batch_of(encoder[0], size, seed, chance)
    found = clipped_sum(model, batch, clip_norm, physical, clipping)
    assert_same(found, oracle(model, batch, clip_norm))


@pytest.mark.parametrize("fusion", FUSION)
@pytest.mark.parametrize(("kind", "name"), ALL)
def test_each_encoder_is_exact_and_silent_where_absent(kind: Kind, name: str, fusion: str) -> None:
    model = model_of(kind, name, fusion)
    for size in (1, 4):
        batch = batch_of(kind, size, seed=3)
        batch.present["own"][0] = True
        assert_same(clipped_sum(model, batch, 0.1), oracle(model, batch, 0.1))
    batch = batch_of(kind, 4, seed=4, chance=1.0)
    batch.present["own"][:] = False
    model.zero_grad()
    TASK.loss(model(batch), batch.target).sum().backward()
    own = [p for n, p in model.named_parameters() if model.part_of(n) == "own"]
    assert own
    assert all(float(p.grad.abs().max()) == 0.0 for p in own)


@pytest.mark.parametrize("fusion", [*FUSION, "early"])
@pytest.mark.parametrize(("kind", "name"), ALL)
def test_permuted_records_permute_the_outputs(kind: Kind, name: str, fusion: str) -> None:
    model = model_of(kind, name, fusion)
    batch, order = batch_of(kind, 5, seed=5), torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(model(batch[order]), model(batch)[order], rtol=1e-9, atol=1e-9)
    assert torch.isfinite(model(batch)).all()
