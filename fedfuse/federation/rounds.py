"""The rounds of a run: ask, gather, aggregate, and again.

Flower's own `Strategy.start` has no checkpoint, no resume and no deadline, so the loop is here;
what it calls is Flower's.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from fedfuse.config import RunConfig, TrainConfig
from fedfuse.errors import ConfigError, FederationError
from fedfuse.federation.flower import GridView, replies
from fedfuse.federation.gathering import Mean
from fedfuse.federation.masking.conduct import MaskedRound
from fedfuse.federation.packing import record_bytes
from fedfuse.federation.strategy import Aggregate, GuardedStrategy
from fedfuse.federation.wire import (
    TrainRequest,
    Weights,
    template_of,
)
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.train import Job

__all__ = ["Listener", "Outcome", "expected_batch", "federate", "job_of", "learning_rate"]

_LOOK_S = 0.2
MasksOf = Callable[[Grid, TrainRequest, dict[int, str], Weights], MaskedRound]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A finished round."""

    round: int
    asked: dict[int, str]
    """The nodes that were asked, by number: their names, as far as known."""
    aggregate: Aggregate
    bytes_sent: int
    bytes_received: int


class Listener(Protocol):
    """Keeps what a run must not lose."""

    def round_starts(self, request: TrainRequest, asked: dict[int, str]) -> None:
        """Called before a node is asked."""
        ...

    def round_ends(self, outcome: Outcome) -> None:
        """Called once the new weights are there."""
        ...


def federate(
    grid: Grid,
    *,
    config: RunConfig,
    ask: Callable[[int, Weights], TrainRequest],
    strategy: GuardedStrategy,
    weights: Weights,
    first: int,
    last: int,
    names: dict[int, str],
    listener: Listener,
    connected: int = 1,
    mean_of: Callable[[Weights, int, int], Mean | None] = lambda weights, round, asked: None,
    masks_of: MasksOf | None = None,
    listed: Mapping[int, str] | None = None,
) -> None:
    """Runs the rounds `first` to `last`, from `weights`.

    1. draw nodes; announce the round, the last round and the deadline to each
    2. check each reply as it comes and fold it in, until all are there or the time is up
    3. aggregate the good ones
    4. hand the outcome to `listener`, and go on from its weights

    `ask`: from the round and the weights to what each node is asked. `names`: of nodes by number,
    completed here as they answer. `mean_of`: from the weights, the round and the number of nodes
    asked to what aggregates a round with unit "node". `masks_of`: to a round whose
    updates come masked. `listed`: by number, the names of the only nodes to ask. `connected`: how
    many nodes to wait for before the first round.
    Raises FederationError where too few nodes come, or too few updates are good.
    """
    template = template_of(weights)
    timeout = config.federation.round_timeout_s
    _wait_for_nodes(grid, connected, timeout, listed)
    for round in range(first, last + 1):
        request = ask(round, weights)
        view = grid if listed is None else GridView(grid, _there(grid, listed))
        messages = strategy.configure_train(request, view, seed=config.seed)
        nodes = [message.metadata.dst_node_id for message in messages]
        names |= {node: listed[node] for node in nodes} if listed is not None else {}
        asked = {node: names.get(node, f"node {node}") for node in nodes}
        listener.round_starts(request, asked)
        end = time.monotonic() + timeout
        masks = masks_of(grid, request, asked, weights) if masks_of is not None else None
        if masks is not None:
            there = masks.prepare(end)
            messages = [one for one in messages if one.metadata.dst_node_id in there]
        sent = _bytes_of(messages)
        gathering = strategy.gather(
            request,
            asked=asked,
            known=names,
            template=masks.template if masks else template,
            mean=None if masks else mean_of(weights, round, len(asked)),
            masked=masks,
        )
        received = 0
        for reply in replies(grid, messages, timeout=max(end - time.monotonic(), 0.0)):
            if reply.has_content():
                received += record_bytes(reply.content)
            gathering.take(reply)
        if masks is not None:
            masks.finish(time.monotonic() + timeout)
            sent, received = sent + masks.bytes_sent, received + masks.bytes_received
        aggregate = strategy.conclude(gathering, template=template)
        if masks is not None:
            failures = aggregate.failures | masks.failures
            aggregate = dataclasses.replace(aggregate, failures=dict(sorted(failures.items())))
        weights = aggregate.weights
        # A name counts once an update came under it; a node that fails may not know its own.
        names |= {n: reply.node for n, reply in aggregate.replies.items() if reply.status == "ok"}
        listener.round_ends(
            Outcome(
                round=round,
                asked=asked,
                aggregate=aggregate,
                bytes_sent=sent,
                bytes_received=received,
            )
        )


