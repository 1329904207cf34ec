"""The vault: the one process of a node that holds its data, keys, ledger, policy and model.

It lives as long as the node, so data is mapped, the model built and the ledger read once. Whoever
knocks at its door (see `door`) is taken for a stranger: a letter is read as strictly as a message
from a server, and answered by the same code as in a simulation (see `node`).
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from flwr.app import Context, RecordDict

import fedfuse
from fedfuse.config import RunConfig
from fedfuse.data.prepare import fingerprint_of, open_node
from fedfuse.errors import FederationError, PrivacyError, WireError
from fedfuse.federation.books import Books, LedgerBooks, SeededBooks, StateBooks
from fedfuse.federation.door import LOG, Door
from fedfuse.federation.framing import PACKAGE, Letter
from fedfuse.federation.masking.conduct import MESSAGE_TYPE
from fedfuse.federation.masking.peers import known_to, read_peers
from fedfuse.federation.masking.seat import Seat, StageReply
from fedfuse.federation.masking.unfinished import InMemory
from fedfuse.federation.node import Site, answer, refusal
from fedfuse.federation.nodefile import NodeFile
from fedfuse.federation.policy import REFUSED, scrubbed
from fedfuse.federation.spending import worst
from fedfuse.federation.wire import CONFIG, TrainReply, TrainRequest, config_digest
from fedfuse.privacy import disk
from fedfuse.privacy.ledger import Ledger
from fedfuse.privacy.signing import SigningKey
from fedfuse.train import idle_cores

__all__ = ["LOG", "STATUS", "Answered", "Vault", "serve"]

STATUS = "status.json"
"""Beside the socket, for the vault's own user alone."""
_log = logging.getLogger("fedfuse.node")
_MOST_LOG = 5 << 20
_OFFLINE = "HF_HUB_OFFLINE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What was asked, what was answered, and what it cost: for the node's own eyes."""

    time: str
    """RFC 3339, UTC."""
    server: str
    run: str
    round: int
    rounds: int
    """Empty and 0 where the request could not be read, or was about masks."""
    steps: int
    stage: str
    """Of masks; else empty."""
    status: str
    """As in a TrainReply, or "lost" where nobody took the answer: what it cost stays spent."""
    problem: str
    epsilon: float | None
    """All that was ever spent on the data; None where no figure holds."""
    epsilon_allowed: float | None
    seconds: float


class Vault:
    """A node by its own node.toml: reads it once, so what changes there counts from the next start.

    Raises ConfigError, DataError or LedgerError where the node cannot answer anything.
    """

    def __init__(self, path: Path) -> None:
        self.settings = NodeFile.read(path)
        self.policy = self.settings.rules()
        data = self.settings.data
        self._store = Path(data.store)
        known, _ = open_node(self._store, data.node)
        self.name = self.settings.name or known
        self._fingerprint = ""
        self._ledger: Ledger | None = None
        self._books: Books = StateBooks(Context(0, 0, {}, RecordDict(), {}))
        self._dataset = data.dataset
        file = self.settings.ledger
        if file.file:
            self._fingerprint = fingerprint_of(self._store, data.node)
            self._dataset = data.dataset or self._fingerprint
            self._ledger = Ledger.open(
                Path(file.file),
                key=Path(file.key) if file.key else None,
                anchor=Path(file.anchor) if file.anchor else None,
            )
            self._books = LedgerBooks(self._ledger, self._dataset, alone=not data.dataset)
        self._unfinished = InMemory()
        masks = self.settings.masks
        self._key: SigningKey | None = None
        self._identities: dict[str, str] = {}
        if masks.peers:
            self._key = SigningKey.load(Path(masks.key))
            peers = read_peers(Path(masks.peers))
            self._identities = known_to(self.name, self._key, peers, where=masks.peers)

    def hear(self, letter: Letter) -> TrainReply | StageReply:
        """The reply to a letter; never raises, and what it says of errors is scrubbed."""
        stage = _stage(letter) if letter.kind == MESSAGE_TYPE else ""
        try:
            _check_sender(letter)
            if stage:
                return self._masks(letter)
            if letter.kind != "train":  # a loss, a metric, a count: each would be a release
                raise PrivacyError(
                    "a node gives no metrics and answers no queries about its records"
                )
            site = self._site(letter)
            books = SeededBooks(self._books) if site.policy.noise_seed else self._books
            return answer(letter.record, site, books)
        except Exception as error:
            _log.warning("%s: %s", self.name, error, exc_info=error)
            if stage:
                return StageReply(stage=stage, problem=scrubbed(error))
            return refusal(error, self.name)

    def spent(self) -> float | None:
        """An upper bound on the epsilon of all that was ever spent on the data, at the policy's
        delta; None where no figure holds: no ledger, or data that was read without a promise."""
        if self._ledger is None or not 0 < self.policy.delta < 1:
            return None
        accounts = self._ledger.accounts()
        if any(account.exposed for account in accounts if account.dataset == self._dataset):
            return None
        found = worst([self._ledger.history(self._dataset)], self.policy.delta)
        return found if math.isfinite(found) else None

    def _site(self, letter: Letter) -> Site:
        data, device = self.settings.data, self.settings.device
        if self._fingerprint and fingerprint_of(self._store, data.node) != self._fingerprint:
            raise PrivacyError(
                "this node's records were changed while it was running",
                hint="start the node again",
            )
        config = RunConfig.from_flat(letter.settings)
        seed = config.privacy.noise_seed if self.settings.policy.seeded_noise else ""
        return Site(
            config=config.with_values({"train.device": device} if device else {}),
            policy=replace(self.policy, noise_seed=seed),
            store=self._store,
            index=data.node,
            name=self.name,
            seat=self._seat(config),
            idle=idle_cores(),
        )

    def _masks(self, letter: Letter) -> StageReply:
        """The answer to a stage of masks. Raises a FedfuseError where this node shares none."""
        seat = self._seat(RunConfig.from_flat(letter.settings))
        if seat is None or self.policy.secure_aggregation == REFUSED:
            raise PrivacyError(
                "this run shares no masks, or this node does not",
                hint="masks.peers and policy.secure_aggregation in node.toml",
            )
        return seat.answer(letter.record)

    def _seat(self, config: RunConfig) -> Seat | None:
        """The node's place in a run whose updates leave under masks, if it shares any."""
        if self._key is None or not config.federation.secure_aggregation:
            return None
        return Seat(
            name=self.name,
            key=self._key,
            identities=self._identities,
            digest=config_digest(config),
            clip_norm=config.privacy.clip_norm,
            unfinished=self._unfinished,
            servers=self.policy.servers,
            colluders=self.settings.masks.colluders,
        )


