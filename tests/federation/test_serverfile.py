"""A server's folder: made once, for its owner alone; and what cannot be started is told before."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedfuse.config import RunConfig
from fedfuse.errors import ConfigError, FederationError, FedfuseError
from fedfuse.federation.bundle import APPS, write_bundle
from fedfuse.federation.knocks import fingerprint, strangers
from fedfuse.federation.processes import free_port
from fedfuse.federation.serverfile import ServerFile, equip_server, renew
from fedfuse.federation.superlink import SuperLink
from fedfuse.privacy.signing import public_key

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(tmp_path: Path) -> ServerFile:
    made = equip_server(tmp_path / "srv", hosts=["fl.example.org"], port=free_port(),
                        bind="127.0.0.1")  # fmt: skip
    (made.store / "test").mkdir()
    return made


def change(server: ServerFile, old: str, new: str) -> ServerFile:
    path = server.folder / "server.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return ServerFile.read(server.folder)


def test_all_of_it_is_for_its_owner_alone(server: ServerFile) -> None:
    for folder, folders, files in os.walk(server.folder):
        for name in (*folders, *files):
            mode = stat.S_IMODE((Path(folder) / name).stat().st_mode)
            assert not mode & 0o077 or name == "test", name
    assert stat.S_IMODE(server.folder.stat().st_mode) == 0o700


def test_nodes_are_told_what_the_operator_wrote(server: ServerFile) -> None:
    assert server.address == f"fl.example.org:{server.settings.superlink.port}"
    assert "fl.example.org" in server.certificate().names
    assert public_key(str(server.folder / "server.pub")) == server.key().public
    proxied = change(server, 'address = ""', 'address = "fl.example.org:443"')
    assert proxied.address == "fl.example.org:443"
    everywhere = change(server, 'bind = "127.0.0.1"', 'bind = "0.0.0.0"')
    assert everywhere.local.startswith("127.0.0.1:")


def test_a_server_is_never_overwritten(server: ServerFile) -> None:
    before = (server.folder / "signing.pem").read_bytes()
    with pytest.raises(ConfigError, match="never overwritten"):
        equip_server(server.folder, hosts=["x"], port=1, bind="127.0.0.1")
    assert (server.folder / "signing.pem").read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("port = 0", "prot = 0", "unknown setting metrics.prot"),
        ('hosts = ["fl.example.org"]', "hosts = []", "hosts is empty"),
        ('hosts = ["fl.example.org"]', 'hosts = ["a b"]', "superlink.hosts has 'a b'"),
        ("port = 0", "port = 99999", "metrics.port"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(
    server: ServerFile, old: str, new: str, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        change(server, old, new)


def test_what_cannot_start_says_why_before_anything_is_started(server: ServerFile) -> None:
    link = SuperLink(server)
    link.check()
    renew(server, days=-0.01)
    with pytest.raises(FederationError, match="ran out") as caught:
        link.check()
    assert "fedfuse server renew" in caught.value.hint
    with pytest.raises(FederationError, match="ran out"):
        link.nodes()
    renew(server)
    with (
        socket.create_server(("127.0.0.1", server.settings.superlink.port)),
        pytest.raises(FederationError, match="cannot listen there"),
    ):
        link.check()
    with sqlite3.connect(server.database) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(FederationError, match="database is locked"):
            link.check()
    (server.store / "test").rmdir()
    with pytest.raises(FederationError, match="no test records"):
        link.check()
    (server.folder / "signing.pem").chmod(0o644)
    with pytest.raises(FedfuseError, match="others may read"):
        link.check()


def test_a_server_that_does_not_run_is_said_to_be_so(server: ServerFile) -> None:
    link = SuperLink(server)
    assert (link.pid, link.answers(), link.stop()) == (None, False, False)
    (server.folder / "state/superlink.json").write_text(f'{{"pid": {os.getpid()}}}')
    assert link.pid is None  # another program got the number
    with pytest.raises(FederationError, match="does not answer"):
        link.nodes()


def test_the_bundle_is_that_of_the_source_and_holds_no_fedfuse(tmp_path: Path) -> None:
    write_bundle(tmp_path)
    for name, text in APPS.items():
        assert (ROOT / name / "app.py").read_text() == text
        assert (tmp_path / name / "app.py").read_text() == text
    from flwr.common.config import get_fused_config_from_dir

    assert get_fused_config_from_dir(tmp_path, {}) == RunConfig().to_flat()
    assert {path.name for path in tmp_path.iterdir()} == {"server", "clients", "pyproject.toml"}


def test_whoever_was_turned_away_is_known_by_the_key(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    line = f"[/v1/fleet/activate-node][ApiError:2004] Attempted with public key: {pem!r}, exception"
    log = tmp_path / "log"
    log.write_text(
        f"{line}\nsomething else\n{line}\n[ApiError:2004] b'-----BEGIN PUBLIC KEY-----K'"
    )
    public = tmp_path / "supernode.pub"
    public.write_bytes(
        key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    assert strangers(log) == {fingerprint(pem): 2}
    assert strangers(tmp_path / "nothing") == {}
    keygen = shutil.which("ssh-keygen")
    if keygen is not None:
        shown = subprocess.run([keygen, "-lf", public], capture_output=True, text=True, check=True)
        assert shown.stdout.split()[1] == fingerprint(pem)
