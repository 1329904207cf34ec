"""Whether a node is ready to be started: one look at each thing that could be wrong."""

from __future__ import annotations

import os
import shutil
import ssl
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from importlib import metadata
from pathlib import Path

from cryptography import x509

import fedfuse
from fedfuse.data.prepare import fingerprint_of, open_node
from fedfuse.errors import ConfigError, FederationError, FedfuseError, PrivacyError
from fedfuse.federation.door import is_guarded
from fedfuse.federation.masking.peers import known_to, read_peers
from fedfuse.federation.newnode import node_key, node_name
from fedfuse.federation.nodefile import NodeFile, superlink
from fedfuse.federation.processes import program
from fedfuse.federation.vault import Vault
from fedfuse.privacy.ledger import Ledger
from fedfuse.privacy.signing import SigningKey

__all__ = ["NOTE", "OK", "WRONG", "Look", "inspect"]

OK, NOTE, WRONG = "ok", "note", "wrong"
_LOW_DISK = 1 << 30
_SOON = timedelta(days=30)
_SLACK = timedelta(minutes=2)
"""Clocks that are this far apart are taken for right."""
_KNOCK_S = 5.0

_Found = tuple[str, str, str]
"""The state, what was found, and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One thing that was looked at."""

    name: str
    state: str
    """OK; NOTE: it works, but read it; WRONG: the node does not work, or not safely."""
    found: str
    remedy: str = ""


def inspect(path: Path, *, online: bool = True) -> Iterator[Look]:
    """Each thing of the node by `path`, in the order in which to mend them.

    online  knock at the server too, and see whether its certificate holds
    """
    yield _looked("versions", _versions)
    try:
        settings = NodeFile.read(path)
        settings.rules()
    except FedfuseError as error:
        yield _wrong("node.toml", error)
        return
    looks: dict[str, Callable[[], _Found]] = {
        "node.toml": lambda: _node_file(path, settings),
        "data": lambda: _data(settings),
        "ledger": lambda: _ledger(settings),
        "budget": lambda: _budget(path, settings),
        "masks": lambda: _masks(settings),
        "vault": lambda: _vault(settings),
        "requests": lambda: _requests(settings),
        "device": lambda: _device(settings),
        "disk": lambda: _disk(path),
        "clock": lambda: _clock(settings),
    }
    if settings.superlink.insecure:
        looks["server"] = lambda: (
            NOTE,
            "superlink.insecure: no TLS, no key",
            "for trials on one machine only: whoever is on the way reads and changes everything",
        )
    else:
        looks |= {
            "node's key": lambda: _node_key(settings),
            "certificate": lambda: _certificate(settings),
        }
        if online:
            looks["server"] = lambda: _server(settings)
    for name, look in looks.items():
        yield _looked(name, look)


def _looked(name: str, look: Callable[[], _Found]) -> Look:
    try:
        state, found, remedy = look()
    except FedfuseError as error:
        return _wrong(name, error)
    return Look(name=name, state=state, found=found, remedy=remedy)


def _wrong(name: str, error: FedfuseError) -> Look:
    found = f"{error.where}: {error.what}" if error.where else error.what
    return Look(name=name, state=WRONG, found=found, remedy=error.hint)


def _versions() -> _Found:
    program("flower-supernode")
    return OK, f"fedfuse {fedfuse.__version__}, flwr {metadata.version('flwr')}", ""


def _node_file(path: Path, settings: NodeFile) -> _Found:
    if stat.S_IMODE(path.stat().st_mode) & 0o022:
        return WRONG, f"others may write {path}", f"chmod 600 {path}"
    if "any" in settings.policy.servers:
        return NOTE, "whoever reaches this node is answered", "name servers in policy.servers"
    if settings.policy.unit == "none":
        return NOTE, 'NOT PRIVATE: policy.unit = "none"', "only where nothing has to be protected"
    if settings.policy.seeded_noise:
        return (
            NOTE,
            "NOT PRIVATE where a run has a noise seed: policy.seeded_noise",
            "for trials only: set it to false",
        )
    promise = f"epsilon = {settings.policy.max_epsilon:g}, delta = {settings.policy.delta:g}"
    return OK, f'unit "{settings.policy.unit}", {promise}', ""