def _there(grid: Grid, listed: Mapping[int, str] | None) -> list[int]:
    """The nodes that are connected, of those that may be asked."""
    return [node for node in grid.get_node_ids() if listed is None or node in listed]


def _wait_for_nodes(
    grid: Grid, count: int, timeout: float, listed: Mapping[int, str] | None
) -> None:
    """Returns once `count` nodes are connected; Flower itself would wait for ever."""
    end = time.monotonic() + timeout
    while (there := len(_there(grid, listed))) < count:
        if time.monotonic() > end:
            raise FederationError(
                f"{there} nodes are connected after {timeout:g} s, but {count} are needed",
                where="federation",
                hint="start more nodes, or lower federation.min_nodes",
            )
        time.sleep(_LOOK_S)


def job_of(config: RunConfig, mechanism: Mechanism | None, round: int) -> Job:
    """What a node is asked to do in `round`, by a configuration that `settle` has filled in."""
    train, privacy = config.train, config.privacy
    if not (train.local_steps and train.learning_rate):
        raise ConfigError("train.local_steps or train.learning_rate is still open", where="train")
    noisy_steps = mechanism is not None and mechanism.unit is not Unit.NODE
    if mechanism is not None:
        steps = train.local_steps if noisy_steps else 1
        mechanism = dataclasses.replace(mechanism, steps=steps)
    fedprox = config.federation.strategy == "fedprox"
    return Job(
        steps=train.local_steps,
        optimizer=train.optimizer,
        learning_rate=learning_rate(train, round),
        momentum=train.momentum,
        weight_decay=train.weight_decay,
        proximal_mu=config.federation.proximal_mu if fedprox else 0.0,
        physical_batch=train.physical_batch,
        batch_size=train.batch_size,
        expected_batch=expected_batch(config) if noisy_steps else train.batch_size,
        mechanism=mechanism,
        clipping=privacy.clipping,
        clip_shares=privacy.clip_shares,
        records_per_subject=privacy.records_per_subject,
        noise_by=privacy.noise_by,
        noise_nodes=privacy.noise_nodes,
    )


def expected_batch(config: RunConfig) -> float:
    """The public divisor of a private step's sum: records, or subjects; else the batch size."""
    privacy = config.privacy
    match privacy.unit:
        case Unit.RECORD:
            return privacy.sample_rate * privacy.declared_records
        case Unit.SUBJECT:
            return privacy.sample_rate * privacy.declared_subjects
    return config.train.batch_size


def _bytes_of(messages: Sequence[Message]) -> int:
    """What all arrays in `messages` come to; a content that many nodes get is measured once."""
    sizes: dict[int, int] = {}
    for message in messages:
        if id(message.content) not in sizes:
            sizes[id(message.content)] = record_bytes(message.content)
    return sum(sizes[id(message.content)] for message in messages)


def learning_rate(train: TrainConfig, round: int) -> float:
    """The learning rate of `round`; "cosine" goes from the full rate towards 0."""
    if train.schedule == "constant":
        return train.learning_rate
    return train.learning_rate * 0.5 * (1 + math.cos(math.pi * (round - 1) / train.rounds))
