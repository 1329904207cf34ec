"""A real federation of processes: a SuperLink, SuperNodes with their own ledgers, `flwr run`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import tomli_w

from fedfuse.config import RunConfig
from fedfuse.data.prepare import prepare
from fedfuse.privacy import accounting
from fedfuse.privacy.ledger import Ledger, verify
from fedfuse.privacy.signing import SigningKey
from fedfuse.privacy.verification import read_heads
from fedfuse.runfolder import RunFolder
from tests.federation.conftest import write_manifest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SETTINGS = {
    "model.dim": 8,
    "model.head_width": 8,
    "model.vector_width": 8,
    "train.rounds": 2,
    "train.local_steps": 2,
    "privacy.declared_records": 30,
    "privacy.epsilon": 8.0,
    "privacy.noise_seed": "a server's own idea",
    "federation.min_nodes": 2,
}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def process(log: Path, environment: dict[str, str], *words: object) -> Iterator[None]:
    """A process of Flower's, ended with all that it started."""
    with log.open("wb") as out:
        running = subprocess.Popen(
            [str(word) for word in words],
            stdout=out,
            stderr=out,
            env=environment,
            cwd=log.parent,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(running.pid, 15)
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, 9)
                running.wait()


def answers(port: int) -> bool:
    with socket.socket() as one:
        one.settimeout(1)
        return one.connect_ex(("127.0.0.1", port)) == 0


def until(condition: object, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, what
        time.sleep(0.5)


@pytest.mark.slow
def test_real_processes_spend_from_their_ledgers_under_their_own_rules(tmp_path: Path) -> None:
    """Their ledgers, the server's books and the heads that it kept say the same."""
    manifest = write_manifest(tmp_path)
    prepared = prepare(
        RunConfig().with_values({"data.manifest": str(manifest)}).data, seed=0, fingerprints=True
    )
    prepared.write(tmp_path / "store")
    server = SigningKey.create(tmp_path / "server.pem")
    for number in (0, 1):
        folder = tmp_path / f"node-{number}"
        folder.mkdir()
        SigningKey.create(folder / "key.pem")
        Ledger.create(
            folder / "ledger", node=f"n{number}", key=folder / "key.pem", anchor=folder / "anchor"
        )
        tree = {
            "data": {"store": "../store", "node": number},
            "ledger": {"file": "ledger", "key": "key.pem", "anchor": "anchor"},
            "policy": {"max_epsilon": 8.0, "delta": 1e-5, "servers": [server.public]},
        }
        (folder / "node.toml").write_text(tomli_w.dumps(tree))
    port, home = free_port(), tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n"
    )
    environment = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FEDFUSE_STORE": str(tmp_path / "store"),
        "FEDFUSE_OUT": str(tmp_path / "run"),
        "FEDFUSE_KEY": str(tmp_path / "server.pem"),
    }
    flat = " ".join(f"{key}={json.dumps(value)}" for key, value in SETTINGS.items())
    with ExitStack() as stack:
        link = (BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port)
        stack.enter_context(process(tmp_path / "link.log", environment, *link))
        until(lambda: answers(port), 120, "the SuperLink does not answer")
        for number in (0, 1):
            words = (
                BIN / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
                "--host", "127.0.0.1", "--port", free_port(),
                "--node-config", f'node-file="{tmp_path}/node-{number}/node.toml"',
            )  # fmt: skip
            log = tmp_path / f"node-{number}.log"
            stack.enter_context(process(log, environment, *words))
        started = subprocess.run(
            [BIN / "flwr", "run", ROOT, "here", "--run-config", flat],
            env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path,
        )  # fmt: skip
        assert started.returncode == 0, started.stdout + started.stderr
        summary = tmp_path / "run" / "summary.json"
        until(summary.exists, 300, "the run does not end: " + (tmp_path / "link.log").read_text())
    told = json.loads(summary.read_text())
    assert told["status"] == "finished", told
    events = RunFolder.open(tmp_path / "run").events()
    assert {event.status for event in events} == {"spent"}
    heads = read_heads(tmp_path / "run" / "heads.jsonl")
    assert len(heads) == 2 * 2
    for number, node in enumerate(sorted({event.node for event in events})):
        path = tmp_path / f"node-{number}" / "ledger"
        own = [head for head in heads if head.node == node]
        assert verify(path, anchor=path.parent / "anchor", heads=own).holds
        account = Ledger.open(path).accounts()[0]
        assert (account.rounds, account.steps, account.open) == (2, 4, 0)
        stated = told["privacy"]["epsilon_by_node"][node]
        assert accounting.epsilon(account.history, 1e-5) == pytest.approx(stated)
        assert stated <= 8.0
