"""The clip norm that follows a quantile: what moves it, what it costs, where it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedfuse.config import RunConfig
from fedfuse.errors import ConfigError
from fedfuse.federation.observer import Silent
from fedfuse.federation.settle import settle
from fedfuse.federation.simulate import simulate
from fedfuse.privacy import accounting
from fedfuse.privacy.adaptive import count_noise_for, next_clip_norm
from fedfuse.privacy.central import noisy_count, unclipped
from fedfuse.privacy.noise import NoiseStream
from fedfuse.runfolder import RunFolder
from tests.federation.conftest import make_config, manifest  # noqa: F401  fixtures

MakeConfig = Callable[..., RunConfig]


def adaptive(make: MakeConfig, **changes: Any) -> RunConfig:
    return make(privacy__adaptive_clip=True, privacy__noise_multiplier=1.5, **changes)


def test_c_ends_at_the_quantile_of_a_fixed_distribution() -> None:
    """Against numpy's quantile, with norms that do not change (figure 1 of the paper)."""
    norms = np.random.default_rng(0).lognormal(0.0, 1.0, 20_000)
    for gamma in (0.1, 0.5, 0.9):
        C = 20.0
        for _ in range(400):
            C = next_clip_norm(C, float((norms <= C).mean()), quantile=gamma, rate=0.2, first=20.0)
        assert pytest.approx(float(np.quantile(norms, gamma)), rel=0.02) == C


@pytest.mark.parametrize("below", [-7.0, 0.0, 0.5, 1.0, 30.0])
def test_noise_moves_c_by_no_more_than_a_round_s_step(below: float) -> None:
    moved = next_clip_norm(1.0, below, quantile=0.5, rate=0.2, first=1.0)
    assert math.exp(-0.1) * (1 - 1e-12) <= moved <= math.exp(0.1) * (1 + 1e-12)


def test_c_stays_within_a_thousand_of_where_it_began() -> None:
    up = down = 1.0
    for _ in range(1000):
        up = next_clip_norm(up, 0.0, quantile=0.5, rate=2.0, first=1.0)
        down = next_clip_norm(down, 1.0, quantile=0.5, rate=2.0, first=1.0)
    assert (up, down) == (1000.0, 0.001)


def test_the_count_is_paid_for_by_noise_on_the_sum(make_config: MakeConfig) -> None:  # noqa: F811
    settled = settle(adaptive(make_config), mean_records=30.0)
    mechanism = settled.mechanism
    assert mechanism is not None
    assert mechanism.noise_multiplier == 1.5  # what is accounted
    assert mechanism.count_noise == count_noise_for(15.0, 1.5) == 3.0
    # Two Gaussian releases of one step, of sensitivities C and 1/2, are one of this sigma:
    together = (mechanism.sum_noise**-2 + (0.5 / mechanism.count_noise) ** 2) ** -0.5
    assert together == pytest.approx(1.5)
    given = settle(adaptive(make_config, privacy__count_noise=9.0), mean_records=30.0)
    assert given.mechanism is not None
    assert given.mechanism.count_noise == 9.0


@pytest.mark.parametrize(
    ("unit", "first"),
    [
        ("record", 1e-6),
        pytest.param("node", 1e-6, marks=pytest.mark.slow),
        pytest.param("record", 1e6, marks=pytest.mark.slow),
        pytest.param("subject", 1e-6, marks=pytest.mark.slow),
        # Noise on a sum of few nodes is as long as a model: a larger C would make updates longer.
        pytest.param("node", 0.1, marks=pytest.mark.slow),
    ],
)
def test_c_moves_towards_the_quantile_in_a_run_and_is_in_the_books(
    make_config: MakeConfig,  # noqa: F811
    tmp_path: Path,
    unit: str,
    first: float,
) -> None:
    config = adaptive(
        make_config,
        privacy__unit=unit,
        privacy__clip_norm=first,
        privacy__clip_rate=1.0,
        privacy__epsilon=300.0,
        train__rounds=12,
        federation__min_nodes=3,
        privacy__count_noise=1.0,
        train__learning_rate=1e-3,
        train__momentum=0.0,
        federation__workers=1,
    )
    summary = simulate(config, tmp_path / "run", observer=Silent())
    folder = RunFolder.open(tmp_path / "run")
    norms = [next(e.clip_norm for e in folder.events() if e.round == r) for r in range(1, 13)]
    assert norms[0] == first
    assert len({e.clip_norm for e in folder.events() if e.round == 2}) == 1  # one C for all nodes
    assert (norms[-1] > 2 * first) if first < 1e-3 else (norms[-1] < first / 2)
    assert {event.count_noise for event in folder.events()} == {1.0}
    # Adapting costs nothing beyond the count, which is inside sigma.
    steps = 1 if unit == "node" else 2
    same = [e.mechanism for e in folder.events() if e.node == "site-a"]
    assert summary["privacy"]["epsilon_by_node"]["site-a"] == pytest.approx(
        accounting.epsilon(same, 1e-5)
    )
    assert sum(m.steps for m in same) == 12 * steps
    state = json.loads((tmp_path / "run" / "checkpoint" / "state.json").read_text())
    assert state["extra"]["clip_norm"] != first


def test_the_count_of_a_node_is_noised_and_its_share_is_right() -> None:
    start = {"w": np.zeros(3, np.float32)}
    assert unclipped(start, {"w": np.array([0.6, 0.79, 0.0], np.float32)}, ["w"], 1.0)
    assert not unclipped(start, {"w": np.array([0.6, 0.81, 0.0], np.float32)}, ["w"], 1.0)
    drawn = [
        noisy_count(0.5, 2.0, NoiseStream(bytes(31) + bytes([i]), "count")) for i in range(200)
    ]
    assert abs(np.mean(drawn) - 0.5) < 4 * 2.0 / math.sqrt(200)
    assert 1.7 < np.std(drawn) < 2.3  # 1.5 sigma and 2/3 sigma lie outside
    assert noisy_count(0.5, 0.0, NoiseStream(bytes(32), "count")) == 0.5


def test_adapting_and_sharing_out_exclude_each_other(make_config: MakeConfig) -> None:  # noqa: F811
    with pytest.raises(ConfigError, match="exclude each other"):
        adaptive(make_config, privacy__clip_shares="equal")
