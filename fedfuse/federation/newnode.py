"""What a new node has: a folder with its settings, its ledger and its keys.

    node.toml       the operator's decisions, see `nodefile`
    ledger          with nothing spent, and ledger.pem, the key that signs it
    identity.pem    by which other nodes know it where updates leave under masks
    supernode.key   by which the server knows the node: P-384, OpenSSH, as Flower wants it
    supernode.pub   its public half, to be registered at the server
    ca.pem          what vouches for the server; a copy of the one that was named
    store/          the prepared records, see `fedfuse node prepare`

All of it is for its owner's eyes alone, and nothing is ever overwritten.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedfuse.config import RunConfig
from fedfuse.data.prepare import Prepared, open_node, prepare
from fedfuse.errors import ConfigError, FederationError, FedfuseError
from fedfuse.federation.door import is_guarded
from fedfuse.federation.masking.peers import identity_line
from fedfuse.federation.nodefile import NODE_FILE, NodeFile
from fedfuse.privacy import disk
from fedfuse.privacy.ledger import Ledger
from fedfuse.privacy.signing import SigningKey, public_key

__all__ = [
    "Equipment",
    "equip",
    "node_key",
    "node_name",
    "own_identity",
    "prepared_store",
]

_TEMPLATE = Path(__file__).with_name("node.example.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Equipment:
    """What a new node is to be."""

    name: str
    unit: str
    max_epsilon: float
    delta: float
    servers: tuple[str, ...]
    """Public keys, or PEM files that hold them; or "any"."""
    address: str
    """host:port of the server's Fleet API."""
    ca: Path | None = None
    anchor: Path | None = None
    clients: tuple[str, ...] = ()
    socket: Path | None = None
    insecure: bool = False


def equip(folder: Path, what: Equipment) -> str:
    """Makes the node in `folder`; its public key, in the one line that is registered at a server.

    Raises FedfuseError, and then leaves nothing that was not there before.
    """
    existed = folder.exists()
    if existed and any(folder.iterdir()):
        raise ConfigError(
            "this folder is not empty: a node is never overwritten",
            where=str(folder),
            hint="take another folder, or go on with the node that is there",
        )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        return _equip(folder, what)
    except (OSError, FedfuseError) as error:
        for path in folder.glob("*"):
            path.unlink()
        if not existed and folder.exists():
            folder.rmdir()
        if isinstance(error, OSError):
            raise ConfigError(
                f"the node cannot be made: {error.strerror}",
                where=str(folder),
                hint=disk.remedy(error),
            ) from None
        raise


def prepared_store(path: Path, manifest: Path, scenario: Path | None) -> Prepared:
    """Decodes a node's records, and puts them where its node.toml says, in the place of others.

    scenario  the run's configuration, whose section data says how records are decoded

    Raises DataError, and FederationError while the node is running.
    """
    settings = NodeFile.read(path)
    if is_guarded(Path(settings.vault.socket).parent):
        raise FederationError(
            "the node is running, and reads its records", where=str(path), hint="stop it first"
        )
    if settings.data.node != 0:
        raise ConfigError(
            f"data.node = {settings.data.node}, but a store that is prepared here has node 0 alone",
            where=str(path),
        )
    config = RunConfig() if scenario is None else RunConfig.from_toml(scenario)
    named = replace(config.data, manifest=str(manifest))
    prepared = prepare(named, seed=config.seed, fingerprints=True, part="node")
    prepared.replace(Path(settings.data.store))
    return prepared


def node_name(settings: NodeFile) -> str:
    """What servers and other nodes call the node. Raises DataError where only its data knows it."""
    return settings.name or open_node(Path(settings.data.store), settings.data.node)[0]


def own_identity(settings: NodeFile) -> tuple[str, bool]:
    """The node's line in the files of its peers, and whether its key was made just now.

    Raises ConfigError where node.toml names no key, PrivacyError where it cannot be had.
    """
    if not settings.masks.key:
        raise ConfigError("masks.key is missing", hint='set key = "identity.pem" under [masks]')
    path = Path(settings.masks.key)
    new = not path.exists()
    key = SigningKey.create(path) if new else SigningKey.load(path)
    return identity_line(node_name(settings), key.public), new


def node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The key by which a server knows the node. Raises ConfigError."""
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not in OpenSSH's format"
        raise ConfigError(f"the node's key cannot be read: {why}", where=str(path)) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError("it holds no key on a NIST curve", where=str(path))
    return key


def _equip(folder: Path, what: Equipment) -> str:
    servers = [name if name == "any" else public_key(name) for name in what.servers]
    settings: dict[str, dict[str, Any]] = {
        "": {"name": what.name},
        "data": {"store": "store"},
        "ledger": {
            "file": "ledger",
            "key": "ledger.pem",
            "anchor": str(what.anchor.absolute()) if what.anchor else "",
        },
        "policy": {
            "unit": what.unit,
            "max_epsilon": what.max_epsilon,
            "delta": what.delta,
            "servers": servers,
        },
        "vault": {"clients": list(what.clients)}
        | ({"socket": str(what.socket)} if what.socket else {}),
        "superlink": {"address": what.address, "insecure": what.insecure},
    }
    disk.create(folder / NODE_FILE, _filled(_TEMPLATE.read_text(), settings).encode())
    NodeFile.read(folder / NODE_FILE)  # whatever is wrong with what was given is told now
    if what.ca is not None:
        disk.create(folder / "ca.pem", what.ca.read_bytes())
    line = _make_key(folder / "supernode.key", what.name)
    disk.create(folder / "supernode.pub", line.encode() + b"\n")
    SigningKey.create(folder / "ledger.pem")
    SigningKey.create(folder / "identity.pem")
    Ledger.create(folder / "ledger", node=what.name, key=folder / "ledger.pem", anchor=what.anchor)
    return line


def _make_key(path: Path, name: str) -> str:
    """A new key, in a new file; its public half in OpenSSH's format."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    disk.create(path, private)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return f"{public.decode()} {'-'.join(name.split())}"


def _filled(text: str, settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The example with these settings; one that is commented out there is set too."""
    section, lines, left = "", [], {(s, k) for s, held in settings.items() for k in held}
    for line in text.splitlines():
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = heading.group(1)
        found = re.match(r"(?:# )?(\w+) = ", line)
        key = (section, found.group(1)) if found else None
        if key in left:
            left.discard(key)
            line = f"{key[1]} = {json.dumps(settings[section][key[1]], ensure_ascii=False)}"
        lines.append(line)
    assert not left, left  # the example names each setting, as a test says
    return "\n".join(lines) + "\n"
