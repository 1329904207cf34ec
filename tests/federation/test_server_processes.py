"""A server's operator at work with real processes: TLS, nodes' keys, kills, and who gets in."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedfuse.cli import main
from fedfuse.federation import deploy
from fedfuse.federation.bundle import write_bundle
from fedfuse.federation.certificates import issue, make_authority
from fedfuse.federation.processes import (
    Follower,
    Process,
    answers,
    environment,
    free_port,
    program,
    wait_until,
)
from fedfuse.federation.running import turned_away
from fedfuse.federation.tickets import is_conducted
from fedfuse.privacy import accounting
from fedfuse.privacy.ledger import Ledger, verify
from fedfuse.privacy.verification import read_heads
from fedfuse.runfolder import RunFolder
from tests.federation.deployment import (
    Federation,
    fedfuse,
    processes,
    says,
    wait_for_nodes,
    words_of,
)

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SBIN = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Its server is started and knows three nodes, which are not started."""
    made = Federation(tmp_path_factory.mktemp("federation"))
    with made.served() as told:
        assert made.public in told
        yield made


def test_a_run_needs_its_nodes_and_a_node_its_own_key(federation: Federation) -> None:
    told = fedfuse("server", "run", federation.srv, federation.scenario, code=7)
    assert "0 of 3 registered nodes are connected, but 3 are needed" in told.stderr
    told = fedfuse("server", "register", federation.srv, federation.nodes[0] / "supernode.pub",
                   "--name", "again", code=7)  # fmt: skip
    assert "this key is registered already" in told.stderr
    assert "running already" in fedfuse("server", "start", federation.srv, code=7).stderr


def test_who_may_not_connect_is_told_why(federation: Federation, tmp_path: Path) -> None:
    """A key that nobody registered, another authority, no TLS, a certificate that ran out."""
    make_authority(tmp_path / "ca.key", tmp_path / "ca.pem", name="another authority")
    key = ec.generate_private_key(ec.SECP384R1())
    (tmp_path / "stranger").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        )
    )
    right = ("--root-certificates", federation.link.server.authority)
    wrong = ("--root-certificates", tmp_path / "ca.pem")
    stranger = ("--auth-supernode-private-key", tmp_path / "stranger")
    own = ("--auth-supernode-private-key", federation.nodes[0] / "supernode.key")
    port = free_port()
    issue(tmp_path / "key", tmp_path / "pem", authority_key=tmp_path / "ca.key",
          authority=tmp_path / "ca.pem", names=["localhost"], days=-0.01)  # fmt: skip
    code = (
        "import http.server as h, ssl\n"
        f"server = h.HTTPServer(('127.0.0.1', {port}), h.BaseHTTPRequestHandler)\n"
        "context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)\n"
        "context.load_cert_chain('pem', 'key')\n"
        "server.socket = context.wrap_socket(server.socket, server_side=True)\n"
        "server.serve_forever()"
    )
    with ExitStack() as stack:
        old = Process([sys.executable, "-c", code], environment=environment(tmp_path),
                      folder=tmp_path, log=tmp_path / "old.log")  # fmt: skip
        stack.enter_context(old)
        for number, (trust, port_, text, why) in enumerate(
            (
                ([*right, *stranger], None, "[code: 2004]", "does not know this node's key"),
                (right, None, "SuperNode authentication is enabled", "wants a key"),
                ([*wrong, *own], None, "certificate verify failed", "does not vouch"),
                (["--insecure"], None, "Connection attempt failed", "this node does not"),
                ([*wrong, *own], port, "certificate has expired", "ran out"),
            )
        ):
            folder = tmp_path / str(number)
            folder.mkdir()
            knocking = stack.enter_context(federation.knock(folder, trust, port_))
            says(knocking, text)
            assert knocking.log is not None
            assert why in turned_away(knocking.log)
        assert all(each["status"] == "registered" for each in federation.link.nodes())
    log = federation.link.server.log.read_text()
    assert "ApiError:2004" in log
    assert "ApiError:2001" in log
    terminal = (federation.srv / "server.log").read_text()
    told = fedfuse("server", "status", federation.srv).stdout
    assert "turned away  a key that is not registered" in told
    for sentence in ("127.0.0.1 does not trust this server's certificate",
                     "127.0.0.1 speaks without TLS"):  # fmt: skip
        assert log.count(f" turned away: {sentence}") == 1  # though the second goes on trying
        assert terminal.count(f"\nturned away: {sentence}") == 1
        assert f"turned away  {sentence}" in told


