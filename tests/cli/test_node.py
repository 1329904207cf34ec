"""`fedfuse node`: from an empty folder to a node that is ready, and what is told when it is not."""

from __future__ import annotations

import datetime
import io
import json
import os
import shutil
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedfuse.cli import main
from fedfuse.cli.node import _answer_line
from fedfuse.federation.certificates import issue, make_authority
from fedfuse.federation.door import Door
from fedfuse.federation.newnode import node_key
from fedfuse.federation.nodefile import NodeFile
from fedfuse.federation.vault import Answered
from fedfuse.privacy.ledger import Ledger
from fedfuse.privacy.signing import SigningKey
from tests.cli.stand_ins import Result
from tests.federation.conftest import write_manifest

Run = Callable[..., Result]
NODE = Path("clinic")


def a_certificate(path: Path, *, days: float = 365, since: float = 1) -> Path:
    """A certificate that vouches for itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a federation")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=since))
        .not_valid_after(now + datetime.timedelta(days=days))
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a node that has data and lacks nothing, made by the commands."""
    folder = tmp_path_factory.mktemp("ready")
    SigningKey.create(folder / "server.pem")
    words: tuple[Any, ...] = (
        "--name", "clinic a", "--epsilon", 4, "--server", folder / "server.pem", "--superlink",
        "127.0.0.1:1", "--ca", a_certificate(folder / "ca.pem"), "--anchor", folder / "anchor",
    )  # fmt: skip
    for command in (
        ("init", folder / NODE, *words),
        ("prepare", folder / NODE, write_manifest(folder)),
    ):
        with redirect_stdout(io.StringIO()) as said:
            assert main(["node", *map(str, command)]) == 0
        (folder / command[0]).write_text(said.getvalue())
    return folder


@pytest.fixture
def made(ready: Path, tmp_path: Path) -> Path:
    """A copy of that node, to be spoiled."""
    shutil.copytree(ready, tmp_path, dirs_exist_ok=True)
    settings = tmp_path / NODE / "node.toml"
    settings.write_text(settings.read_text().replace(str(ready), str(tmp_path)))
    return tmp_path / NODE


def looks(run: Run, *words: str) -> dict[str, dict[str, str]]:
    done = run("node", "check", NODE, "--json", *words)
    found = {look["name"]: look for look in json.loads(done.out)}
    assert (done.code == 1) == any(look["state"] == "wrong" for look in found.values())
    return found


@pytest.mark.parametrize("command", ["init", "prepare", "check", "identity", "start", "status"])
def test_each_command_has_help_with_an_example(run: Run, command: str) -> None:
    done = run("node", command, "--help")
    assert done.code == 0
    assert f"Example: fedfuse node {command} clinic" in done.out


def test_a_new_node_is_ready_and_its_own(run: Run, made: Path) -> None:
    line = (made.parent / "init").read_text()
    assert line.split()[0] == "ecdsa-sha2-nistp384"
    assert line == (made / "supernode.pub").read_text()
    assert (made.parent / "prepare").read_text() == "90 records of left, right\n"
    settings = NodeFile.read(made / "node.toml")
    assert settings.name == "clinic a"
    server = SigningKey.load(made.parent / "server.pem").public
    assert settings.policy.servers == (server,)
    assert (settings.policy.max_epsilon, settings.policy.delta) == (4.0, 1e-6)
    assert (made / "ca.pem").read_bytes() == (made.parent / "ca.pem").read_bytes()
    ledger = Ledger.open(made / "ledger", key=made / "ledger.pem", anchor=made.parent / "anchor")
    assert (ledger.node, ledger.datasets()) == ("clinic a", ())
    for path in [made, *made.rglob("*.key"), *made.rglob("*.pem"), made / "node.toml"]:
        assert path.stat().st_mode & 0o077 == 0, path
    assert node_key(made / "supernode.key").curve.name == "secp384r1"
    public = SigningKey.load(made / "identity.pem").public
    assert run("node", "identity", NODE).out == f'"clinic a" = "{public}"\n'
    found = looks(run, "--offline")
    states = {name: look["state"] for name, look in found.items()}
    assert states.pop("vault") == "note"  # one user for both
    assert set(states.values()) == {"ok"}, found
    assert "90 records" in found["data"]["found"]
    assert "0.00 of 4" in found["budget"]["found"]
    text = run("node", "check", NODE, "--offline").out
    assert "✓ data" in text
    assert "hint: the app bundle" in text


def test_the_server_is_asked_unless_offline(run: Run, made: Path) -> None:
    found = looks(run)["server"]
    assert found["state"] == "wrong"
    assert "127.0.0.1:1 does not answer" in found["found"]


