"""One round's replies, each checked, folded into what the round needs, and dropped.

A mean is a running sum: a reply is added as it comes and forgotten, so memory does not grow with
the number of nodes, and the sum does not depend on their order. Median and trimmed mean need all
updates side by side, so they keep all, decoded.

A node must answer under the name that it had before. Where the server does not know a node's name
yet, its update is kept until the round ends: only then is it sure that no two go by one name.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from flwr.app import ArrayRecord, Message

from fedfuse.errors import WireError
from fedfuse.federation.compression import expand
from fedfuse.federation.wire import Template, TrainReply, TrainRequest, Weights, decode
from fedfuse.privacy.summation import RunningSum

__all__ = ["ByMean", "Everything", "Fold", "Gathering", "Mean", "RunningMean", "in_type"]


class Mean(Protocol):
    """Makes one model of a round's updates, as they come."""

    def add(self, end: Weights) -> None:
        """One more update."""
        ...

    def mean(self) -> Weights:
        """The model."""
        ...


class Fold(Protocol):
    """What becomes of the good updates of a round."""

    def add(self, node: str, weights: Weights, weight: float) -> None:
        """One more update."""
        ...

    def updates(self) -> list[tuple[Weights, float]]:
        """What Flower's strategy gets: models and their weights."""
        ...


class RunningMean:
    """The weighted mean of all updates, in the memory of a few models."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._sum = RunningSum({name: shape for name, (shape, _) in template.items()})
        self._weight = 0.0

    def add(self, node: str, weights: Weights, weight: float) -> None:
        """Adds an update and keeps nothing of it."""
        self._sum.add(weights, weight)
        self._weight += weight

    def updates(self) -> list[tuple[Weights, float]]:
        """The mean alone, with weight 1."""
        total = self._sum.total()
        mean = {
            name: in_type(part / self._weight, self._template[name][1])
            for name, part in total.items()
        }
        return [(mean, 1.0)]


class Everything:
    """All updates side by side, sorted by node: as much memory as there are nodes."""

    def __init__(self) -> None:
        self._kept: list[tuple[str, Weights, float]] = []

    def add(self, node: str, weights: Weights, weight: float) -> None:
        """Keeps an update."""
        self._kept.append((node, weights, weight))

    def updates(self) -> list[tuple[Weights, float]]:
        """All of them, in an order that is not that of their coming."""
        kept = sorted(self._kept, key=lambda one: one[0])
        return [(weights, weight) for _, weights, weight in kept]


class ByMean:
    """Updates that a `Mean` makes one model of, as unit "node" does."""

    def __init__(self, mean: Mean) -> None:
        self._mean = mean

    def add(self, node: str, weights: Weights, weight: float) -> None:
        """Passes an update on."""
        self._mean.add(weights)

    def updates(self) -> list[tuple[Weights, float]]:
        """The one model, with weight 1."""
        return [(self._mean.mean(), 1.0)]


class Gathering:
    """What has come in a round so far."""

    def __init__(
        self,
        request: TrainRequest,
        fold: Fold,
        *,
        asked: Mapping[int, str],
        known: Mapping[int, str],
        template: Template,
        counts: bool,
    ) -> None:
        """
        asked   by number, what to call each node that was asked
        known   by number, the names that nodes had in earlier rounds, as far as they are known
        counts  a reply's weight may be a number of records; otherwise it must be 1
        """
        self.request = request
        self.fold = fold
        self.asked = asked
        self.replies: dict[int, TrainReply] = {}
        """All well-formed replies by sender, without their weights."""
        self.failures: dict[str, str] = {}
        self.good = 0
        """How many updates were folded in."""
        self._known = {node: known[node] for node in asked if node in known}
        self._taken = set(self._known.values())
        self._template = template
        self._start: Weights | None = None
        self._counts = counts
        self._seen: set[int] = set()
        self._held: dict[int, tuple[TrainReply, Weights]] = {}

    def take(self, message: Message) -> None:
        """One reply. What nobody asked for, and a node's second answer, are ignored."""
        sender = message.metadata.src_node_id
        if sender not in self.asked or sender in self._seen:
            return
        self._seen.add(sender)
        if message.has_error():
            self.failures[self.asked[sender]] = str(message.error.reason)[:400]
            return
        try:
            reply, weights = TrainReply.read(
                message.content, request=self.request, counts=self._counts, decoder=self._decode
            )
        except WireError as error:
            self.failures[self.asked[sender]] = f"WireError: {error.what}"
            return
        self._sort_in(sender, dataclasses.replace(reply, arrays=None), weights)

    def close(self) -> None:
        """No more replies come: folds in what was kept back, and names who did not answer."""
        names = Counter(reply.node for reply, _ in self._held.values())
        for sender, (reply, weights) in sorted(self._held.items(), key=lambda one: one[1][0].node):
            if names[reply.node] > 1 or reply.node in self._taken:
                self.failures[f"{reply.node} (node {sender})"] = (
                    "another node goes by the same name"
                )
                continue
            self.replies[sender] = reply
            self._fold(reply, weights)
        self._held = {}
        for sender in self.asked.keys() - self._seen:
            self.failures[self.asked[sender]] = "no answer within the time limit"
        self.failures = dict(sorted(self.failures.items()))
        self.replies = dict(sorted(self.replies.items()))

    def _decode(self, arrays: ArrayRecord) -> Weights:
        """A reply's weights, in the form that was asked for."""
        request = self.request
        if request.compression == "none":
            return decode(arrays, self._template)
        if self._start is None:
            self._start = decode(request.arrays, self._template)
        return expand(
            arrays,
            self._start,
            self._template,
            form=request.compression,
            keep=request.compression_keep,
        )

    def _sort_in(self, sender: int, reply: TrainReply, weights: Weights | None) -> None:
        name = self._known.get(sender)
        if weights is None:
            # A node that could not even open its data may not know its own name.
            told = reply if name is None else dataclasses.replace(reply, node=name)
            self.replies[sender] = told
            self.failures[told.node] = reply.problem or reply.status
        elif name is None:
            self._held[sender] = reply, weights
        elif reply.node != name:
            self.failures[name] = "it answers under another name than before"
        else:
            self.replies[sender] = reply
            self._fold(reply, weights)

    def _fold(self, reply: TrainReply, weights: Weights) -> None:
        self.fold.add(reply.node, weights, reply.weight)
        self.good += 1


def in_type(value: np.ndarray, dtype: str) -> np.ndarray:
    """`value` as `dtype`; whole numbers are rounded, not cut."""
    if np.dtype(dtype).kind in "iub":
        value = np.rint(value)
    return np.asarray(value, dtype=dtype)
