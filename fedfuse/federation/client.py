"""The ClientApp: a node's answer, behind Flower's interface."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedfuse.config import RunConfig
from fedfuse.data.prepare import fingerprint_of
from fedfuse.errors import ConfigError, FedfuseError
from fedfuse.federation.books import Books, LedgerBooks, StateBooks
from fedfuse.federation.node import Site, answer
from fedfuse.federation.nodefile import NodeFile
from fedfuse.federation.policy import Policy, scrubbed
from fedfuse.federation.wire import TrainReply
from fedfuse.privacy.ledger import Ledger
from fedfuse.privacy.spec import Event

__all__ = ["WORKER_VARIABLE", "make_client_app"]

WORKER_VARIABLE = "FEDFUSE_WORKER"
"""Set in each worker process to its number."""


def make_client_app(
    config: RunConfig | None = None,
    store: str | None = None,
    *,
    history: Mapping[int, Sequence[Event]] | None = None,
    ledgers: Sequence[str] = (),
) -> ClientApp:
    """The ClientApp of a node.

    config   a simulation's; None takes Flower's run config, and then data, ledger and policy come
             from the file that the node's setting `node-file` names, never from the server
    store    where a simulation's prepared data lies
    history  of simulated nodes without ledgers, by partition: what each has spent in the part of
             the run before a resume
    ledgers  of simulated nodes, by partition: the file of each one's ledger
    """
    app = ClientApp()
    opening = dict(history or {})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            if config is None or store is None:
                site, books = _real(context)
            else:
                site = _simulated(config, store, context)
                books = _simulated_books(site, context, opening, ledgers)
            reply = answer(message.content, site, books)
        except Exception as error:
            reply = TrainReply(
                node=f"id-{context.node_id}",
                round=0,
                status="refused" if isinstance(error, FedfuseError) else "failed",
                problem=scrubbed(error),
            )
        return Message(reply.to_record(), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _no_figures(message, context)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return _no_figures(message, context)

    return app


def _no_figures(message: Message, context: Context) -> Message:
    """A loss, a metric, a count: each would be a release of its own."""
    reply = TrainReply(
        node=f"id-{context.node_id}",
        round=0,
        status="refused",
        problem="PrivacyError: a node gives no metrics and answers no queries about its records",
    )
    return Message(reply.to_record(), reply_to=message)


def _real(context: Context) -> tuple[Site, Books]:
    """A node by its own node.toml."""
    path = context.node_config.get("node-file")
    if not isinstance(path, str) or not path:
        raise ConfigError(
            "the node's settings lack node-file",
            where="node config",
            hint="see clients/node.example.toml",
        )
    settings = _settings(path)
    site = Site(
        config=RunConfig.from_flat(context.run_config).with_values(
            {"train.device": settings.device} if settings.device else {}
        ),
        policy=settings.rules(),
        store=Path(settings.data.store),
        index=settings.data.node,
        name=settings.name,
    )
    if not settings.ledger.file:
        return site, StateBooks(context)
    dataset = settings.data.dataset
    fingerprint = fingerprint_of(site.store, site.index)
    ledger = _ledger(settings.ledger.file, settings.ledger.key, settings.ledger.anchor)
    return site, LedgerBooks(ledger, dataset or fingerprint, alone=not dataset)


def _simulated(config: RunConfig, store: str, context: Context) -> Site:
    index = context.node_config.get("partition-id")
    if not isinstance(index, int):
        raise ConfigError("the node's settings lack partition-id", where="node config")
    return Site(
        config=config,
        policy=Policy.of(config.privacy),
        store=Path(store),
        index=index,
        worker=int(os.environ.get(WORKER_VARIABLE, "0")),
    )


def _simulated_books(
    site: Site, context: Context, opening: Mapping[int, Sequence[Event]], ledgers: Sequence[str]
) -> Books:
    if not ledgers:
        return StateBooks(context, opening.get(site.index, ()))
    dataset = fingerprint_of(site.store, site.index)
    return LedgerBooks(_ledger(ledgers[site.index], "", ""), dataset, alone=True)


@lru_cache(maxsize=8)
def _settings(path: str) -> NodeFile:
    """Read once: what changes in the file takes effect when the node starts anew."""
    return NodeFile.read(Path(path))


@lru_cache(maxsize=256)
def _ledger(file: str, key: str, anchor: str) -> Ledger:
    return Ledger.open(
        Path(file), key=Path(key) if key else None, anchor=Path(anchor) if anchor else None
    )
