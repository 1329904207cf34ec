"""A simulated node's ClientApp: the node's answer, behind Flower's interface.

A real node's is in `forward`: it only carries messages to the node's vault.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedfuse.config import RunConfig
from fedfuse.data.prepare import fingerprint_of
from fedfuse.errors import ConfigError
from fedfuse.federation.books import Books, LedgerBooks, StateBooks
from fedfuse.federation.masking.conduct import MESSAGE_TYPE
from fedfuse.federation.masking.roster import Roster
from fedfuse.federation.node import Site, answers, refusal
from fedfuse.federation.policy import Policy
from fedfuse.federation.wire import TrainReply
from fedfuse.privacy.ledger import Ledger
from fedfuse.privacy.spec import Event

__all__ = ["WORKER_VARIABLE", "SimulatedApp", "make_client_app"]

WORKER_VARIABLE = "FEDFUSE_WORKER"
"""Set in each worker process to its number."""


def make_client_app(
    config: RunConfig,
    store: str,
    *,
    history: Mapping[int, Sequence[Event]] | None = None,
    ledgers: Sequence[str] = (),
    roster: Roster | None = None,
) -> ClientApp:
    """The ClientApp of simulated nodes.

    store    where the prepared data lies
    history  of nodes without ledgers, by partition: what each has spent in the part of the run
             before a resume
    ledgers  by partition: the file of each node's ledger
    roster   of nodes whose updates leave under masks
    """
    opening = dict(history or {})

    def train(asked: Sequence[tuple[Message, Context]]) -> list[Message]:
        replies: list[TrainReply | None] = [None] * len(asked)
        ready = {}
        for place, (message, context) in enumerate(asked):
            try:
                site = _site(config, store, context, roster)
                ready[place] = message.content, site, _books(site, context, opening, ledgers)
            except Exception as error:
                replies[place] = refusal(error, f"id-{context.node_id}")
        for place, reply in zip(ready, answers(list(ready.values())), strict=True):
            replies[place] = reply
        return [
            Message(reply.to_record(), reply_to=message)
            for reply, (message, _) in zip(replies, asked, strict=True)
            if reply is not None
        ]

    def stage(message: Message, context: Context) -> Message:
        if roster is None:
            raise ConfigError("this run shares no masks", where="federation.secure_aggregation")
        seat = roster.seat(_index(context), config, context.state)
        return Message(seat.answer(message.content).to_record(), reply_to=message)

    return SimulatedApp(train, stage)


class SimulatedApp(ClientApp):
    """A ClientApp that can also answer for several nodes at once, so that they train together.

    Stages of masks are answered one by one.
    """

    def __init__(
        self,
        train: Callable[[Sequence[tuple[Message, Context]]], list[Message]],
        stage: Callable[[Message, Context], Message] | None = None,
    ) -> None:
        super().__init__()
        self._train_all, self._stage = train, stage
        if stage is not None:
            self.query()(stage)

        @self.train()
        def alone(message: Message, context: Context) -> Message:
            return train([(message, context)])[0]

    def together(self, asked: Sequence[tuple[Message, Context]]) -> list[Message]:
        """The replies of several nodes to messages of one type."""
        if self._stage is None or asked[0][0].metadata.message_type != MESSAGE_TYPE:
            return self._train_all(asked)
        return [self._stage(message, context) for message, context in asked]


def _index(context: Context) -> int:
    index = context.node_config.get("partition-id")
    if not isinstance(index, int):
        raise ConfigError("the node's settings lack partition-id", where="node config")
    return index


def _site(config: RunConfig, store: str, context: Context, roster: Roster | None) -> Site:
    index = _index(context)
    return Site(
        config=config,
        policy=Policy.of(config.privacy),
        store=Path(store),
        index=index,
        seat=roster.seat(index, config, context.state) if roster is not None else None,
        worker=int(os.environ.get(WORKER_VARIABLE, "0")),
    )


def _books(
    site: Site, context: Context, opening: Mapping[int, Sequence[Event]], ledgers: Sequence[str]
) -> Books:
    if not ledgers:
        return StateBooks(context, opening.get(site.index, ()))
    dataset = fingerprint_of(site.store, site.index)
    return LedgerBooks(_ledger(ledgers[site.index]), dataset, alone=True)


@lru_cache(maxsize=256)
def _ledger(file: str) -> Ledger:
    return Ledger.open(Path(file))
