"""The fusion model: shapes, seeds, and that no row of a batch knows of another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct

from fedfuse.batch import Batch, Kind, Modality, Schema, Target, TargetKind
from fedfuse.errors import DataError
from fedfuse.models.cosines import cosines
from fedfuse.models.knowledge import Graph
from fedfuse.models.model import build_model, count_parameters
from fedfuse.models.spec import ABSENT, ENCODERS, FUSIONS, EncoderConfig, ModelConfig

KINDS = {
    "image": (Kind.IMAGE, (1, 12, 12)),
    "tiny_image": (Kind.IMAGE, (3, 2, 2)),
    "audio": (Kind.AUDIO, (40, 30)),
    "video": (Kind.VIDEO, (4, 3, 12, 12)),
    "tiny_video": (Kind.VIDEO, (1, 1, 2, 3)),
    "text": (Kind.TEXT, (6,)),
    "series": (Kind.SERIES, (16, 4)),
    "short_series": (Kind.SERIES, (1, 1)),
    "vector": (Kind.VECTOR, (5,)),
    "table": (Kind.TABLE, (8,)),
}
GRAPH = Graph.of([("a", "near", "b"), ("b", "near", "c"), ("a", "far", "c")])
REGRESSION = Target(kind=TargetKind.REGRESSION, centre=1.0, scale=2.0)


def schema_of(*names: str, target: Target = REGRESSION) -> Schema:
    return Schema(
        modalities=tuple(Modality(name=n, kind=KINDS[n][0], shape=KINDS[n][1]) for n in names),
        target=target,
    )


def random_batch(schema: Schema, size: int, seed: int, chance: float = 0.7) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        m.name: torch.randint(0, 50, (size, *m.shape), generator=generator)
        if m.kind is Kind.TEXT
        else torch.randn((size, *m.shape), generator=generator)
        for m in schema.modalities
    }
    present = {m.name: torch.rand(size, generator=generator) < chance for m in schema.modalities}
    return Batch(inputs, present, torch.zeros(size))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("absent", ABSENT)
def test_every_kind_is_encoded_in_every_fusion(fusion: str, absent: str) -> None:
    for name in KINDS:
        schema = schema_of(name)
        absent = "zero" if fusion == "early" else absent
        config = ModelConfig(fusion=fusion, absent=absent)
        model = build_model(schema, config, vocabulary=50, graph=GRAPH)
        for size in (0, 1, 3):
            out = model(random_batch(schema, size, 0))
            assert out.shape == (size, 1)
            assert torch.isfinite(out).all()


@settings(max_examples=20, deadline=None)
@given(
    fusion=st.sampled_from(sorted(FUSIONS)),
    text=st.sampled_from(ENCODERS["text"]),
    seed=st.integers(0, 10_000),
    row=st.integers(0, 4),
)
def test_a_row_does_not_depend_on_its_neighbours(
    fusion: str, text: str, seed: int, row: int
) -> None:
    schema = schema_of("image", "audio", "text", "table")
    config = ModelConfig(fusion=fusion, encoder=EncoderConfig(text=text))
    model = build_model(schema, config, vocabulary=50, graph=GRAPH)
    model.train()
    batch = random_batch(schema, 5, seed)
    alone = model(batch[slice(row, row + 1)])
    torch.testing.assert_close(model(batch)[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_record_with_no_modality_gives_a_finite_output(fusion: str) -> None:
    schema = schema_of("image", "text", "vector")
    model = build_model(schema, ModelConfig(fusion=fusion), vocabulary=50, graph=GRAPH)
    assert torch.isfinite(model(random_batch(schema, 4, 1, chance=0.0))).all()


def test_text_without_words_gives_a_finite_output() -> None:
    schema = schema_of("text")
    for encoder in ENCODERS["text"]:
        model = build_model(schema, ModelConfig(encoder=EncoderConfig(text=encoder)), vocabulary=50)
        batch = Batch(
            {"text": torch.zeros(2, 6, dtype=torch.int64)},
            {"text": torch.ones(2, dtype=torch.bool)},
            torch.zeros(2),
        )
        assert torch.isfinite(model(batch)).all()


def test_seed_decides_the_first_weights_and_nothing_else() -> None:
    schema = schema_of("image", "text")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (build_model(schema, ModelConfig(), seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same)
    assert not all(
        torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


def test_fixed_word_vectors_are_public_and_do_not_travel() -> None:
    schema = schema_of("text")
    names = set(build_model(schema, ModelConfig(), vocabulary=50).state_dict())
    learned = set(build_model(schema, ModelConfig(learned_words=True), vocabulary=50).state_dict())
    assert learned - names == {"encoders.0.words.table.weight"}


def test_cosine_terms_are_the_orthogonal_dct() -> None:
    for length, terms in ((40, 18), (7, 7), (3, 8), (1, 4)):
        kept = min(terms, length)
        expected = dct(np.eye(length), axis=0, norm="ortho")[:kept]
        expected[0] *= np.sqrt(2)
        np.testing.assert_allclose(cosines(length, terms).numpy(), expected, atol=1e-6)
    assert cosines(5, 0).shape == (0, 5)


def test_a_plane_without_cosine_terms_has_convolutions_alone() -> None:
    schema = schema_of("image", "audio")
    plain = ModelConfig(image_terms=0, audio_terms=0)
    model = build_model(schema, plain, vocabulary=50)
    assert model(random_batch(schema, 2, 0)).shape == (2, 1)
    fixed = build_model(schema, ModelConfig(), vocabulary=50)
    assert set(model.state_dict()) == set(fixed.state_dict())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_parameters_are_counted_without_making_them(fusion: str, tmp_path: Path) -> None:
    path = tmp_path / "triples.tsv"
    path.write_text("a\tnear\tb\nb\tnear\tc\n")
    config = ModelConfig(fusion=fusion, knowledge=str(path) if fusion == "graph" else "")
    schema = schema_of("image", "text", "series")
    made = build_model(schema, config, vocabulary=50)
    expected = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert count_parameters(schema, config, vocabulary=50) == expected


def test_a_graph_is_needed_where_it_is_named_and_nowhere_else() -> None:
    schema = schema_of("vector")
    with pytest.raises(DataError, match="no file that can be read"):
        build_model(schema, ModelConfig(fusion="graph", knowledge="nosuch.tsv"))
