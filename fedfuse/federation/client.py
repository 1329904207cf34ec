"""The ClientApp: a node's answer, behind Flower's interface."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedfuse.config import RunConfig
from fedfuse.errors import ConfigError
from fedfuse.federation.books import Books
from fedfuse.federation.node import Site, answer
from fedfuse.federation.policy import Policy, scrubbed
from fedfuse.federation.wire import TrainReply
from fedfuse.privacy.spec import Event

__all__ = ["WORKER_VARIABLE", "make_client_app"]

WORKER_VARIABLE = "FEDFUSE_WORKER"
"""Set in each worker process to its number."""


def make_client_app(
    config: RunConfig | None = None,
    store: str | None = None,
    *,
    history: Mapping[int, Sequence[Event]] | None = None,
) -> ClientApp:
    """The ClientApp of a node.

    config   a simulation's; None takes Flower's run config, and then the promise comes from the
             node's own settings (`max-epsilon` and `delta`, or `not-private`), never the server's
    store    where the prepared data lies; None takes the node's setting `store`
    history  by partition: what each node has spent in the part of the run before a resume
    """
    app = ClientApp()
    opening = dict(history or {})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            site = _site(config, store, context)
            books = Books(context, opening.get(site.index, ()))
            reply = answer(message.content, site, books)
        except Exception as error:
            reply = TrainReply(
                node=f"id-{context.node_id}", round=0, status="failed", problem=scrubbed(error)
            )
        return Message(reply.to_record(), reply_to=message)

    return app


def _site(config: RunConfig | None, store: str | None, context: Context) -> Site:
    settings = context.node_config
    where = store or settings.get("store")
    index = settings.get("partition-id")
    if not isinstance(where, str) or not where or not isinstance(index, int):
        raise ConfigError(
            "the node's settings lack store or partition-id",
            where="node config",
            hint="see clients/node.example.toml",
        )
    return Site(
        config=RunConfig.from_flat(context.run_config) if config is None else config,
        policy=Policy.of_node(settings) if config is None else Policy.of(config.privacy),
        store=Path(where),
        index=index,
        worker=int(os.environ.get(WORKER_VARIABLE, "0")),
    )