@pytest.mark.skipif(not os.environ.get("FEDFUSE_ALL"), reason="a minute; FEDFUSE_ALL=1 runs it")
def test_a_bundle_that_was_tampered_with_is_refused_and_both_sides_say_so(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that brings a fedfuse of its own, and one that asks for another learning rate."""

    def thick(bundle: Path) -> None:
        write_bundle(bundle)
        shutil.copytree(ROOT / "fedfuse", bundle / "fedfuse")
        settings = bundle / "pyproject.toml"
        settings.write_text(
            settings.read_text().replace('"/clients/**', '"/fedfuse/**/*.py", "/clients/**')
        )

    def changed(bundle: Path) -> None:
        write_bundle(bundle)
        app = bundle / "clients" / "app.py"
        app.write_text(
            "import fedfuse.federation.forward as forward\n"
            "whole = forward.forwarded\n"
            "def other(path, letter, **more):\n"
            "    letter.record['config']['job.learning_rate'] = 0.25\n"
            "    return whole(path, letter, **more)\n"
            "forward.forwarded = other\n" + app.read_text()
        )

    words = ["server", "run", str(federation.srv), str(federation.scenario)]
    with ExitStack() as stack:
        nodes = [stack.enter_context(federation.start_node(node)) for node in federation.nodes]
        wait_for_nodes(federation, nodes)
        for tampered, said in ((thick, "runs a fedfuse of its own"), (changed, "did not sign it")):
            monkeypatch.setattr(deploy, "write_bundle", tampered)
            assert main(words) == 7
            assert capsys.readouterr().err.count(said) == 3
            for node in federation.nodes:
                assert "refused (WireError: " in node.with_suffix(".log").read_text()
                assert said in node.with_suffix(".log").read_text()
    for node in federation.nodes:
        assert Ledger.open(node / "ledger").datasets() == ()


def test_a_run_outlives_the_superlink_and_its_own_server_app(federation: Federation) -> None:
    """What was broken off stays spent, once; the books of both sides say the same. The SuperLink is
    killed before the server knows the nodes' names, the server app when there is a checkpoint."""
    words = [sys.executable, "-m", "fedfuse", "server", "run", str(federation.srv)]
    scenario = [str(federation.scenario), "--set", "train.rounds=4", "--log", "json"]
    with ExitStack() as stack:
        nodes = [stack.enter_context(federation.start_node(node)) for node in federation.nodes]
        wait_for_nodes(federation, nodes)
        run, peers = start(federation, [*words, *scenario], 1)
        pid = federation.link.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_conducted(run), 120, "the server app goes on")
        assert not federation.link.answers()
        fedfuse("server", "start", federation.srv, "--detach")
        wait_for_nodes(federation, nodes)
        _, more = start(federation, [*words, "--resume", run.name], 2)
        # Nothing of all this talks to anybody but the SuperLink, and each node to itself.
        assert peers
        assert {peer.split(" ")[0] for peer in peers | more} == {"127.0.0.1"}
        (app,) = [pid for pid in processes(federation.folder) if b"flwr-serverapp" in words_of(pid)]
        os.kill(app, signal.SIGKILL)
        wait_until(lambda: not is_conducted(run), 60, "the server app goes on")
        told = fedfuse(*words[3:], "--resume", run.name, "--json")
    summary = json.loads(told.stdout)
    assert (summary["status"], summary["engine"]) == ("finished", "superlink")
    check_books(federation, run, summary, done=2, broken_off=2)


def start(federation: Federation, words: list[str], round: int) -> tuple[Path, set[str]]:
    """Starts a run and follows it into `round`; its folder, and whom its processes talk to."""
    peers: set[str] = set()
    log = federation.folder / f"run-{free_port()}.log"
    with Process(words, environment=os.environ, folder=federation.folder, log=log) as process:
        wait_until(lambda: "Flower's run" in log.read_text(), 120, "no run", process)
        run = Path(re.findall(r"^Flower's run \d+, in (.+)$", log.read_text(), re.M)[0])
        lines = Follower(run / "progress.jsonl", place=None if "--resume" in words else 0)

        def there() -> bool:
            peers.update(*map(peers_of, processes(federation.folder)))
            events = [json.loads(line) for line in lines.lines()]
            return any((e["event"], e.get("round")) == ("round-started", round) for e in events)

        wait_until(there, 300, f"round {round} does not start", process)
    return run, peers


def peers_of(pid: int) -> set[str]:
    """ "address port" at the other end of each TCP connection of a process, and where it sends
    datagrams to."""
    inodes, found = set(), set()
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if match := re.fullmatch(r"socket:\[(\d+)\]", str(link.readlink())):
                inodes.add(match.group(1))
        for kind in ("tcp", "tcp6", "udp", "udp6"):
            for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
                fields = line.split()
                address, port = fields[2].split(":")
                if fields[9] in inodes and int(port, 16):
                    found.add(f"{dotted(address)} {int(port, 16)}")
    except OSError:
        pass
    return found


def dotted(address: str) -> str:
    """An address as in /proc/net/tcp: words of 32 bits, lowest byte first."""
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    whole = b"".join(words)
    mapped = whole[:12] == bytes(10) + b"\xff\xff"
    return ".".join(map(str, whole[-4:])) if len(whole) == 4 or mapped else whole.hex()


