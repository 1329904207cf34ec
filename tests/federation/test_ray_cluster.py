"""The engine "ray" on a cluster of several machines, here two of Ray's nodes on this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from fedfuse.config import RunConfig
from fedfuse.errors import FederationError
from fedfuse.federation.observer import Silent
from fedfuse.federation.processes import free_port
from fedfuse.federation.simulate import simulate
from fedfuse.runfolder import RunFolder
from tests.federation.conftest import write_manifest
from tests.federation.deployment import SCENARIO

pytestmark = pytest.mark.ray
ON_THE_CLUSTER = """
import os, subprocess, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
os.environ["RAY_ADDRESS"] = cluster.address
code = subprocess.call([sys.executable, "-m", "fedfuse", "simulate", *sys.argv[1:]])
import ray
from ray._private.state import actors
ray.init(log_to_driver=False)
print("actors on", len({one["Address"]["NodeID"] for one in actors().values()}), "nodes")
ray.shutdown()
cluster.shutdown()
raise SystemExit(code)
"""


@pytest.mark.skipif(not os.environ.get("FEDFUSE_ALL"), reason="a minute or two; FEDFUSE_ALL=1")
def test_a_scenario_of_real_nodes_runs_on_a_cluster_as_on_one_machine(tmp_path: Path) -> None:
    """Both of Ray's nodes work, and the model is that of the loopback engine."""
    manifest, scenario = write_manifest(tmp_path), tmp_path / "small.toml"
    privacy = SCENARIO["privacy"] | {"noise_seed": "test"}  # type: ignore[operator]
    scenario.write_text(tomli_w.dumps(SCENARIO | {"privacy": privacy}))
    words = (scenario, "--engine", "ray", "--data", manifest, "--out", tmp_path / "there")
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_CLUSTER, *words],
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "actors on 2 nodes" in done.stdout
    config = RunConfig.from_toml(scenario).with_values({"data.manifest": str(manifest)})
    here = simulate(config, tmp_path / "here", observer=Silent())
    there = RunFolder.open(tmp_path / "there")
    summary = there.summary()
    assert summary is not None
    assert summary["privacy"] == here["privacy"]
    expected, _ = RunFolder.open(tmp_path / "here").model()
    for name, value in there.model()[0].items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5)


def test_a_cluster_that_does_not_answer_is_told_at_once(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    with pytest.raises(FederationError, match="the Ray cluster does not answer"):
        simulate(make_config(federation__engine="ray"), tmp_path / "run", observer=Silent())
