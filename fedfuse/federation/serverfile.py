"""A server's folder: its settings, keys and certificates, and the places of its data and runs.

    server.toml      what the operator decides, see `ServerFile`
    signing.pem      the key that signs what nodes are asked; server.pub is its public half
    tls/             the authority and the certificate, see `certificates`
    store/           the public test records, see `fedfuse server prepare`
    runs/            a folder for each run
    nodes.json       which nodes were registered, under which names
    peers.toml       identities of nodes whose updates come under masks, see `masking.peers`
    state/           Flower's own: its database and what its programs keep
    superlink.log    what the SuperLink and the runs' server apps say

All of it is for its owner's eyes alone. Without torch and Flower.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedfuse.config import toml, typed
from fedfuse.errors import ConfigError, FedfuseError
from fedfuse.federation.certificates import Certificate, issue, make_authority
from fedfuse.privacy import disk
from fedfuse.privacy.signing import SigningKey

__all__ = ["SERVER_FILE", "ServerFile", "equip_server", "renew"]

SERVER_FILE = "server.toml"
_HOST = re.compile(r"[A-Za-z0-9._:-]{1,253}")
_TEXT = """\
# A fedfuse server. Relative paths begin at this file's folder; docs/server.md says more.

[superlink]
# What nodes connect to. The first is what they are told; all are in the certificate.
hosts = {hosts}
port = {port}
# Where the SuperLink listens. Flower guards only what nodes ask: whoever reaches this port can
# also start runs. So let a proxy stand before it that passes on /v1/fleet/ alone (docs/deploy/).
bind = {bind}
# What nodes are told, where a proxy stands at another port. Empty: the first host and the port.
address = ""
database = "state/superlink.db"

[tls]
# Made by `fedfuse server init`; or your own, from a real PKI: then the certificate must name
# 127.0.0.1 too, since the SuperLink's own processes connect to it there.
certificate = "tls/server.pem"
key = "tls/server.key"
authority = "tls/authority.pem"

[keys]
# Signs what nodes are asked; nodes list its public half under policy.servers.
signing = "signing.pem"

[places]
store = "store"
runs = "runs"
# Needed where updates come under masks: the file of identities that the nodes have.
peers = "peers.toml"

[metrics]
# Prometheus reads http://127.0.0.1:PORT/metrics there while the server is started. 0: nobody does.
port = 0
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _SuperLink:
    hosts: tuple[str, ...] = ()
    port: int = 9092
    bind: str = "127.0.0.1"
    address: str = ""
    database: str = "state/superlink.db"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tls:
    certificate: str = "tls/server.pem"
    key: str = "tls/server.key"
    authority: str = "tls/authority.pem"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Keys:
    signing: str = "signing.pem"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    store: str = "store"
    runs: str = "runs"
    peers: str = "peers.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Metrics:
    port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    superlink: _SuperLink = field(default_factory=_SuperLink)
    tls: _Tls = field(default_factory=_Tls)
    keys: _Keys = field(default_factory=_Keys)
    places: _Places = field(default_factory=_Places)
    metrics: _Metrics = field(default_factory=_Metrics)