def _data(settings: NodeFile) -> _Found:
    store = Path(settings.data.store)
    if not store.exists():
        raise ConfigError(
            "no data is prepared", where=str(store), hint="fedfuse node prepare NODE MANIFEST"
        )
    name, records = open_node(store, settings.data.node)
    if stat.S_IMODE(store.stat().st_mode) & 0o077:
        return WRONG, f"others may enter {store}", f"chmod 700 {store}"
    modalities = ", ".join(records.schema.names)
    return OK, f"{settings.name or name}: {len(records):,} records of {modalities}", ""


def _ledger(settings: NodeFile) -> _Found:
    file = settings.ledger
    if not file.file:
        return NOTE, "none", "nothing is promised, and nothing written down"
    ledger = _open(settings)
    if file.key:
        SigningKey.load(Path(file.key))
    dataset = settings.data.dataset
    if not dataset:
        own = fingerprint_of(Path(settings.data.store), settings.data.node)
        others = set(ledger.datasets()) - {own}
        if others:
            return (
                WRONG,
                "it knows other records than these",
                f"if records were added or changed, set data.dataset = {min(others)!r}",
            )
    if ledger.problems:
        return NOTE, "; ".join(ledger.problems), "a process was stopped while it wrote"
    if not file.anchor:
        return NOTE, f"{ledger.id}, no anchor", "ledger.anchor shows when an old copy is put back"
    return OK, f"{ledger.id}, signed and anchored" if file.key else ledger.id, ""


def _budget(path: Path, settings: NodeFile) -> _Found:
    if settings.policy.unit == "none":
        return OK, "no budget: nothing is promised", ""
    found, most, delta = Vault(path).spent(), settings.policy.max_epsilon, settings.policy.delta
    if found is None:
        return WRONG, "no figure holds for these records", "they were read without a promise"
    from fedfuse.privacy.accounting import shown

    text = f"epsilon {shown(found)} of {most:g} spent (delta = {delta:g})"
    if found >= most:
        return WRONG, text, "nothing is left to spend on these records"
    return OK, text, ""


def _masks(settings: NodeFile) -> _Found:
    masks, rule = settings.masks, settings.policy.secure_aggregation
    if not masks.peers:
        return OK, f"none are shared, as masks.peers is empty; {rule}", ""
    key, peers = SigningKey.load(Path(masks.key)), Path(masks.peers)
    known = known_to(node_name(settings), key, read_peers(peers), where=masks.peers)
    if stat.S_IMODE(peers.stat().st_mode) & 0o022:
        return WRONG, f"others may write {peers}", f"chmod 644 {peers}"
    found = f"{rule}, with {len(known) - 1} other nodes; this one is {key.public[:12]}..."
    if len(known) <= masks.colluders + 2:
        return NOTE, found, f"too few for masks.colluders = {masks.colluders}"
    return OK, found, ""


def _vault(settings: NodeFile) -> _Found:
    users, folder = settings.clients(), Path(settings.vault.socket).parent
    if folder.exists() and stat.S_IMODE(folder.stat().st_mode) & 0o027:
        return WRONG, f"others may enter or write {folder}", f"chmod 750 {folder}"
    state = "running" if is_guarded(folder) else "not running"
    if os.geteuid() in users:
        return (
            NOTE,
            f"{state}; the SuperNode runs as the vault's own user",
            "the app bundle that a server sends can read what this user can: give the SuperNode a "
            "user of its own (vault.clients, docs/deploy/)",
        )
    return OK, f"{state}; open to user {', '.join(map(str, sorted(users)))}", ""


def _requests(settings: NodeFile) -> _Found:
    allowed, fitting = settings.policy.max_parameters, settings.fitting_parameters
    found = f"models of up to {min(allowed, fitting):,} parameters"
    if fitting < allowed:
        return (
            NOTE,
            f"{found}: larger ones do not fit into vault.max_megabytes = "
            f"{settings.vault.max_megabytes}, though policy.max_parameters = {allowed:,}",
            "set vault.max_megabytes = 0, which takes what the policy allows, or lower "
            "policy.max_parameters",
        )
    return OK, found, ""


def _device(settings: NodeFile) -> _Found:
    from fedfuse.train import pick_device

    device = pick_device(settings.device or "auto")
    return OK, str(device), ""


def _disk(path: Path) -> _Found:
    free = shutil.disk_usage(path.absolute().parent).free
    found = f"{free / (1 << 30):.1f} GiB free"
    if free < _LOW_DISK:
        return NOTE, found, "a ledger that cannot be written stops the node: free some space"
    return OK, found, ""


