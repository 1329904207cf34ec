"""Masks among real processes: vaults that are killed between stages, and what is spent then."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedfuse.config import RunConfig
from fedfuse.federation.newnode import own_identity
from fedfuse.federation.nodefile import NodeFile, node_file
from fedfuse.federation.observer import Silent
from fedfuse.federation.processes import Process, environment, wait_until
from fedfuse.federation.running import supernode_words
from fedfuse.federation.simulate import simulate
from fedfuse.federation.vault import LOG, STATUS
from fedfuse.privacy.ledger import Ledger
from fedfuse.runfolder import RunFolder
from tests.federation.deployment import SCENARIO, Federation

pytestmark = pytest.mark.slow
MASKED = SCENARIO | {
    "privacy": {"unit": "node", "noise_nodes": 2, "epsilon": 8.0},
    "federation": {"min_nodes": 3, "secure_aggregation": True, "round_timeout_s": 240.0},
}


@pytest.fixture
def federation(tmp_path: Path, rounds: int) -> Iterator[Federation]:
    """Its server is started and knows four nodes, whose operators exchanged their identities."""
    scenario = MASKED | {"train": {"rounds": rounds, "local_steps": 2}}
    made = Federation(tmp_path, scenario=scenario, letters="abcd", unit="node")
    lines = [own_identity(NodeFile.read(node_file(node)))[0] for node in made.nodes]
    for place in (*made.nodes, made.srv):
        (place / "peers.toml").write_text("\n".join(lines))
    for node in made.nodes:
        text = (node / "node.toml").read_text()
        text = text.replace('peers = ""', 'peers = "peers.toml"')
        text = text.replace('secure_aggregation = "allowed"', 'secure_aggregation = "required"')
        (node / "node.toml").write_text(text)
    with made.served():
        yield made


def start_vault(federation: Federation, node: Path) -> Process:
    """The half of a node that holds everything."""
    (node / "flower").mkdir(exist_ok=True)
    process = Process(
        [sys.executable, "-m", "fedfuse", "node", "start", str(node), "--only", "vault"],
        environment=environment(node / "flower"),
        folder=federation.folder,
        log=node.with_suffix(".log"),
    )
    socket = Path(NodeFile.read(node_file(node)).vault.socket)
    wait_until(socket.exists, 120, "no vault", process)
    return process


def start_supernode(node: Path) -> Process:
    """The other half."""
    return Process(
        supernode_words(NodeFile.read(node_file(node))),
        environment=environment(node / "flower"),
        folder=node,
        log=node / "supernode.log",
    )


def kill(vault: Process, node: Path) -> None:
    os.kill(vault.pid, signal.SIGKILL)
    wait_until(lambda: vault.ended is not None, 30, "the vault goes on")
    Path(NodeFile.read(node_file(node)).vault.socket).unlink()  # so that a new one is seen to open


def last(node: Path) -> dict[str, Any]:
    """What the vault left for its operator."""
    try:
        told: dict[str, Any] = json.loads((node / "door" / STATUS).read_text())
    except (OSError, ValueError):
        return {}
    return told


@pytest.mark.parametrize(
    "rounds",
    [
        1,
        pytest.param(
            2,
            marks=pytest.mark.skipif(
                not os.environ.get("FEDFUSE_ALL"), reason="some minutes: set FEDFUSE_ALL=1"
            ),
        ),
    ],
)
def test_a_masked_run_outlives_vaults_that_are_killed_between_its_stages(
    federation: Federation, tmp_path: Path, rounds: int
) -> None:
    """In round 1 that of site-d before training: the one that takes its place has no keys, refuses
    and spends nothing. In round 2 that of site-c once its update has left: it is in the sum, it is
    spent, and the others take its masks off. Epsilon is what the simulation of the run states."""
    a, b, c, d = federation.nodes
    log = federation.folder / "run.log"
    words = [sys.executable, "-m", "fedfuse", "server", "run", str(federation.srv)]
    with ExitStack() as stack:
        vaults = {n: stack.enter_context(start_vault(federation, n)) for n in federation.nodes}
        for node in federation.nodes:
            stack.enter_context(start_supernode(node))
        wait_until(
            lambda: [each["status"] for each in federation.link.nodes()] == ["online"] * 4,
            120, "the nodes do not connect",
        )  # fmt: skip
        run = stack.enter_context(
            Process(
                [*words, str(federation.scenario), "--json"],
                environment=os.environ, folder=federation.folder, log=log,
            )
        )  # fmt: skip
        story = d / "door" / LOG
        wait_until(lambda: "stage open: answered" in story.read_text(), 200, "no masks", run)
        kill(vaults[d], d)
        stack.enter_context(start_vault(federation, d))
        if rounds == 2:
            wait_until(
                lambda: (last(c).get("round"), last(c).get("status")) == (2, "ok"),
                300, "no update of site-c", run,
            )  # fmt: skip
            kill(vaults[c], c)
        wait_until(lambda: run.ended is not None, 300, "the run does not end")
    assert run.ended == 0, log.read_text()
    (folder,) = (path.parent for path in (federation.srv / "runs").glob("*/summary.json"))
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["engine"]) == ("finished", "superlink")
    lost = [row["failures"] for row in RunFolder.open(folder).metrics()]
    assert [list(failures) for failures in lost] == [["site-d"], ["site-c"]][:rounds]
    assert "no masks for this request" in lost[0]["site-d"]
    assert "stage agree" in lost[-1].get("site-c", "stage agree")
    for node, spent in ((a, rounds), (b, rounds), (c, rounds), (d, rounds - 1)):
        found = [account.steps for account in Ledger.open(node / "ledger").accounts()]
        assert (node.name, found) == (node.name, [spent] if spent else [])
    config = RunConfig.from_toml(federation.scenario).with_values(
        {
            "data.manifest": str(federation.folder / "manifest.csv"),
            "data.partition": "iid",
            "data.nodes": 4,
        }
    )
    simulated = simulate(config, tmp_path / "simulated", observer=Silent())["privacy"]
    told = summary["privacy"]
    for key in ("epsilon_server", "statement", "sigma"):
        assert told[key] == simulated[key]
    assert told["epsilon_model"] <= told["epsilon_server"] <= 8.0
    of_each = simulated["epsilon_by_node"].values()
    assert [told["epsilon_by_node"][node.name] for node in (a, b, c)] == list(of_each)[:3]
    assert told["epsilon_by_node"].get("site-d", 0.0) < told["epsilon_server"]