@pytest.mark.parametrize(
    ("days", "state", "found"),
    [(0, "ok", "is who it should be"), (-1, "wrong", "at the server"), (1, "wrong", "it is ")],
)
def test_the_clocks_of_node_and_server_are_compared(
    run: Run, made: Path, tmp_path: Path, days: int, state: str, found: str
) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + 86400 * days)

        def log_message(self, *_: object) -> None: ...

    make_authority(tmp_path / "ca.key", made / "ca.new", name="a federation")
    issue(tmp_path / "key", tmp_path / "pem", authority_key=tmp_path / "ca.key",
          authority=made / "ca.new", names=["localhost"])  # fmt: skip
    (made / "ca.new").replace(made / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "pem", tmp_path / "key")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = (made / "node.toml").read_text()
        here = f"localhost:{server.server_port}"
        (made / "node.toml").write_text(settings.replace("127.0.0.1:1", here))
        look = looks(run)["server"]
        server.shutdown()
    assert look["state"] == state, look
    assert found in look["found"]
    assert ("set the clock" in look["remedy"]) == bool(days)


def spoil(made: Path, what: str, tmp_path: Path) -> None:
    text = (made / "node.toml").read_text()
    match what:
        case "settings":
            (made / "node.toml").write_text(text.replace("max_epsilon", "max_epsilom"))
        case "seeds":
            text = text.replace("seeded_noise = false", "seeded_noise = true")
            (made / "node.toml").write_text(text)
        case "settings' rights":
            (made / "node.toml").chmod(0o622)
        case "key":
            (made / "supernode.key").chmod(0o644)
        case "no key":
            (made / "supernode.key").write_text("no key")
        case "ledger's key":
            (made / "ledger.pem").chmod(0o640)
        case "old":
            a_certificate(made / "ca.pem", days=-0.5)
        case "soon":
            a_certificate(made / "ca.pem", days=3)
        case "clock":
            a_certificate(made / "ca.pem", since=-1)
        case "certificate":
            (made / "ca.pem").write_text("none")
        case "anchor":
            (tmp_path / "anchor").write_bytes((tmp_path / "anchor").read_bytes() + b"x")
        case "data":
            (made / "store").rename(made / "elsewhere")
        case "store's rights":
            (made / "store").chmod(0o750)
        case "device":
            (made / "node.toml").write_text(f'device = "cuda:77"\n{text}')
        case "door":
            (made / "door").mkdir(mode=0o755)
            (made / "door").chmod(0o755)
        case "door's width":
            (made / "node.toml").write_text(
                text.replace("max_megabytes = 0", "max_megabytes = 256")
            )
        case "user":
            (made / "node.toml").write_text(text.replace("clients = []", 'clients = ["no-one"]'))


@pytest.mark.parametrize(
    ("what", "name", "state", "found", "remedy"),
    [
        ("settings", "node.toml", "wrong", "unknown setting policy.max_epsilom", ""),
        ("seeds", "node.toml", "note", "NOT PRIVATE where a run has a noise seed", "for trials"),
        ("settings' rights", "node.toml", "wrong", "others may write", "chmod 600"),
        ("key", "node's key", "wrong", "others may read", "chmod 600"),
        ("no key", "node's key", "wrong", "not in OpenSSH's format", ""),
        ("ledger's key", "ledger", "wrong", "others may read", "chmod 600"),
        ("old", "certificate", "wrong", "it was valid until", "new one"),
        ("soon", "certificate", "note", "only", "next one"),
        ("clock", "clock", "wrong", "the certificate is of", "set the clock"),
        ("certificate", "certificate", "wrong", "no certificate in PEM", "ask the server"),
        ("anchor", "ledger", "wrong", "anchor", ""),
        ("data", "data", "wrong", "no data is prepared", "fedfuse node prepare"),
        ("store's rights", "data", "wrong", "others may enter", "chmod 700"),
        ("device", "device", "wrong", "'cuda:77' cannot be used", "auto"),
        ("door", "vault", "wrong", "others may enter", "chmod 750"),
        ("user", "vault", "wrong", "no user 'no-one'", "SuperNode"),
        ("door's width", "requests", "note", "up to 62,914,560 parameters", "max_megabytes = 0"),
    ],
)
def test_what_is_wrong_is_crossed_and_its_remedy_told(
    run: Run, made: Path, tmp_path: Path, what: str, name: str, state: str, found: str, remedy: str
) -> None:
    spoil(made, what, tmp_path)
    look = looks(run, "--offline")[name]
    assert look["state"] == state, look
    assert found in look["found"]
    assert remedy in look["remedy"]


def test_a_node_is_never_overwritten_and_a_failed_start_leaves_nothing(
    run: Run, made: Path, tmp_path: Path
) -> None:
    words = ("--name", "b", "--superlink", "h:1")
    again = run("node", "init", NODE, *words, "--epsilon", 4, "--server", "any")
    assert again.code == 3
    assert "not empty" in again.err
    for more, said in (
        (("--epsilon", -1, "--server", "any"), "no promise"),
        (("--epsilon", 1, "--server", "nobody.pem"), "cannot be read"),
        (("--epsilon", 1, "--server", "any", "--ca", "nowhere.pem"), "No such file"),
        (("--epsilon", 1, "--server", "any", "--anchor", tmp_path / "anchor"), "anchor"),
    ):
        done = run("node", "init", "other", *words, *more)
        assert done.code != 0
        assert said in done.err
        assert not Path("other").exists()