def check_books(
    federation: Federation, run: Path, summary: dict[str, Any], *, done: int, broken_off: int
) -> None:
    events, heads = RunFolder.open(run).events(), read_heads(run / "heads.jsonl")
    stated = summary["privacy"]["epsilon_by_node"]
    assert sorted(stated) == [node.name for node in federation.nodes]
    for node in federation.nodes:
        own = [event.status for event in events if event.node == node.name]
        assert (own.count("spent"), own.count("reserved")) == (done, broken_off)
        mine = [head for head in heads if head.node == node.name]
        anchor = federation.folder / f"anchor-{node.name[-1]}"
        assert verify(node / "ledger", anchor=anchor, heads=mine).holds
        account = Ledger.open(node / "ledger").accounts()[0]
        # A node may not have been asked yet when all was broken off; it never spends more.
        assert done <= account.rounds <= done + broken_off
        assert accounting.epsilon(account.history, 1e-5) <= stated[node.name] + 1e-9 <= 8.0
        lines = [json.loads(line) for line in (node / "ledger").read_text().splitlines()]
        assert {line["run"] for line in lines if line.get("run")} == {RunFolder.open(run).run_id()}


@pytest.mark.skipif(shutil.which("nginx", path=SBIN) is None, reason="nginx is not installed")
def test_a_proxy_lets_nodes_through_and_nobody_else(federation: Federation, tmp_path: Path) -> None:
    """What an outsider can do who reaches the SuperLink's port, and who reaches the proxy's."""
    port = free_port()
    text = (ROOT / "docs" / "deploy" / "nginx.conf").read_text()
    for old, new in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("https://127.0.0.1:9092", f"https://127.0.0.1:{federation.port}"),
        ("/srv/fedfuse", str(federation.srv)),
        ("fl.example.org", "localhost"),
        ("pid nginx.pid", "daemon off;\nmaster_process off;\npid nginx.pid"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "nginx.conf").write_text(text)
    nginx = shutil.which("nginx", path=SBIN)
    assert nginx is not None
    words = [nginx, "-p", str(tmp_path), "-c", "nginx.conf", "-e", "error.log"]
    bundle = tmp_path / "bundle"
    write_bundle(bundle)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    trust = ("--root-certificates", federation.link.server.authority)
    with Process(words, environment=os.environ, folder=tmp_path, log=tmp_path / "out") as proxy:
        wait_until(lambda: answers("127.0.0.1", port), 30, "no proxy", proxy)
        bare, guarded = (outsider(tmp_path, federation, at) for at in (federation.port, port))
        # Whoever reaches the SuperLink itself needs no key to see the nodes and to run code.
        assert bare("supernode", "list") == 0
        assert bare("run", str(bundle)) == 0
        asked = status(federation, federation.port, "/v1/runtime/acquire-task")
        assert asked not in (401, 403, 404)
        assert guarded("supernode", "list") != 0
        assert guarded("run", str(bundle)) != 0
        for path in ("control/list-nodes", "runtime/acquire-task", "fleet/../control/list-nodes"):
            assert status(federation, port, f"/v1/{path}") == 404
        assert [status(federation, port, path) for path in ("/docs", "/health", "/")] == [404] * 3
        # What a node asks arrives: it is turned away by the SuperLink, for its key.
        with federation.knock(stranger, trust, port) as node:
            says(node, "SuperNode authentication is enabled")
        # Whose TLS fails comes no further than the proxy, whose log says it.
        with (
            socket.create_connection(("127.0.0.1", port), timeout=20) as line,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            ssl.create_default_context().wrap_socket(line, server_hostname="localhost")
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as bare_line:
            bare_line.request("POST", "/v1/fleet/activate-node")
            assert bare_line.getresponse().status == 400
        said = (tmp_path / "error.log").read_text()
        assert "unknown ca" in said
        assert "client sent plain HTTP request to HTTPS port" in said


def outsider(folder: Path, federation: Federation, port: int) -> Callable[..., int]:
    """Runs Flower's own commands against a port, with nothing but the public certificate."""
    home = folder / f"home-{port}"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "there"\n[superlink.there]\naddress = "localhost:{port}"\n'
        f'root-certificates = "{federation.link.server.authority}"\n'
    )

    def run(*words: str) -> int:
        flwr = [program("flwr"), *words, "there"]
        done = subprocess.run(
            flwr, env=environment(home), cwd=home, capture_output=True, timeout=120, check=False
        )
        return done.returncode

    return run


def status(federation: Federation, port: int, path: str) -> int:
    """Of a POST without a word."""
    context = ssl.create_default_context(cafile=str(federation.link.server.authority))
    connection = http.client.HTTPSConnection("localhost", port, context=context, timeout=20)
    with closing(connection):
        connection.request("POST", path, body=b"")
        return connection.getresponse().status
