"""A real federation of processes: a SuperLink with TLS and node keys, nodes by `fedfuse node`."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedfuse.cli import main
from fedfuse.config import RunConfig
from fedfuse.data.prepare import prepare
from fedfuse.federation.processes import (
    Process,
    answers,
    environment,
    free_port,
    program,
    wait_until,
)
from fedfuse.privacy import accounting
from fedfuse.privacy.ledger import Ledger, verify
from fedfuse.privacy.signing import SigningKey
from fedfuse.privacy.verification import read_heads
from fedfuse.runfolder import RunFolder
from tests.federation.conftest import write_manifest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "model.dim": 8,
    "model.head_width": 8,
    "model.vector_width": 8,
    "train.rounds": 2,
    "train.local_steps": 2,
    "privacy.declared_records": 30,
    "privacy.epsilon": 8.0,
    "federation.min_nodes": 2,
}


def certificates(folder: Path) -> None:
    """ca.pem, and link.pem with link.key for 127.0.0.1, which it vouches for."""
    now = datetime.datetime.now(datetime.UTC)
    authority = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "the federation")])
    for name, whose in (("ca", issuer), ("link", x509.Name([]))):
        key = authority if name == "ca" else ec.generate_private_key(ec.SECP256R1())
        made = (
            x509.CertificateBuilder()
            .subject_name(whose)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=90))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
        )
        if name != "ca":
            here = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            made = made.add_extension(x509.SubjectAlternativeName([here]), critical=True)
        pem = made.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        (folder / f"{name}.pem").write_bytes(pem)
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        (folder / f"{name}.key").write_bytes(private)


@pytest.mark.slow
def test_real_nodes_spend_from_their_ledgers_under_their_own_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their ledgers, the server's books, the heads that it kept and what was shown say the same."""

    def said(*words: object, code: int = 0) -> str:
        assert main(["node", *map(str, words)]) == code, capsys.readouterr()
        return capsys.readouterr().out

    manifest = write_manifest(tmp_path)
    config = RunConfig().with_values({"data.manifest": str(manifest)})
    prepare(config.data, seed=0).write(tmp_path / "store")
    certificates(tmp_path)
    SigningKey.create(tmp_path / "server.pem")
    port, home = free_port(), tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{tmp_path}/ca.pem"\n'
    )
    lines = manifest.read_text().splitlines(keepends=True)
    nodes = [tmp_path / f"node-{number}" for number in (0, 1)]
    for number, node in enumerate(nodes):
        said(
            "init", node, "--name", f"site-{number}", "--epsilon", 8, "--delta", 1e-5,
            "--server", tmp_path / "server.pem", "--superlink", f"127.0.0.1:{port}",
            "--ca", tmp_path / "ca.pem", "--anchor", tmp_path / f"anchor-{number}",
        )  # fmt: skip
        own = tmp_path / "own.csv"
        own.write_text("".join(x for x in lines if x == lines[0] or f",site-{'ab'[number]}," in x))
        said("prepare", node, own)
    own_variables = {
        "FEDFUSE_STORE": str(tmp_path / "store"),
        "FEDFUSE_OUT": str(tmp_path / "run"),
        "FEDFUSE_KEY": str(tmp_path / "server.pem"),
    }
    variables = environment(home, own_variables)
    flat = " ".join(f"{key}={json.dumps(value)}" for key, value in SETTINGS.items())
    flwr = program("flwr")
    with ExitStack() as stack:
        words = (
            program("flower-superlink"), "--host", "127.0.0.1", "--port", str(port),
            "--ssl-ca-certfile", tmp_path / "ca.pem", "--ssl-certfile", tmp_path / "link.pem",
            "--ssl-keyfile", tmp_path / "link.key", "--enable-supernode-auth",
        )  # fmt: skip
        link = stack.enter_context(
            Process(words, environment=variables, folder=tmp_path, log=tmp_path / "link.log")
        )
        wait_until(lambda: answers("127.0.0.1", port), 120, "the SuperLink does not answer", link)
        running = []
        for node in nodes:
            done = subprocess.run(
                [flwr, "supernode", "register", node / "supernode.pub", "here"],
                env=variables, capture_output=True, text=True, timeout=120, cwd=tmp_path,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            assert "✗" not in said("check", node)
            process = Process(
                [sys.executable, "-m", "fedfuse", "node", "start", node],
                environment=environment(home),
                folder=tmp_path,
                log=node.with_suffix(".log"),
            )
            running.append(stack.enter_context(process))
        started = subprocess.run(
            [flwr, "run", ROOT, "here", "--run-config", flat],
            env=variables, capture_output=True, text=True, timeout=120, cwd=tmp_path,
        )  # fmt: skip
        assert started.returncode == 0, started.stdout + started.stderr
        summary = tmp_path / "run" / "summary.json"
        wait_until(summary.exists, 300, "the run does not end", link, *running)
        states = [json.loads(said("status", node, "--json")) for node in nodes]
        with ThreadPoolExecutor() as together:
            assert list(together.map(Process.stop, running)) == [0, 0]
        for node in nodes:
            assert "the node is stopped" in node.with_suffix(".log").read_text()
            assert not json.loads(said("status", node, "--json", code=1))["running"]
    told = json.loads(summary.read_text())
    assert told["status"] == "finished", told
    events = RunFolder.open(tmp_path / "run").events()
    assert {event.status for event in events} == {"spent"}
    heads = read_heads(tmp_path / "run" / "heads.jsonl")
    assert len(heads) == 2 * 2
    assert sorted({event.node for event in events}) == ["site-0", "site-1"]
    for number, node in enumerate(nodes):
        seen = [head for head in heads if head.node == f"site-{number}"]
        assert verify(node / "ledger", anchor=tmp_path / f"anchor-{number}", heads=seen).holds
        account = Ledger.open(node / "ledger").accounts()[0]
        assert (account.rounds, account.steps, account.open) == (2, 4, 0)
        stated = told["privacy"]["epsilon_by_node"][f"site-{number}"]
        assert accounting.epsilon(account.history, 1e-5) == pytest.approx(stated)
        assert stated <= states[number]["epsilon"] <= 8.0
        assert states[number]["running"]
        assert (states[number]["last"]["round"], states[number]["last"]["status"]) == (2, "ok")
        shown = node.with_suffix(".log").read_text()
        rounds = re.findall(
            r"round (\d) of 2, 2 steps, run \w{8}, server \w{8}: ok, .* spent", shown
        )
        assert rounds == ["1", "2"]