def _clock(settings: NodeFile) -> _Found:
    """Against what is known to be past: the ledger's last line, the certificate's beginning."""
    now, past = datetime.now(UTC), []
    if settings.ledger.file:
        last = max((e.time for e in _open(settings).entries()), default="")
        if last:
            past.append(("the ledger's last line", datetime.fromisoformat(last)))
    if not settings.superlink.insecure and Path(settings.superlink.ca).is_file():
        past.append(("the certificate", _read_certificate(settings).not_valid_before_utc))
    for what, time in past:
        if time > now + _SLACK:
            return WRONG, f"it is {now:%F %T} here, but {what} is of {time:%F %T}", "set the clock"
    return OK, f"{now:%F %T} UTC, after {' and '.join(w for w, _ in past) or 'nothing known'}", ""


def _node_key(settings: NodeFile) -> _Found:
    path = Path(settings.superlink.key)
    if not settings.superlink.key:
        raise ConfigError("superlink.key is missing", hint="`fedfuse node init` makes one")
    if not path.exists() and os.geteuid() not in settings.clients():
        return NOTE, "not looked at: it is with the SuperNode's user", ""
    key = node_key(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        return WRONG, f"others may read {path}", f"chmod 600 {path}"
    return OK, f"{key.curve.name}; its public half must be registered at the server", ""


def _certificate(settings: NodeFile) -> _Found:
    found, now = _read_certificate(settings), datetime.now(UTC)
    until = f"until {found.not_valid_after_utc:%F}"
    if now > found.not_valid_after_utc:
        return WRONG, f"it was valid {until}", "ask the server's operator for the new one"
    if now + _SOON > found.not_valid_after_utc:
        return NOTE, f"valid {until} only", "ask the server's operator for the next one"
    return OK, f"{found.subject.rfc4514_string()}, {until}", ""


def _read_certificate(settings: NodeFile) -> x509.Certificate:
    path = Path(settings.superlink.ca)
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no certificate in PEM"
        raise ConfigError(
            f"superlink.ca cannot be read: {why}",
            where=str(path),
            hint="ask the server's operator for the certificate, and compare its fingerprint",
        ) from None


def _server(settings: NodeFile) -> _Found:
    """Whether the server answers with a certificate for its host that superlink.ca vouches for, and
    its clock agrees with this one: what a node is asked has a deadline."""
    host, port = superlink(settings.superlink.address)
    context = ssl.create_default_context(cafile=settings.superlink.ca)
    line = HTTPSConnection(host, port, timeout=_KNOCK_S, context=context)
    try:
        with closing(line):
            line.request("GET", "/health")
            date = line.getresponse().getheader("Date", "")
    except ssl.SSLCertVerificationError as error:
        raise FederationError(
            f"{host}:{port} shows a certificate that does not hold: {error.verify_message}",
            hint="compare superlink.address and superlink.ca with what its operator gave you",
        ) from None
    except ssl.SSLError as error:
        raise FederationError(
            f"{host}:{port} speaks no TLS ({error.reason})", hint="is this the Fleet API's port?"
        ) from None
    except OSError as error:
        raise FederationError(
            f"{host}:{port} does not answer ({error.strerror or error})",
            hint="is it up, and does a firewall let this node out?",
        ) from None
    except HTTPException as error:
        raise FederationError(
            f"{host}:{port} gives no answer that can be read ({type(error).__name__})",
            hint="is this the Fleet API's port?",
        ) from None
    now, answers = datetime.now(UTC), f"{host}:{port} answers, and is who it should be"
    try:
        there = parsedate_to_datetime(date)
    except ValueError:
        return NOTE, f"{answers}, but does not say what time it is", ""
    if abs(now - there) > _SLACK:
        return (
            WRONG,
            f"it is {now:%F %T} here, but {there:%F %T} at the server",
            "set the clock that is wrong: a round that seems to be over is not answered",
        )
    return OK, answers, ""


def _open(settings: NodeFile) -> Ledger:
    file = settings.ledger
    try:
        return Ledger.open(
            Path(file.file),
            key=Path(file.key) if file.key else None,
            anchor=Path(file.anchor) if file.anchor else None,
        )
    except PrivacyError as error:
        error.hint = error.hint or "fedfuse ledger verify LEDGER says more"
        raise
