"""The units subject and node from end to end: what is promised is what the books say."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedfuse.batch import Kind, Modality, Schema, Target, TargetKind
from fedfuse.config import RunConfig
from fedfuse.errors import ConfigError, PrivacyError
from fedfuse.federation.observer import Silent
from fedfuse.federation.policy import Policy
from fedfuse.federation.simulate import simulate
from fedfuse.federation.wire import TrainRequest, config_digest
from fedfuse.privacy import accounting
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.runfolder import RunFolder
from fedfuse.train import Job
from tests.federation.conftest import write_manifest
from tests.federation.requests import a_request

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two records of each subject, both at the same client."""
    path = write_manifest(tmp_path_factory.mktemp("repeated"))
    rows = path.read_text().splitlines()
    head, *body = rows
    cells = [row.split(",") for row in body]
    for number, row in enumerate(cells):
        row[3] = f"s{number % 3}-{number // 6}"
    path.write_text("\n".join([head, *(",".join(row) for row in cells)]) + "\n")
    return path


def test_subject_unit_counts_subjects_and_spends_what_the_books_say(
    make_config: MakeConfig, repeated: Path, tmp_path: Path
) -> None:
    config = make_config(
        privacy__unit="subject", data__manifest=str(repeated), privacy__noise_multiplier=0.0,
        privacy__epsilon=6.0,
    )  # fmt: skip
    summary = simulate(config, tmp_path / "run", observer=Silent())
    privacy = summary["privacy"]
    assert privacy["unit"] == "subject"
    assert privacy["declared_subjects"] == 20  # 15 in the mean, to one digit
    assert "all records of one subject" in privacy["statement"]
    assert 5.5 < privacy["epsilon_server"] <= 6.0
    events = [event.mechanism for event in RunFolder.open(tmp_path / "run").events()]
    assert {event.unit for event in events} == {Unit.SUBJECT}
    own = events[: len(events) // 3]
    assert accounting.epsilon(own, 1e-5) == pytest.approx(privacy["epsilon_server"])


@pytest.mark.slow
def test_without_a_subject_column_the_client_is_the_subject(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    path = write_manifest(tmp_path)
    rows = [row.split(",") for row in path.read_text().splitlines()]
    path.write_text("\n".join(",".join(row[:3] + row[4:]) for row in rows) + "\n")
    config = make_config(privacy__unit="subject", data__manifest=str(path))
    privacy = simulate(config, tmp_path / "run", observer=Silent())["privacy"]
    assert privacy["declared_subjects"] == 1


def test_subjects_at_several_nodes_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(
        privacy__unit="subject", data__manifest=str(write_manifest(tmp_path, repeat=True))
    )
    with pytest.raises(PrivacyError, match="at several nodes"):
        simulate(config, tmp_path / "run", observer=Silent())


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
def test_unit_node_with_noise_by_nodes_gives_two_figures(
    make_config: MakeConfig, tmp_path: Path, strategy: str
) -> None:
    config = make_config(
        privacy__unit="node", privacy__noise_multiplier=2.0, federation__strategy=strategy
    )
    summary = simulate(config, tmp_path / "run", observer=Silent())
    privacy = summary["privacy"]
    exact = accounting.epsilon([gaussian(2.0)] * 3, 1e-5)
    assert privacy["epsilon_server"] == pytest.approx(exact)
    summed = accounting.epsilon([gaussian(2.0 * math.sqrt(3))] * 3, 1e-5)
    assert privacy["epsilon_model"] == pytest.approx(summed)
    assert summed < exact
    assert "any one node" in privacy["statement"]


def test_unit_node_with_noise_by_the_server_claims_nothing_against_the_server(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        privacy__unit="node", privacy__noise_multiplier=2.0, privacy__noise_by="server"
    )
    folder = tmp_path / "run"
    privacy = simulate(config, folder, observer=Silent())["privacy"]
    assert privacy["epsilon_server"] is None
    assert privacy["epsilon_model"] == pytest.approx(accounting.epsilon([gaussian(2.0)] * 3, 1e-5))
    assert "there is no guarantee" in privacy["statement"]
    summary = json.loads((folder / "summary.json").read_text())
    assert any("the server is trusted" in text for text in summary["assumptions"])


def test_shared_noise_is_weaker_against_the_server_and_says_so(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        privacy__unit="node", privacy__noise_multiplier=2.0, privacy__noise_nodes=3,
        federation__min_nodes=3,
    )  # fmt: skip
    privacy = simulate(config, tmp_path / "run", observer=Silent())["privacy"]
    assert privacy["epsilon_model"] == pytest.approx(accounting.epsilon([gaussian(2.0)] * 3, 1e-5))
    alone = accounting.epsilon([gaussian(2.0 / math.sqrt(3))] * 3, 1e-5)
    assert privacy["epsilon_server"] == pytest.approx(alone)
    assert "Against the server" in privacy["statement"]


@pytest.mark.slow
def test_noise_of_nodes_is_in_the_model(make_config: MakeConfig, tmp_path: Path) -> None:
    """One more round's worth of noise: another noise seed moves the weights by about its size."""
    found = []
    for seed in ("one", "two"):
        config = make_config(
            privacy__unit="node", privacy__noise_multiplier=2.0, privacy__noise_seed=seed,
            train__rounds=1, privacy__epsilon=50.0,
        )  # fmt: skip
        simulate(config, tmp_path / seed, observer=Silent())
        found.append(RunFolder.open(tmp_path / seed).model()[0])
    moved = np.concatenate([(found[0][k] - found[1][k]).ravel() for k in found[0]])
    expected = 2.0 * math.sqrt(2) / math.sqrt(3)  # sigma C, two draws, mean of three nodes
    assert float(moved.std()) == pytest.approx(expected, rel=0.2)


def test_a_node_that_does_not_trust_the_server_refuses_to_leave_the_noise_to_it(
    make_config: MakeConfig,
) -> None:
    config = make_config(privacy__unit="node")
    policy = Policy(unit=Unit.NODE, epsilon=30.0, delta=1e-5)

    def check(policy: Policy, **changes: Any) -> Mechanism | None:
        return policy.check(asked(config, **changes), SCHEMA, counts=False)

    for changes in ({"noise_by": "server"}, {"noise_nodes": 2}):
        with pytest.raises(PrivacyError, match="does not trust the server"):
            check(policy, **changes)
    assert check(policy) == gaussian(2.0)
    trusting = dataclasses.replace(policy, trust_server=True)
    assert check(trusting, noise_by="server") == gaussian(2.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"privacy__unit": "node", "federation__strategy": "median"}, "clipped sum"),
        ({"privacy__unit": "node", "privacy__noise_nodes": 2}, "too little noise"),
        ({"privacy__unit": "node", "privacy__clip_shares": "equal"}, "clip_shares"),
        ({"privacy__noise_by": "nobody"}, "noise_by"),
    ],
)
def test_settings_that_cannot_keep_the_promise_are_refused(
    make_config: MakeConfig, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        make_config(**changes)


@pytest.mark.slow
def test_shared_clipping_runs_and_signal_stays_on_the_node(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(privacy__clip_shares="left=2,right=1,rest=1")
    summary = simulate(config, tmp_path / "run", observer=Silent())
    assert summary["privacy"]["clip_shares"] == "left=2,right=1,rest=1"
    books = (tmp_path / "run" / "events.jsonl").read_text()
    assert "signal" not in books + json.dumps(summary)
    assert "signal to noise of a step: left" in (tmp_path / "run" / "run.log").read_text()


SCHEMA = Schema(
    modalities=(Modality(name="left", kind=Kind.VECTOR, shape=(4,)),),
    target=Target(kind=TargetKind.CLASSIFICATION, classes=("down", "up")),
)


def gaussian(sigma: float) -> Mechanism:
    return Mechanism(
        unit=Unit.NODE, sample_rate=1.0, noise_multiplier=sigma, clip_norm=1.0, steps=1
    )


def asked(config: RunConfig, **changes: Any) -> TrainRequest:
    job = Job(steps=2, optimizer="sgd", learning_rate=0.1, momentum=0.0, mechanism=gaussian(2.0))
    return a_request(
        digest=config_digest(config), modalities=("left",), job=dataclasses.replace(job, **changes)
    )