def serve(path: Path, tell: Callable[[Answered], None], ready: Callable[[Vault], None]) -> None:
    """Opens the door of the node by `path`, and answers until the process is told to end.

    tell   is called after each answer; ready, once the door is open

    Raises as `Vault` and `Door`.
    """
    vault = Vault(path)
    socket = Path(vault.settings.vault.socket)
    door = Door(
        socket,
        clients=vault.settings.clients(),
        most_bytes=vault.settings.most_bytes,
    )
    try:
        with _logging_to(socket.with_name(LOG)), _alone(vault.settings.vault.offline):
            import fedfuse.federation.preload  # noqa: F401  what a first request would wait for

            ready(vault)
            for visit in door.visits():
                began = time.monotonic()
                reply = vault.hear(visit.letter)
                taken = visit.answer(reply.to_record())
                seconds = time.monotonic() - began
                if isinstance(reply, TrainReply) or reply.problem or not taken:
                    _note(vault, _answered(vault, visit.letter, reply, taken, seconds), tell)
    finally:
        door.close()


def _stage(letter: Letter) -> str:
    """What a letter says that it is about in masks; empty where it says nothing of the kind."""
    told = letter.record.config_records.get(CONFIG)
    return str(told.get("stage", ""))[:40] if told is not None else ""


def _check_sender(letter: Letter) -> None:
    """Raises WireError where a bundle runs another fedfuse than this site installed.

    It finds a bundle that shadows fedfuse by mistake. One that lies about it is only a courier.
    """
    if letter.package != PACKAGE:
        _log.warning("an app bundle runs the fedfuse in %r", letter.package[:400])
        raise WireError(
            "the app bundle runs a fedfuse of its own, not the one that this site installed",
            hint="build the bundle with server/, clients/ and pyproject.toml alone",
        )
    if letter.version != fedfuse.__version__:
        raise WireError(
            f"the app bundle's process runs fedfuse {letter.version[:40]}, the vault "
            f"{fedfuse.__version__}",
            hint="start vault and SuperNode again",
        )


def _answered(
    vault: Vault, letter: Letter, reply: TrainReply | StageReply, taken: bool, seconds: float
) -> Answered:
    try:
        request = TrainRequest.from_record(letter.record)
        known = (request.server, request.run, request.round, request.rounds, request.job.steps)
    except Exception:  # not understood: the reply says why
        known = ("", "", 0, 0, 0)
    server, run, round, rounds, steps = known
    try:
        epsilon = vault.spent()
    except PrivacyError as error:
        _log.warning("what was spent cannot be told: %s", error)
        epsilon = None
    return Answered(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        server=server,
        run=run,
        round=round,
        rounds=rounds,
        steps=steps,
        stage=reply.stage if isinstance(reply, StageReply) else "",
        status=reply.status if taken else "lost",
        problem=reply.problem,
        epsilon=epsilon,
        epsilon_allowed=vault.policy.epsilon if vault.policy.epsilon > 0 else None,
        seconds=seconds,
    )


def _note(vault: Vault, answered: Answered, tell: Callable[[Answered], None]) -> None:
    """Tells of an answer, and leaves it for `fedfuse node status`."""
    try:
        disk.replace(
            Path(vault.settings.vault.socket).with_name(STATUS),
            json.dumps(asdict(answered)).encode(),
        )
    except OSError as error:
        _log.warning("the status cannot be written: %s", error.strerror)
    tell(answered)


@contextmanager
def _alone(offline: bool) -> Iterator[None]:
    """Lets the hub's client, which reads this when it is loaded, ask nobody."""
    before = os.environ.get(_OFFLINE)
    if offline:
        os.environ[_OFFLINE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_OFFLINE, None)
        if before is not None:
            os.environ[_OFFLINE] = before


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """The node's whole story, for its operator alone, in a file that does not fill the disk."""
    mask = os.umask(0o077)
    try:
        handler = RotatingFileHandler(path, maxBytes=_MOST_LOG, backupCount=2, encoding="utf-8")
    except OSError as error:
        raise FederationError(
            f"the log cannot be written: {error.strerror}", where=str(path)
        ) from None
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = list(_log.handlers), _log.propagate, _log.level
    _log.handlers[:], _log.propagate = [handler], False
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.handlers[:], _log.propagate = before[:2]
        _log.setLevel(before[2])
        handler.close()
        os.umask(mask)
