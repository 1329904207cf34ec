"""Costs are what one counts by hand for a small model."""

from __future__ import annotations

from fedfuse.batch import Kind, Modality, Schema, Target, TargetKind
from fedfuse.models.cost import cost_of, cost_of_encoder
from fedfuse.models.model import build_model
from fedfuse.models.spec import ModelConfig

SCHEMA = Schema(
    modalities=(
        Modality(name="u", kind=Kind.VECTOR, shape=(5,)),
        Modality(name="v", kind=Kind.VECTOR, shape=(3,)),
    ),
    target=Target(kind=TargetKind.CLASSIFICATION, classes=("a", "b")),
)


def test_parameters_arithmetic_and_bytes_of_two_vectors() -> None:
    model = build_model(SCHEMA, ModelConfig(dim=4, vector_width=6, head_width=7))
    cost = cost_of(model, SCHEMA)
    encoders = [(5 * 6 + 6) + 2 * 6 + (6 * 4 + 4), (3 * 6 + 6) + 2 * 6 + (6 * 4 + 4)]
    norms, head = 2 * 2 * 4, (2 * (4 + 1) * 7 + 7) + (7 * 2 + 2)
    assert cost["all"].parameters == sum(encoders) + norms + head
    assert cost["fusion"].parameters == head
    assert cost["all"].bytes_per_round == 2 * 4 * cost["all"].parameters
    head_flops = 2 * (2 * (4 + 1) * 7 + 7 * 2)
    assert cost["fusion"].flops == head_flops
    assert cost["all"].flops == head_flops + 2 * (5 * 6 + 6 * 4 + 3 * 6 + 6 * 4)
    alone = cost_of_encoder(model.encoders[0], SCHEMA.modalities[0])
    assert (alone.parameters, alone.flops) == (encoders[0], 2 * (5 * 6 + 6 * 4))


def test_fixed_word_vectors_cost_no_bytes() -> None:
    schema = Schema(
        modalities=(Modality(name="t", kind=Kind.TEXT, shape=(4,)),), target=SCHEMA.target
    )
    fixed, learned = (
        cost_of(build_model(schema, ModelConfig(learned_words=words), vocabulary=9), schema)["all"]
        for words in (False, True)
    )
    assert learned.bytes_per_round - fixed.bytes_per_round == 2 * 4 * 9 * 64
