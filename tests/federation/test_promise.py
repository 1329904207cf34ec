"""What a run promises says whose, against whom and by which relation, and claims no gain from
drawing nodes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedfuse.config import RunConfig
from fedfuse.federation import summary
from fedfuse.federation.rounds import job_of
from fedfuse.federation.session import Session
from fedfuse.federation.settle import settle
from fedfuse.federation.spending import Spent
from fedfuse.privacy import accounting
from fedfuse.privacy.spec import Event, Unit

QUICK = {
    "privacy.epsilon": 1.0,
    "privacy.sample_rate": 0.05,
    "train.rounds": 10,
    "train.local_steps": 2,
}


def stated(unit: Unit, **changes: Any) -> dict[str, Any]:
    """The promise in the summary of a run of two nodes, of which one missed a round."""
    config = RunConfig().with_values(QUICK | {"privacy.unit": unit.value} | changes)
    settled = settle(config, mean_records=100.0, mean_subjects=10.0)
    mechanism = settled.mechanism
    assert mechanism is not None
    events = [
        Event(
            node=node,
            round=round,
            status="spent",
            unit=unit.value,
            sample_rate=mechanism.sample_rate,
            noise_multiplier=mechanism.noise_multiplier,
            clip_norm=mechanism.clip_norm,
            steps=mechanism.steps,
        )
        for node in ("a", "b")
        for round in range(1, 11)
        if (node, round) != ("b", 4)
    ]
    session = SimpleNamespace(
        config=settled.config, mechanism=mechanism, spent=Spent(events), removable=False
    )
    return summary._privacy(cast(Session, session))


@pytest.mark.parametrize("unit", [Unit.RECORD, Unit.SUBJECT, Unit.NODE])
def test_a_promise_names_its_unit_its_relation_its_delta_and_its_adversaries(unit: Unit) -> None:
    said = stated(unit)
    assert unit.change in said["statement"]
    assert "against the server, the other nodes and whoever gets the model" in said["statement"]
    assert f"({accounting.shown(said['epsilon_server'])}, 1e-05)" in said["statement"]
    assert unit.value in said["neighbouring_relation"]
    assert said["neighbouring_relation"].startswith("a node's data" if unit is Unit.NODE else "add")
    assert said["delta"] == 1e-5
    assert said["epsilon_model"] <= said["epsilon_server"] == max(said["epsilon_by_node"].values())


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_that_nodes_are_drawn_at_random_is_no_gain(fraction: float) -> None:
    """One coin for all the steps of a round is no product of rates: the noise is that of a node
    which takes part in every round, and the model's epsilon is the server's."""
    config = RunConfig().with_values(QUICK | {"federation.fraction": fraction})
    settled = settle(config, mean_records=100.0)
    assert settled.mechanism is not None
    asked = job_of(settled.config, settled.mechanism, 1).mechanism
    assert asked is not None
    assert asked.sample_rate == settled.mechanism.sample_rate == 0.05
    spent = accounting.epsilon([asked] * 10, 1e-5)
    assert 0.99 < spent <= 1.0
    said = stated(Unit.RECORD, **{"federation.fraction": fraction})
    assert said["epsilon_model"] == said["epsilon_server"] == pytest.approx(spent)
