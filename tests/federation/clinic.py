"""A real node as its operator sets it up: data, key, ledger, anchor and node.toml in one folder."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from flwr.app import ConfigRecord, RecordDict

from fedfuse.config import RunConfig
from fedfuse.data.prepare import open_node, prepare
from fedfuse.federation import node
from fedfuse.federation.framing import Letter
from fedfuse.federation.node import new_trainer
from fedfuse.federation.rounds import job_of
from fedfuse.federation.settle import settle
from fedfuse.federation.vault import Vault
from fedfuse.federation.wire import TrainRequest, config_digest, encode, signed
from fedfuse.models.model import count_parameters
from fedfuse.privacy.ledger import Ledger
from fedfuse.privacy.signing import SigningKey


@dataclass
class Clinic:
    """The node in `folder`, and a server that it answers."""

    folder: Path
    config: RunConfig
    server: SigningKey
    vault: Vault | None = None
    """Opened by the first request."""

    @classmethod
    def open(cls, folder: Path, config: RunConfig, **policy: Any) -> Clinic:
        """Prepares everything; `policy` changes the settings of that section. Its server's
        configuration has no noise seed, which a node would refuse."""
        config = config.with_values({"privacy.noise_seed": ""})
        folder.mkdir(parents=True, exist_ok=True)
        prepare(config.data, seed=0, fingerprints=True).write(folder / "store")
        key, anchor = folder / "node.pem", folder / "anchor"
        SigningKey.create(key)
        Ledger.create(folder / "ledger", node="site-a", key=key, anchor=anchor)
        server = SigningKey.create(folder / "server.pem")
        settings = {
            "unit": config.privacy.unit,
            "max_epsilon": config.privacy.epsilon,
            "delta": config.privacy.delta,
            "servers": [server.public],
        }
        tree = {
            "data": {"store": "store", "node": 0},
            "ledger": {"file": "ledger", "key": "node.pem", "anchor": "anchor"},
            "policy": settings | policy,
        }
        (folder / "node.toml").write_text(tomli_w.dumps(tree))
        return cls(folder, config, server)

    def ledger(self) -> Ledger:
        """Opened anew, so that all of it is read from the disk."""
        return Ledger.open(self.folder / "ledger", anchor=self.folder / "anchor")

    def request(self, *, sign: bool = True, **changes: Any) -> TrainRequest:
        """What an honest server asks in the first round, with fields changed."""
        settled = settle(self.config, mean_records=30.0, mean_subjects=30.0)
        schema = open_node(self.folder / "store", 0)[1].schema
        config = settled.config
        made = TrainRequest(
            run="a" * 32,
            request=secrets.token_hex(16),
            round=1,
            rounds=config.train.rounds,
            deadline=0.0,
            digest=config_digest(self.config),
            task="classification",
            modalities=schema.names,
            parameters=count_parameters(schema, config.model, vocabulary=config.data.vocabulary),
            job=job_of(config, settled.mechanism, 1),
            arrays=encode(new_trainer(config, schema).weights()),
        )
        asked = dataclasses.replace(made, **changes)
        return signed(asked, self.server) if sign else asked

    def answer(
        self, request: TrainRequest | RecordDict, config: RunConfig | None = None
    ) -> RecordDict:
        """What the node sends back, as it leaves the vault."""
        return self.asked("train", request, config)

    def asked(
        self, kind: str, request: TrainRequest | RecordDict, config: RunConfig | None = None
    ) -> RecordDict:
        """The same for any kind of message."""
        settings = (config or self.config).to_flat()
        record = request if isinstance(request, RecordDict) else request.to_record()
        self.vault = self.vault or Vault(self.folder / "node.toml")
        return self.vault.hear(Letter(kind=kind, record=record, settings=settings)).to_record()

    def restart(self) -> None:
        """The vault's process ends; the next request meets a new one, which reads all anew."""
        self.vault = None
        node._open.cache_clear()

    def said(self, request: TrainRequest | RecordDict, config: RunConfig | None = None) -> str:
        """The status of the answer, and the problem that it tells."""
        told: ConfigRecord = self.answer(request, config).config_records["config"]
        return f"{told['status']}: {told['problem']}"
