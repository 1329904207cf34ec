"""The configuration survives each way it travels, and refuses what it does not know."""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.config import SCHEDULES, STRATEGIES, RunConfig
from fedfuse.errors import ConfigError
from fedfuse.models.spec import FUSIONS

names = st.text(
    st.characters(categories=["L", "N"], include_characters="_-"), min_size=1, max_size=12
)
configs = st.builds(
    lambda name, seed, fields: RunConfig(name=name, seed=seed).with_values(fields),
    names,
    st.integers(-(2**53), 2**53),
    st.fixed_dictionaries(
        {},
        optional={
            "data.modalities": st.lists(names, max_size=4).map(tuple),
            "data.manifest": st.text(st.characters(categories=["L", "N", "P", "Zs"])),
            "data.skip_bad": st.booleans(),
            "data.alpha": st.floats(1e-6, 1e6),
            "model.fusion": st.sampled_from([name for name in FUSIONS if name != "graph"]),
            "train.rounds": st.integers(1, 1_000_000),
            "train.learning_rate": st.floats(1e-12, 1e6),
            "train.schedule": st.sampled_from(SCHEDULES),
            "privacy.unit": st.sampled_from(["record", "none"]),
            "privacy.epsilon": st.floats(1e-3, 1e3),
            "privacy.delta": st.floats(1e-30, 0.1),
            "federation.strategy": st.sampled_from(STRATEGIES),
        },
    ),
)


@given(configs)
def test_toml_round_trip(config: RunConfig) -> None:
    assert RunConfig.from_dict(tomllib.loads(config.to_toml())) == config


@given(configs)
def test_flat_round_trip(config: RunConfig) -> None:
    flat = config.to_flat()
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())
    assert RunConfig.from_flat(flat) == config


@given(configs)
def test_command_line_text_round_trip(config: RunConfig) -> None:
    text = {
        key: str(value).lower() if isinstance(value, bool) else str(value)
        for key, value in config.to_flat().items()
    }
    assert RunConfig().with_values(text) == config


def test_a_file_says_where_it_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text("[train]\nround = 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"s\.toml: unknown setting train\.round\n") as caught:
        RunConfig.from_toml(path)
    assert "rounds" in caught.value.hint


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("train.rounds", 0, "from 1"),
        ("train.rounds", 2.5, "must be int"),
        ("train.rounds", True, "must be int"),
        ("train", 3, "is a section"),
        ("privacy.epsilon", math.nan, "must be float"),
        ("privacy.epsilon", math.inf, "from 0.001"),
        ("privacy.epsilon", 0, "from 0.001"),
        ("privacy.sample_rate", 1.1, "to 1"),
        ("privacy.unit", "person", "one of none, record, subject, node"),
        ("data.modalities", [1], "list of names"),
        ("data.skip_bad", "yes", "must be bool"),
        ("name", 3, "must be str"),
        ("federation.weighting", "examples", "is a release"),
        ("model.fusion", "graph", "model.knowledge"),
        ("model.fusion", "addition", "one of concat"),
        ("model.modality_dropout", 0.99, "to 0.95"),
        ("model.loss", "hinge", "one of auto"),
    ],
)
def test_a_value_out_of_its_range_is_refused_by_name(key: str, value: object, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig().with_values({key: value})
    assert key in caught.value.what
    assert what in caught.value.what


def test_a_graph_comes_with_its_digest() -> None:
    graph = {"model.fusion": "graph", "model.knowledge": "triples.tsv"}
    with pytest.raises(ConfigError, match="knowledge_sha256") as caught:
        RunConfig().with_values(graph)
    assert "sha256sum triples.tsv" in caught.value.hint
    assert RunConfig().with_values({**graph, "model.knowledge_sha256": "0a" * 32}).model.knowledge


def test_early_fusion_has_no_tokens_to_stand_in() -> None:
    with pytest.raises(ConfigError, match="no tokens"):
        RunConfig().with_values({"model.fusion": "early", "model.absent": "learned"})


def test_counts_may_weigh_updates_where_nothing_is_promised() -> None:
    changes = {"federation.weighting": "examples", "privacy.unit": "none"}
    assert not RunConfig().with_values(changes).private


def test_configurations_do_not_change() -> None:
    config = RunConfig()
    with pytest.raises(AttributeError):
        config.seed = 3  # type: ignore[misc]
    assert replace(config, seed=3) != config
