"""node.toml: what a real node's operator decides, and no server can change.

Its data, its ledger and its policy. Nothing here has a default that promises less: a node without a
promise, a ledger or a list of servers does not start; node.example.toml beside this file
has each setting.
"""

from __future__ import annotations

import math
import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedfuse.batch import TargetKind
from fedfuse.config import toml, typed
from fedfuse.errors import ConfigError
from fedfuse.federation.policy import ALLOWED, MASKS, OUTPUTS, REQUIRED, UPDATE, Policy
from fedfuse.privacy.signing import public_key
from fedfuse.privacy.spec import Unit

__all__ = ["NODE_FILE", "NodeFile", "node_file", "superlink"]

NODE_FILE = "node.toml"

ANY = "any"
_HEADINGS = 16 << 20
"""Bytes of a request besides its weights (float32): each array has a heading of 128."""
_KEY = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Data:
    store: str = ""
    """Where the prepared data lies, and which of the nodes in there this one is."""
    node: int = 0
    dataset: str = ""
    """What the ledger calls the data. Empty: a fingerprint of the records."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ledger:
    file: str = ""
    key: str = ""
    anchor: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Policy:
    unit: str = "record"
    max_epsilon: float = 0.0
    delta: float = 0.0
    min_noise_multiplier: float = 0.3
    max_sample_rate: float = 1.0
    max_clip_norm: float = 1000.0
    max_rounds: int = 1000
    max_steps: int = 100_000
    max_parameters: int = 100_000_000
    tasks: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    outputs: tuple[str, ...] = (UPDATE,)
    trust_server: bool = False
    records_are_units: bool = False
    secure_aggregation: str = ALLOWED
    seeded_noise: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Masks:
    key: str = ""
    """The private key by which the other nodes know this one."""
    peers: str = ""
    """Their public keys, see `masking.peers`. Empty: this node shares no masks."""
    colluders: int = 1
    """How many of them may work together with the server: a round that stands fewer is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vault:
    socket: str = "door/vault.sock"
    """Where the vault is reached. It makes the folder, or wants it to be its own alone."""
    clients: tuple[str, ...] = ()
    """The users, by name or number, who may ask it. Empty: only the one that runs it."""
    max_megabytes: int = 0
    """The largest request; eight may be in memory at once. 0: what a model of
    policy.max_parameters takes."""
    offline: bool = True
    """Model weights come from this machine's disk alone: no hub is asked for any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Superlink:
    address: str = ""
    """host:port of the server's Fleet API."""
    ca: str = ""
    """The certificate that vouches for the server's, in PEM."""
    key: str = ""
    """The private key by which the server knows this node: P-384, in OpenSSH's format."""
    insecure: bool = False
    """No TLS and no key: for trials on one machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFile:
    """The settings in a node.toml, checked."""

    name: str = ""
    """What servers call the node. Empty: as the prepared data does."""
    device: str = ""
    data: _Data = field(default_factory=_Data)
    ledger: _Ledger = field(default_factory=_Ledger)
    policy: _Policy = field(default_factory=_Policy)
    masks: _Masks = field(default_factory=_Masks)
    vault: _Vault = field(default_factory=_Vault)
    superlink: _Superlink = field(default_factory=_Superlink)

    @classmethod
    def read(cls, path: Path) -> NodeFile:
        """The settings in `path`. Raises ConfigError, also where there is no promise."""
        tree = toml(path, missing="`fedfuse node init` makes one")
        found = typed(cls, tree, where=str(path))
        for what, hint in found._faults():
            raise ConfigError(what, where=str(path), hint=hint)
        return found._from(path.absolute().parent)

    def _from(self, folder: Path) -> NodeFile:
        """The same with relative paths beginning at `folder`, where the file lies."""

        def absolute(name: str) -> str:
            return str(folder / name) if name else ""

        servers = (
            name if name == ANY or _KEY.fullmatch(name) else absolute(name)
            for name in self.policy.servers
        )
        return replace(
            self,
            data=replace(self.data, store=absolute(self.data.store)),
            ledger=_Ledger(
                file=absolute(self.ledger.file),
                key=absolute(self.ledger.key),
                anchor=absolute(self.ledger.anchor),
            ),
            policy=replace(self.policy, servers=tuple(servers)),
            masks=replace(
                self.masks, key=absolute(self.masks.key), peers=absolute(self.masks.peers)
            ),
            vault=replace(self.vault, socket=absolute(self.vault.socket)),
            superlink=replace(
                self.superlink,
                ca=absolute(self.superlink.ca),
                key=absolute(self.superlink.key),
            ),
        )

    def rules(self) -> Policy:
        """The policy. Raises PrivacyError where a server's key cannot be read."""
        policy, servers = self.policy, self.policy.servers
        return Policy(
            unit=Unit(policy.unit),
            epsilon=policy.max_epsilon,
            delta=policy.delta,
            trust_server=policy.trust_server,
            records_are_units=policy.records_are_units,
            min_noise_multiplier=policy.min_noise_multiplier,
            max_sample_rate=policy.max_sample_rate,
            max_clip_norm=policy.max_clip_norm,
            max_rounds=policy.max_rounds,
            max_steps=policy.max_steps,
            max_parameters=policy.max_parameters,
            tasks=frozenset(policy.tasks) or None,
            modalities=frozenset(policy.modalities) or None,
            servers=None if servers == (ANY,) else frozenset(map(public_key, servers)),
            outputs=frozenset(policy.outputs),
            secure_aggregation=policy.secure_aggregation,
        )

    def clients(self) -> frozenset[int]:
        """The users who may ask the vault, by number. Raises ConfigError on an unknown one."""
        return frozenset(map(_user, self.vault.clients)) or frozenset({os.geteuid()})

    @property
    def most_bytes(self) -> int:
        """Of the arrays in a request that the vault takes."""
        own = self.vault.max_megabytes << 20
        return own or 4 * self.policy.max_parameters + _HEADINGS

    @property
    def fitting_parameters(self) -> int:
        """How many parameters a model can have that comes through the vault's door."""
        return max(0, self.most_bytes - _HEADINGS) // 4

    def _faults(self) -> Iterator[tuple[str, str]]:
        """(what, hint) of each setting that is missing or out of range."""
        policy = self.policy
        if not self.data.store:
            yield "data.store is missing", "say where the prepared data lies"
        if self.data.node < 0:
            yield f"data.node = {self.data.node}, but it must be 0 or more", ""
        if policy.unit not in tuple(Unit):
            yield f"policy.unit = {policy.unit!r}, but it must be one of {', '.join(Unit)}", ""
        promises = policy.unit != Unit.NONE
        if promises and not (0 < policy.max_epsilon < math.inf and 0 < policy.delta < 1):
            yield (
                "the node's settings hold no promise",
                'set policy.max_epsilon and policy.delta, or policy.unit = "none" where nothing '
                "has to be protected",
            )
        if promises and not self.ledger.file:
            yield (
                "ledger.file is missing: what is spent has to be written down",
                "make one with `fedfuse ledger init FILE --node NAME --key KEY --anchor FILE`",
            )
        if not policy.servers or (ANY in policy.servers and len(policy.servers) > 1):
            yield (
                "policy.servers must name the servers that are answered",
                'give their public keys, or ["any"] for whoever reaches this node',
            )
        for name, found, known in (
            ("tasks", policy.tasks, tuple(TargetKind)),
            ("outputs", policy.outputs, OUTPUTS),
        ):
            if unknown := [word for word in found if word not in known]:
                yield f"policy.{name} has {unknown[0]!r}", f"it may hold {', '.join(known)}"
        masks = self.masks
        if policy.secure_aggregation not in MASKS:
            yield (
                f"policy.secure_aggregation = {policy.secure_aggregation!r}",
                (f"it may be {', '.join(MASKS)}"),
            )
        if policy.secure_aggregation == REQUIRED and policy.unit not in (Unit.NODE, Unit.NONE):
            yield (
                f'policy.secure_aggregation = "{REQUIRED}", but updates of unit "{policy.unit}" '
                "carry all their noise and never leave under masks",
                'take unit "node", or "allowed"',
            )
        if policy.secure_aggregation == REQUIRED and not masks.peers:
            yield (
                f'policy.secure_aggregation = "{REQUIRED}", but masks.peers is missing',
                "name the file with the other nodes' identities, see docs/secure-aggregation.md",
            )
        if masks.peers and not masks.key:
            yield "masks.peers is given, but masks.key is missing", "see node.example.toml"
        if masks.colluders < 0:
            yield f"masks.colluders = {masks.colluders}, but it must be 0 or more", ""
        if not 0 <= self.vault.max_megabytes <= 1 << 20:
            yield (
                f"vault.max_megabytes = {self.vault.max_megabytes}, but it must be 0 or more",
                "0 is what a model of policy.max_parameters takes",
            )
        if not self.vault.socket:
            yield "vault.socket is missing", "say where the vault's socket is to lie"
        for name, value in (
            ("min_noise_multiplier", policy.min_noise_multiplier),
            ("max_sample_rate", policy.max_sample_rate),
            ("max_clip_norm", policy.max_clip_norm),
            ("max_rounds", policy.max_rounds),
            ("max_steps", policy.max_steps),
            ("max_parameters", policy.max_parameters),
        ):
            if not 0 <= value < math.inf:
                yield f"policy.{name} = {value}, but it must be a number from 0 on", ""


def node_file(given: Path) -> Path:
    """The node.toml that is meant by a folder, or by the file itself."""
    return given / NODE_FILE if given.is_dir() else given


def superlink(address: str) -> tuple[str, int]:
    """Host and port of an address. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"superlink.address = {address!r} is no host:port",
            hint="ask the server's operator for the address of its Fleet API",
        )
    return host.strip("[]"), int(port)


def _user(name: str) -> int:
    """The number of a user. Raises ConfigError."""
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ConfigError(
            f"there is no user {name!r} on this machine",
            where="vault.clients",
            hint="make the user that is to run the SuperNode, or name another one",
        ) from None
