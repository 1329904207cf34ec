"""Many nodes: the same weights and epsilon whoever computes them, and memory that stays."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fedfuse.config import RunConfig
from fedfuse.federation.observer import Silent
from fedfuse.federation.simulate import simulate
from fedfuse.federation.spending import Spent
from fedfuse.privacy.spec import Event
from fedfuse.privacy.views import by_node, of_model
from fedfuse.runfolder import RunFolder

MakeConfig = Callable[..., RunConfig]
ROOT = Path(__file__).resolve().parents[2]


def of_benchmarks(name: str) -> ModuleType:
    """A file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(
        f"_benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


write_crowd = of_benchmarks("crowd").write_crowd
measure = of_benchmarks("measure").measure


@pytest.mark.parametrize("strategy", ["fedavg", pytest.param("median", marks=pytest.mark.slow)])
def test_one_worker_and_three_give_the_same_weights_and_epsilon(
    strategy: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    manifest = write_crowd(tmp_path / "crowd", 12, 6, test=20)
    outcomes = []
    for workers in (1, 3):
        out = tmp_path / f"{workers}"
        config = make_config(
            data__manifest=str(manifest),
            federation__workers=workers,
            federation__strategy=strategy,
            train__rounds=2,
            privacy__epsilon=60.0,
        )
        summary = simulate(config, out, observer=Silent())
        outcomes.append((summary["privacy"], RunFolder.open(out).model()[0]))
    (one, weights), (other, others) = outcomes
    assert one == other
    for name, value in weights.items():
        # Workers with other numbers of threads add in another order.
        np.testing.assert_allclose(value, others[name], rtol=0, atol=1e-5)


def test_what_nodes_spent_is_one_history_for_all_that_did_the_same() -> None:
    events = [
        Event(
            node=f"n{node}",
            round=round,
            status="spent" if node else "reserved",
            unit="node",
            sample_rate=1.0,
            noise_multiplier=1.5 + (node == 3),
            clip_norm=1.0,
            steps=1,
        )
        for round in (1, 2, 3)
        for node in range(5)
        if (node, round) != (2, 3)
    ]
    spent = Spent(events)
    assert len(spent.histories()) == 3
    for name, past in by_node(events).items():
        assert sum(m.steps for m in spent.nodes[name]) == sum(m.steps for m in past)
        assert {m.noise_multiplier for m in spent.nodes[name]} == {m.noise_multiplier for m in past}
    assert spent.of_model(1) == of_model(events, 1)
    assert spent.nodes["n0"] is spent.nodes["n1"]


def test_a_round_reads_no_line_of_the_rounds_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path / "run", RunConfig())
    event = Event(
        node="n",
        round=1,
        status="reserved",
        unit="record",
        sample_rate=0.5,
        noise_multiplier=1.0,
        clip_norm=1.0,
        steps=2,
    )
    folder.begin_round([event])
    folder.append_events([event])

    def never(self: RunFolder) -> None:
        raise AssertionError("the books are read again")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "booked", never)
        folder.begin_round([event])
        folder.append_events([event] * 3)
        folder.begin_round([event])
    tree = json.loads((tmp_path / "run" / "reserved.json").read_text())
    assert tree["after"] == 4
    assert len(RunFolder.open(tmp_path / "run").events()) == 5


@pytest.mark.slow
def test_ten_thousand_nodes_take_little_more_memory_than_a_thousand(tmp_path: Path) -> None:
    """Whole processes, by the sum of their proportional set sizes."""
    peak, sent = {}, {}
    for clients in (1_000, 10_000):
        manifest = write_crowd(tmp_path / f"crowd-{clients}", clients, 2, test=50)
        out = tmp_path / f"run-{clients}"
        settings = {
            "model.dim": 4,
            "model.head_width": 4,
            "model.vector_width": 4,
            "train.rounds": 1,
            "train.local_steps": 1,
            "train.learning_rate": 0.5,
            "train.device": "cpu",
            "privacy.noise_multiplier": 1.0,
            "privacy.epsilon": 50.0,
        }
        command = [sys.executable, "-m", "fedfuse", "simulate", "--quiet"]
        command += ["--data", str(manifest), "--out", str(out)]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        peak[clients] = measure(command, env={"PYTHONPATH": str(ROOT)}).pss_mb
        row = RunFolder.open(out).metrics()[0]
        assert row["nodes_ok"] == clients
        sent[clients] = row["bytes_received"]
        assert len(RunFolder.open(out).events()) == clients
    assert sent[10_000] == 10 * sent[1_000]
    assert peak[10_000] < 2_000
    assert peak[10_000] - peak[1_000] < 200
