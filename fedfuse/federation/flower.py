"""What fedfuse knows of Flower's insides, all in one place.

Three touches are private: the identity of the process that makes messages (`TaskIdentity`), the
id that a message gets (`_message_id`), and a message made from metadata. A test says so when
Flower changes one of them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Message, Metadata, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedfuse.errors import WireError
from fedfuse.federation.packing import packed, record_bytes, unpacked

__all__ = [
    "RUN_ID",
    "SERVER_ID",
    "GridView",
    "MessageGrid",
    "PackedGrid",
    "quiet",
    "received",
    "replies",
    "take_identity",
    "with_id",
]

_log = logging.getLogger("fedfuse.server")
RUN_ID = 1
"""The run's number in the loopback engine, which has one run."""
SERVER_ID = 0
"""The server's own number there; nodes are 1 to N."""


def take_identity() -> None:
    """Lets this process make messages, as the server of the loopback engine's one run."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = RUN_ID
    TaskIdentity.node_id = SERVER_ID


def with_id(message: Message) -> Message:
    """`message`, with an id of its own, as a SuperLink gives it."""
    message.metadata.__dict__["_message_id"] = uuid4().hex
    return message


def received(content: RecordDict, metadata: Metadata) -> Message:
    """The message that has come with `metadata`."""
    make: Any = Message  # the argument is there for Flower's own use, so it isn't in its types
    message: Message = make(content=content, metadata=metadata)
    return message


def replies(
    grid: Grid, messages: Iterable[Message], *, timeout: float | None = None
) -> Iterator[Message]:
    """The replies that come within `timeout` seconds, each as soon as it is there.

    Of a grid of Flower's own too, whose `send_and_receive` gives them all at the end.
    """
    own = grid if isinstance(grid, MessageGrid) else GridView(grid, ())
    yield from own.replies(messages, timeout=timeout)


class MessageGrid(Grid):
    """A grid that makes messages as Flower's own grids do, and passes replies on as they come."""

    look_s = 1.0
    """How long to wait before the next look for replies."""

    def replies(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """The replies that come within `timeout` seconds, each as soon as it is there."""
        waiting = set(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        while waiting and (end is None or time.monotonic() < end):
            for message in self.pull_messages(list(waiting)):
                waiting.discard(message.metadata.reply_to_message_id)
                yield message
            if waiting:
                time.sleep(self.look_s)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As Flower's own grids."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class GridView(MessageGrid):
    """A grid that shows only some of its nodes, so that a strategy sends to those."""

    def __init__(self, grid: Grid, nodes: Sequence[int]) -> None:
        self._grid = grid
        self._nodes = nodes

    @staticmethod
    def reply(content: RecordDict) -> Message:
        """A message that holds `content` and came from nowhere in particular."""
        return Message(content, dst_node_id=SERVER_ID, message_type="train")

    def get_node_ids(self) -> Iterable[int]:
        """The nodes shown."""
        return list(self._nodes)

    def set_run(self, run: Run) -> None:
        """As the grid behind it."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """As the grid behind it."""
        return self._grid.run

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid behind it."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid behind it."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As the grid behind it."""
        return self._grid.send_and_receive(messages, timeout=timeout)


class PackedGrid(GridView):
    """A real federation's grid: the arrays of each message travel as one, and replies are looked
    for more often than Flower's own grid does. Where models are large, a few replies at a time are
    in memory, however many have come.

    A node that stays silent long after others have answered, or for half of the time, is asked once
    more: Flower 1.41 forgets a message that a SuperNode could not fetch whole. A node answers a
    request once, so nothing is spent twice.

    at_a_time   how many nodes train at the same time, each asked once another has answered; 0: all
    """

    look_s = 0.5
    patience_s = 60.0
    """So long, and as long as the answers so far took, nothing may come until it is asked again."""
    at_once = 256 << 20
    """Bytes of replies that are taken in together, where each is as large as its request."""

    def __init__(self, grid: Grid, *, at_a_time: int = 0) -> None:
        super().__init__(grid, ())
        self._at_a_time = at_a_time
        self._largest = 1

    def get_node_ids(self) -> Iterable[int]:
        """As the grid behind it."""
        return self._grid.get_node_ids()

    def replies(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """As every grid; requests to train are repeated once."""
        rest = deque(messages)
        most = self._at_a_time or len(rest)
        waiting: dict[str, Message] = {}
        repeated: set[int] = set()
        begun = last = time.monotonic()
        while (rest or waiting) and (timeout is None or time.monotonic() < begun + timeout):
            free = most - len({one.metadata.dst_node_id for one in waiting.values()})
            if rest and free > 0:
                waiting |= self._pushed([rest.popleft() for _ in range(min(free, len(rest)))])
            for message in self.pull_messages(list(waiting)):
                answered = waiting.get(message.metadata.reply_to_message_id)
                if answered is not None:
                    node, last = answered.metadata.dst_node_id, time.monotonic()
                    waiting = {i: m for i, m in waiting.items() if m.metadata.dst_node_id != node}
                    yield message
            silent = [
                one
                for one in waiting.values()
                if one.metadata.message_type == "train" and one.metadata.dst_node_id not in repeated
            ]
            if silent and self._is_long(begun, last, timeout):
                repeated |= {one.metadata.dst_node_id for one in silent}
                again = [
                    Message(one.content, one.metadata.dst_node_id, "train",
                            group_id=one.metadata.group_id)
                    for one in silent
                ]  # fmt: skip
                _log.warning("%d nodes are silent, and are asked once more", len(again))
                waiting |= self._pushed(again)
            if waiting:
                time.sleep(self.look_s)

    def _pushed(self, messages: list[Message]) -> dict[str, Message]:
        """By id, what the SuperLink took."""
        return {i: m for i, m in zip(self.push_messages(messages), messages, strict=False) if i}

    def _is_long(self, begun: float, last: float, timeout: float | None) -> bool:
        now = time.monotonic()
        if timeout is not None and now > begun + timeout / 2:
            return True
        return last > begun and now - last > max(self.patience_s, last - begun)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends `messages`, which stay as they are; what many nodes get is packed once."""
        whole = list(messages)
        contents = [message.content for message in whole]
        made = {id(content): packed(content) for content in contents}
        self._largest = max([1, *map(record_bytes, made.values())])
        for message, content in zip(whole, contents, strict=True):
            message.content = made[id(content)]
        try:
            return self._grid.push_messages(whole)
        finally:
            for message, content in zip(whole, contents, strict=True):
                message.content = content  # and nothing holds what was packed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies that are there; one that cannot be unpacked comes as it is, to be refused."""
        waiting, few = list(message_ids), max(1, self.at_once // self._largest)
        for start in range(0, len(waiting), few):
            found = list(self._grid.pull_messages(waiting[start : start + few]))
            while found:
                message = found.pop(0)
                if message.has_content():
                    with suppress(WireError):
                        message.content = unpacked(message.content)
                yield message


@contextmanager
def quiet(log: Path, *, verbose: bool = False) -> Iterator[None]:
    """Flower's and Ray's chatter goes to the file `log`; `verbose` leaves it on the console too."""
    handler = logging.FileHandler(log, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("flwr", "ray", "fedfuse.node")]
    before = [(logger, list(logger.handlers), logger.propagate) for logger in loggers]
    for logger in loggers:
        if not verbose:
            logger.handlers.clear()
            logger.propagate = False
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers[:] = handlers
            logger.propagate = propagate
        handler.close()
