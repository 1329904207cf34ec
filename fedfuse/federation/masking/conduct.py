"""A masked round as the server conducts it: around the training, the stages of the protocol.

    prepare   announce, share, open: by all that were asked, and still answer; each has a sixth of
              the round's time, so that one node that is silent leaves the others time to train
    add       the masked updates, as they come
    finish    agree, reveal: by all whose update came, each half of the time; then the sum, and no
              update, is known

Each stage waits for all that take part, until its time is up; who has not answered by then is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedfuse.errors import WireError
from fedfuse.federation.flower import replies
from fedfuse.federation.masking.collector import Collector
from fedfuse.federation.masking.messages import from_config, terms_to_config, to_config
from fedfuse.federation.masking.quantise import Lattice
from fedfuse.federation.masking.seat import VECTOR, masked_template
from fedfuse.federation.masking.terms import Terms
from fedfuse.federation.wire import CONFIG, Template, Weights
from fedfuse.privacy.central import moved_by
from fedfuse.privacy.signing import SigningKey

__all__ = ["MESSAGE_TYPE", "MaskedRound"]

MESSAGE_TYPE = "query"
"""Of Flower's types of messages, that of stages; training keeps its own."""


class MaskedRound:
    """A round whose updates are only known as a sum. It is a `Fold` of them too."""

    def __init__(
        self,
        grid: Grid,
        terms: Terms,
        lattice: Lattice,
        *,
        asked: Mapping[int, str],
        identities: Mapping[str, str],
        start: Weights,
        trained: Iterable[str],
        divisor: int = 0,
        key: SigningKey | None = None,
    ) -> None:
        """
        asked    by number, the names of the nodes that were asked
        divisor  of the sum; 0: the number of updates in it
        key      signs the terms
        """
        self.template: Template = masked_template(terms.length)
        """What an update must look like."""
        self.failures: dict[str, str] = {}
        """Who was lost at a stage of the protocol, and why."""
        self.bytes_sent = 0
        self.bytes_received = 0
        """Of the protocol's own messages."""
        self._grid = grid
        self._terms = terms
        self._lattice = lattice
        self._asked = dict(asked)
        self._numbers = {name: number for number, name in asked.items()}
        self._collector = Collector(terms, identities)
        self._start = start
        self._trained = frozenset(trained)
        self._divisor = divisor
        self._key = key
        self._updates: list[tuple[Weights, float]] = []

    def prepare(self, end: float) -> frozenset[int]:
        """The numbers of the nodes whose update can be masked. `end`: on the monotonic clock.

        Raises FederationError where they are fewer than the threshold.
        """
        collector, most = self._collector, (end - time.monotonic()) / 6
        self._stage("announce", dict.fromkeys(self._terms.nodes), most, self._announced)
        told = collector.announcements()
        self._stage("share", dict.fromkeys(told, told), most, collector.shared)
        opened: set[int] = set()
        self._stage(
            "open", collector.boxes(), most, lambda node, parts: opened.add(self._numbers[node])
        )
        return frozenset(opened)

    def add(self, node: str, weights: Weights, weight: float) -> None:
        """Takes the masked update of `node`, and keeps nothing of it but the sum."""
        self._collector.masked(node, np.asarray(weights[VECTOR], np.uint32))

    def finish(self, end: float) -> None:
        """Unmasks the sum. Raises FederationError where too few nodes are left to do so."""
        left, most = self._collector.left(), (end - time.monotonic()) / 2
        told = dict.fromkeys(left, b"")
        self._stage("agree", dict.fromkeys(left, told), most, self._agreed)
        signatures = self._collector.signatures()
        self._stage("reveal", dict.fromkeys(signatures, signatures), most, self._collector.revealed)
        total = self._lattice.real(self._collector.total()) / (self._divisor or len(left))
        self._updates = [(moved_by(self._start, self._trained, total), 1.0)]

    def updates(self) -> list[tuple[Weights, float]]:
        """The mean of the round, with weight 1; nothing before `finish`."""
        return self._updates

    def _announced(self, node: str, parts: Mapping[str, bytes]) -> None:
        self._collector.announced(node, _own(node, parts))

    def _agreed(self, node: str, parts: Mapping[str, bytes]) -> None:
        self._collector.agreed(node, _own(node, parts))

    def _stage(
        self,
        stage: str,
        told: Mapping[str, Mapping[str, bytes] | None],
        most: float,
        take: Callable[[str, Mapping[str, bytes]], None],
    ) -> None:
        """Sends each node what it is `told` (None: the terms), and takes the answers that come
        within `most` seconds."""
        silent = set(told)
        for number, content in self._answers(stage, told, most):
            node = self._asked[number]
            silent.discard(node)
            try:
                take(node, self._read(stage, content))
            except WireError as error:
                self.failures[node] = f"masks, stage {stage}: {error.what}"
        for node in silent:
            self.failures[node] = f"masks, stage {stage}: no answer within the time limit"

    def _answers(
        self, stage: str, told: Mapping[str, Mapping[str, bytes] | None], most: float
    ) -> Iterator[tuple[int, RecordDict]]:
        contents: dict[int, RecordDict] = {}
        messages = []
        for node, parts in told.items():
            # What all get is one record, so that it is laid down and counted once.
            content = contents.get(id(parts))
            if content is None:
                if parts is None:
                    record = terms_to_config(self._terms, self._key)
                else:
                    record = to_config(stage, self._terms.request, parts)
                content = contents[id(parts)] = RecordDict({CONFIG: record})
            self.bytes_sent += _bytes(content)
            messages.append(Message(content, self._numbers[node], MESSAGE_TYPE))
        for reply in replies(self._grid, messages, timeout=max(most, 0.0)):
            number = reply.metadata.src_node_id
            if reply.has_error():
                content = RecordDict({CONFIG: ConfigRecord({"problem": str(reply.error.reason)})})
            else:
                content = reply.content
                self.bytes_received += _bytes(content)
            yield number, content

    def _read(self, stage: str, content: RecordDict) -> dict[str, bytes]:
        if set(content) != {CONFIG} or len(content.config_records) != 1:
            raise WireError("an answer about masks is one config record")
        config = dict(content.config_records[CONFIG])
        if "problem" in config:
            problem = str(config["problem"])[:400]
            raise WireError(problem if problem.isprintable() else "a problem that cannot be told")
        return from_config(config, stage, self._terms)


def _own(node: str, parts: Mapping[str, bytes]) -> bytes:
    if set(parts) != {node}:
        raise WireError("a node speaks for itself alone")
    return parts[node]


def _bytes(content: RecordDict) -> int:
    """The size of what a message of masks carries."""
    parts = dict(content.config_records.get(CONFIG, {})).get("parts")
    return sum(len(p) for p in parts if isinstance(p, bytes)) if isinstance(parts, list) else 0