@dataclass(frozen=True, slots=True)
class ServerFile:
    """The settings in a server.toml, checked, with the paths that follow from them."""

    folder: Path
    settings: _Settings

    @classmethod
    def read(cls, given: Path) -> ServerFile:
        """The server in a folder, or by its server.toml. Raises ConfigError."""
        path = given / SERVER_FILE if given.is_dir() else given
        tree = toml(path, missing="make a server with: fedfuse server init DIR --host NAME")
        found = typed(_Settings, tree, where=str(path))
        link = found.superlink
        for what in (
            *(f"superlink.hosts has {h!r}" for h in link.hosts if not _HOST.fullmatch(h)),
            *(() if link.hosts else ("superlink.hosts is empty: nodes connect to nothing",)),
            *(() if 0 < link.port < 65536 else (f"superlink.port = {link.port}",)),
            *(() if 0 <= found.metrics.port < 65536 else ("metrics.port is no port",)),
        ):
            raise ConfigError(what, where=str(path), hint="see docs/server.md")
        return cls(path.absolute().parent, found)

    def path(self, name: str) -> Path:
        """`name`, beginning at the server's folder if it is relative."""
        return self.folder / name

    @property
    def database(self) -> Path:
        """The SuperLink's."""
        return self.path(self.settings.superlink.database)

    @property
    def home(self) -> Path:
        """Flower's own folder."""
        return self.path("state")

    @property
    def runs(self) -> Path:
        """Where the runs' folders are."""
        return self.path(self.settings.places.runs)

    @property
    def store(self) -> Path:
        """Where the prepared test records are."""
        return self.path(self.settings.places.store)

    @property
    def registered(self) -> Path:
        """Which nodes may connect, by Flower's number."""
        return self.path("nodes.json")

    @property
    def peers(self) -> Path:
        """Which nodes' updates come under masks."""
        return self.path(self.settings.places.peers)

    @property
    def log(self) -> Path:
        """What the SuperLink says."""
        return self.path("superlink.log")

    @property
    def authority(self) -> Path:
        """The certificate that nodes get."""
        return self.path(self.settings.tls.authority)

    @property
    def address(self) -> str:
        """host:port, as nodes are told."""
        link = self.settings.superlink
        return link.address or f"{_bracketed(link.hosts[0])}:{link.port}"

    @property
    def local(self) -> str:
        """host:port, as this machine reaches the SuperLink."""
        link = self.settings.superlink
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        return f"{_bracketed(everywhere.get(link.bind, link.bind))}:{link.port}"

    def certificate(self) -> Certificate:
        """What the SuperLink shows. Raises FederationError."""
        tls = self.settings.tls
        return Certificate.read(
            self.path(tls.certificate), key=self.path(tls.key), authority=self.authority
        )

    def key(self) -> SigningKey:
        """What signs the requests. Raises PrivacyError."""
        return SigningKey.load(self.path(self.settings.keys.signing))


def equip_server(folder: Path, *, hosts: Sequence[str], port: int, bind: str) -> ServerFile:
    """Makes a server in `folder`. Raises FedfuseError; nothing is ever overwritten."""
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            "this folder is not empty: a server is never overwritten",
            where=str(folder),
            hint="take another folder; `fedfuse server renew` makes a new certificate in this one",
        )
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ConfigError(f"--host {host!r} is no name of a host and no address")
    try:
        for name in ("", "tls", "store", "runs", "state"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / name).chmod(0o700)
        text = _TEXT.format(hosts=json.dumps(list(hosts)), port=port, bind=json.dumps(bind))
        disk.create(folder / SERVER_FILE, text.encode())
        server = ServerFile.read(folder)
        make_authority(
            folder / "tls/authority.key", server.authority, name=f"fedfuse server {hosts[0]}"[:64]
        )
        renew(server)
        public = SigningKey.create(folder / "signing.pem").public
        disk.create(
            folder / "server.pub",
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            ),
        )
    except OSError as error:
        raise ConfigError(
            f"the server cannot be made: {error.strerror}",
            where=str(folder),
            hint=disk.remedy(error),
        ) from None
    return server


def renew(server: ServerFile, *, days: float | None = None) -> Certificate:
    """A new key and certificate, signed by the server's own authority: nodes change nothing.

    Raises FedfuseError.
    """
    tls = server.settings.tls
    authority_key = server.path("tls/authority.key")
    more = {} if days is None else {"days": days}
    try:
        issue(
            server.path(tls.key),
            server.path(tls.certificate),
            authority_key=authority_key,
            authority=server.authority,
            names=server.settings.superlink.hosts,
            **more,
        )
    except OSError as error:
        raise FedfuseError(
            f"the certificate cannot be written: {error.strerror}", hint=disk.remedy(error)
        ) from None
    return server.certificate()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
