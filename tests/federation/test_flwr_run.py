"""`flwr run` in the project's own folder, against a SuperLink that simulates nodes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from fedfuse.config import RunConfig
from fedfuse.errors import FederationError
from fedfuse.federation.flower import received, with_id
from fedfuse.federation.forward import make_forwarder
from fedfuse.federation.observer import Silent
from fedfuse.federation.processes import (
    Process,
    answers,
    environment,
    free_port,
    program,
    wait_until,
)
from fedfuse.federation.simulate import simulate
from fedfuse.runfolder import RunFolder
from tests.federation.conftest import write_manifest
from tests.federation.deployment import ROOT

SETTINGS = {
    "name": "by-flwr",
    "model.dim": 8,
    "model.head_width": 8,
    "model.vector_width": 8,
    "train.rounds": 2,
    "train.local_steps": 2,
    "privacy.declared_records": 30,
    "privacy.noise_seed": "test",
}


@pytest.mark.ray
@pytest.mark.skipif(not os.environ.get("FEDFUSE_ALL"), reason="a minute; FEDFUSE_ALL=1 runs it")
def test_flwr_run_simulates_the_project_and_ends_where_fedfuse_simulate_ends(
    tmp_path: Path,
) -> None:
    settings = SETTINGS | {"data.manifest": str(write_manifest(tmp_path))}
    port, home, out = free_port(), tmp_path / "home", tmp_path / "out"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    variables = environment(home, {"FEDFUSE_OUT": str(out)})
    words = [
        program("flower-superlink"), "--insecure", "--simulation", "--host", "127.0.0.1",
        "--port", str(port), "--control-api-address", f"127.0.0.1:{free_port()}",
    ]  # fmt: skip
    flat = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    with Process(words, environment=variables, folder=tmp_path, log=tmp_path / "log") as link:
        wait_until(lambda: answers("127.0.0.1", port), 120, "the SuperLink does not answer", link)
        done = subprocess.run(
            [program("flwr"), "run", ".", "--stream", "--run-config", flat,
             "--federation-config", "num-supernodes=3"],
            env=variables, cwd=ROOT, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        told = done.stdout + done.stderr
        assert done.returncode == 0, told
        wait_until((out / "summary.json").exists, 120, told, link)
    assert "fedfuse: round 2 of 2" in told
    there = RunFolder.open(out)
    summary = there.summary()
    assert summary is not None
    config = RunConfig().with_values(settings)
    here = simulate(config, tmp_path / "here", observer=Silent())
    assert (summary["status"], summary["privacy"]) == ("finished", here["privacy"])
    expected, _ = RunFolder.open(tmp_path / "here").model()
    for name, value in there.model()[0].items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5)


def test_a_node_that_has_no_vault_and_no_simulation_says_so() -> None:
    message = with_id(Message(RecordDict(), dst_node_id=1, message_type="train"))
    context = Context(7, 1, {"partition-id": 0}, RecordDict(), {})
    with pytest.raises(FederationError, match="lack vault, and no simulation"):
        make_forwarder()(received(RecordDict(), message.metadata), context)
