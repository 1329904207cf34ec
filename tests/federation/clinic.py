"""A real node as its operator sets it up: data, key, ledger, anchor and node.toml in one folder."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedfuse.config import RunConfig
from fedfuse.data.prepare import open_node, prepare
from fedfuse.federation.client import make_client_app
from fedfuse.federation.flower import received, with_id
from fedfuse.federation.node import new_trainer
from fedfuse.federation.rounds import job_of
from fedfuse.federation.settle import settle
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
    app: ClientApp = field(default_factory=make_client_app)

    @classmethod
    def open(cls, folder: Path, config: RunConfig, **policy: Any) -> Clinic:
        """Prepares everything; `policy` changes the settings of that section."""
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
        """What the node sends back, as it leaves the app."""
        run_config = (config or self.config).to_flat()
        record = request if isinstance(request, RecordDict) else request.to_record()
        context = Context(
            1, 1, {"node-file": str(self.folder / "node.toml")}, RecordDict(), run_config
        )
        message = with_id(Message(RecordDict(), dst_node_id=1, message_type="train"))
        return self.app(received(record, message.metadata), context).content

    def said(self, request: TrainRequest | RecordDict, config: RunConfig | None = None) -> str:
        """The status of the answer, and the problem that it tells."""
        told: ConfigRecord = self.answer(request, config).config_records["config"]
        return f"{told['status']}: {told['problem']}"
