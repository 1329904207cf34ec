"""Real nodes by their node.toml, all in one process, and a server's grid over their vaults."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from flwr.app import Context, Message, RecordDict

from fedfuse.config import RunConfig
from fedfuse.data.prepare import prepare
from fedfuse.federation import forward, server
from fedfuse.federation.flower import MessageGrid, received, with_id
from fedfuse.federation.forward import make_forwarder
from fedfuse.federation.framing import Letter, receive, send
from fedfuse.federation.masking.peers import identity_line
from fedfuse.federation.vault import Vault
from fedfuse.privacy.ledger import Ledger
from fedfuse.privacy.signing import SigningKey


def by_door(letter: Letter) -> Letter:
    """The letter as it comes out at the other side of the door."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, letter, seconds=5)
        return receive(theirs, most_bytes=1 << 20, head_s=5, rate=1e6)


class Consortium:
    """Nodes 101, 102, ... named site-1, site-2, ..., whose operators exchanged their identities."""

    def __init__(
        self, folder: Path, config: RunConfig, n: int = 4, *, colluders: int = 0, **policy: Any
    ) -> None:
        self.folder, self.config = folder, config
        folder.mkdir(parents=True, exist_ok=True)
        prepare(config.data, seed=0, fingerprints=True).write(folder / "store")
        self.server = SigningKey.create(folder / "server.pem")
        self.names = {101 + i: f"site-{1 + i}" for i in range(n)}
        self.keys = {name: self._key(name) for name in self.names.values()}
        self.identities = {name: key.public for name, key in self.keys.items()}
        self.write_peers()
        registered = {str(number): {"name": name} for number, name in self.names.items()}
        (folder / "nodes.json").write_text(json.dumps(registered))
        for index, name in enumerate(self.names.values()):
            self._equip(name, index, colluders, policy)
        self._vaults: dict[int, Vault] = {}

    def write_peers(self) -> None:
        lines = (identity_line(name, key) for name, key in self.identities.items())
        (self.folder / "peers.toml").write_text("\n".join(lines))

    def vault(self, number: int = 101) -> Vault:
        if number not in self._vaults:
            self._vaults[number] = Vault(self.folder / self.names[number] / "node.toml")
        return self._vaults[number]

    def kill(self, number: int) -> None:
        """The vault's process ends; the next message meets a new one."""
        self._vaults.pop(number, None)

    def ledger(self, number: int = 101) -> Ledger:
        """Opened anew, so that all of it is read from the disk."""
        return Ledger.open(self.folder / self.names[number] / "ledger")

    def hear(self, number: int, record: RecordDict, kind: str = "query", **more: Any) -> RecordDict:
        """What leaves the node's vault, as it leaves its door."""
        letter = Letter(kind=kind, record=record, settings=self.config.to_flat(), **more)
        return self.answered(number, letter).record

    def answered(self, number: int, letter: Letter) -> Letter:
        """The vault's answer to a letter; both cross its door."""
        reply = self.vault(number).hear(by_door(letter))
        return by_door(Letter(kind="reply", record=reply.to_record()))

    def run(
        self,
        monkeypatch: pytest.MonkeyPatch,
        name: str = "run",
        befalls: Callable[[int, str], None] = lambda number, stage: None,
    ) -> dict[str, Any]:
        """The summary of a run over these nodes; `befalls` is called before each message."""
        for variable, value in (
            ("FEDFUSE_STORE", "store"), ("FEDFUSE_OUT", name), ("FEDFUSE_KEY", "server.pem"),
            ("FEDFUSE_PEERS", "peers.toml"), ("FEDFUSE_NODES", "nodes.json"),
        ):  # fmt: skip
            monkeypatch.setenv(variable, str(self.folder / value))
        server.serve(VaultGrid(self, monkeypatch, befalls), self.config)
        summary: dict[str, Any] = json.loads((self.folder / name / "summary.json").read_text())
        return summary

    def _key(self, name: str) -> SigningKey:
        (self.folder / name).mkdir()
        return SigningKey.create(self.folder / name / "identity.pem")

    def _equip(self, name: str, index: int, colluders: int, policy: dict[str, Any]) -> None:
        node, privacy = self.folder / name, self.config.privacy
        Ledger.create(node / "ledger", node=name)
        tree = {
            "name": name,
            "data": {"store": "../store", "node": index},
            "ledger": {"file": "ledger"},
            "masks": {"key": "identity.pem", "peers": "../peers.toml", "colluders": colluders},
            "policy": {
                "unit": privacy.unit,
                "max_epsilon": privacy.epsilon,
                "delta": privacy.delta,
                "servers": [self.server.public],
            }
            | policy,
        }
        (node / "node.toml").write_text(tomli_w.dumps(tree))


class VaultGrid(MessageGrid):
    """A server's view of a consortium, whose nodes answer at once, each by its bundle's app."""

    def __init__(
        self,
        nodes: Consortium,
        monkeypatch: pytest.MonkeyPatch,
        befalls: Callable[[int, str], None] = lambda number, stage: None,
    ) -> None:
        self._nodes, self._befalls = nodes, befalls
        self._app, self._replies = make_forwarder(), dict[str, Message]()
        monkeypatch.setattr(forward, "forwarded", self._forwarded)

    def _forwarded(self, path: Path, letter: Letter) -> Letter:
        return self._nodes.answered(int(path.name), letter)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            metadata = with_id(message).metadata
            number, kind = metadata.dst_node_id, metadata.message_type
            told = message.content.config_records["config"]
            self._befalls(number, str(told.get("stage", kind)))
            settings = self._nodes.config.to_flat()
            context = Context(1, number, {"vault": f"/{number}"}, RecordDict(), settings)
            ids.append(metadata.message_id)
            self._replies[ids[-1]] = self._app(received(message.content, metadata), context)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(one) for one in message_ids if one in self._replies]

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def get_node_ids(self) -> Iterable[int]:
        """Under masks one more than are known to each other."""
        masked = self._nodes.config.federation.secure_aggregation
        return [*self._nodes.names, *([999] if masked else [])]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        raise NotImplementedError