def test_records_change_only_while_the_node_is_stopped(
    run: Run, made: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest.csv"
    door = Door(made / "door" / "vault.sock", clients=frozenset({os.getuid()}), most_bytes=1)
    refused = run("node", "prepare", NODE, manifest)
    assert refused.code == 7
    assert "is running" in refused.err
    assert run("node", "status", NODE).code == 0
    door.close()
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:31]))  # a real node's manifest has no test records
    done = run("node", "prepare", NODE, manifest)
    assert (done.code, done.out) == (0, "30 records of left, right\n"), done.err
    assert not (made / "store" / "test").exists()
    assert sorted(path.name for path in made.iterdir() if path.name.startswith(".")) == []
    missing = run("node", "prepare", NODE, "nowhere.csv")
    assert missing.code == 4
    assert looks(run, "--offline")["data"]["state"] == "ok"


def test_the_state_of_a_node_that_does_not_run(run: Run, made: Path) -> None:
    done = run("node", "status", NODE)
    assert done.code == 1
    assert done.out.splitlines() == [
        "node   clinic a, not running",
        "last   nothing was asked yet",
        "spent  epsilon 0.00 of 4 spent, 4.00 left",
    ]
    told = {"time": "T", "server": "ab" * 32, "run": "cd" * 16, "round": 2, "rounds": 3}
    told |= {"steps": 4, "status": "ok", "problem": "", "seconds": 0.5}
    (made / "door").mkdir(mode=0o750)
    (made / "door" / "status.json").write_text(
        json.dumps(told | {"epsilon": 1.231, "epsilon_allowed": 4.0})
    )
    (line,) = [x for x in run("node", "status", NODE).out.splitlines() if x.startswith("last")]
    assert line == (
        "last   T  round 2 of 3, 4 steps, run cdcdcdcd, server abababab: ok, 0.50 s; "
        "epsilon 1.24 of 4 spent, 2.76 left"
    )


def test_a_node_that_cannot_reach_a_server_is_not_started(run: Run, made: Path) -> None:
    text = (made / "node.toml").read_text()
    for old, new, said in (
        ('key = "supernode.key"', "", "superlink.ca and superlink.key are needed"),
        ('address = "127.0.0.1:1"', 'address = "somewhere"', "is no host:port"),
        ("clients = []", 'clients = ["65534"]', "open to another user"),
    ):
        (made / "node.toml").write_text(text.replace(old, new))
        began = time.monotonic()
        done = run("node", "start", NODE)
        assert done.code == 3
        assert said in done.err
        assert time.monotonic() - began < 20


def test_a_refused_stage_of_masks_is_shown_as_what_it_is() -> None:
    answered = Answered(
        time="2026-11-25T21:11:04+00:00", server="", run="", round=0, rounds=0, steps=0,
        stage="share", status="refused", problem="WireError: no masks", epsilon=1.0,
        epsilon_allowed=2.0, seconds=0.01,
    )  # fmt: skip
    assert "masks, stage share: refused (WireError: no masks)" in _answer_line(asdict(answered))


def test_identities_are_printed_exchanged_and_looked_at(run: Run, made: Path) -> None:
    settings, peers, key = made / "node.toml", made / "peers.toml", made / "identity.pem"
    assert "masks.peers is empty" in looks(run, "--offline")["masks"]["found"]
    key.unlink()
    done = run("node", "identity", NODE)  # of a node that was made before there were any
    assert "made " in done.err
    assert key.stat().st_mode & 0o777 == 0o600
    others = [SigningKey.create(made.parent / f"{name}.pem").public for name in "abc"]
    lines = [f'{name} = "{public}"\n' for name, public in zip("abc", others, strict=True)]
    peers.write_text(done.out + "".join(lines))
    settings.write_text(settings.read_text().replace('peers = ""', 'peers = "peers.toml"'))
    assert looks(run, "--offline")["masks"]["state"] == "ok"
    assert "with 3 other nodes" in looks(run, "--offline")["masks"]["found"]
    peers.chmod(0o666)
    assert "chmod 644" in looks(run, "--offline")["masks"]["remedy"]
    peers.chmod(0o600)
    key.chmod(0o644)
    assert "chmod 600" in looks(run, "--offline")["masks"]["remedy"]
    key.chmod(0o600)
    peers.write_text(done.out + lines[0])
    assert looks(run, "--offline")["masks"]["state"] == "note"
    peers.write_text(lines[0] + done.out.replace("clinic a", "b"))
    assert "the same key" in looks(run, "--offline")["masks"]["found"]
    peers.unlink()
    assert "no such file" in looks(run, "--offline")["masks"]["found"]
