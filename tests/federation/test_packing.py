"""Arrays that travel as one: the same on arrival, and whatever else comes is refused or left."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.errors import WireError
from fedfuse.federation.flower import GridView, PackedGrid, received, replies, with_id
from fedfuse.federation.packing import packed, record_bytes, unpacked
from fedfuse.federation.wire import decode, encode, template_of

WEIGHTS: dict[str, Any] = {
    "left.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "steps": np.array(7, dtype=np.int64),
    "zero": np.zeros((0, 4), dtype=np.float16),
}


def a_record() -> RecordDict:
    return RecordDict(
        {
            "arrays": encode(WEIGHTS),
            "config": ConfigRecord({"round": 3}),
            "metrics": MetricRecord({"weight": 1.0}),
        }
    )


def test_a_record_comes_back_as_it_was_and_is_one_array_meanwhile() -> None:
    record = a_record()
    small = packed(record)
    assert [len(arrays) for arrays in small.array_records.values()] == [1]
    assert list(record["arrays"]) == sorted(WEIGHTS)  # it was not changed itself
    assert record_bytes(small) < record_bytes(record) + 400
    back = unpacked(small)
    assert back.object_id == record.object_id
    assert unpacked(back).object_id == record.object_id
    found = decode(back["arrays"], template_of(WEIGHTS))
    assert all(np.array_equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


def as_packed(data: bytes) -> RecordDict:
    """What a stranger may put where packed arrays are expected."""
    array = Array("uint8", (len(data),), "fedfuse.packed", data)
    return RecordDict({"arrays": ArrayRecord({"packed": array})})


def of(outline: Any, body: bytes = b"") -> bytes:
    head = outline if isinstance(outline, bytes) else json.dumps(outline).encode()
    return struct.pack(">Q", len(head)) + head + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack(">Q", 1 << 62),
        of(b"{"),
        of(b"[" * 100_000),
        of({"a": 1}),
        of([["a", "float32", [1], "numpy.ndarray", 5]], b"1234"),
        of([["a", "float32", [1], "numpy.ndarray", -1]]),
        of([["a", "float32", [1], "numpy.ndarray", True]], b"1"),
        of([["a", "float32", ["1"], "numpy.ndarray", 0]]),
        of([["a", "float32", None, "numpy.ndarray", 0]]),
        of([[1, "float32", [1], "numpy.ndarray", 0]]),
        of([["a", "float32", [1], "numpy.ndarray"]]),
        of([], b"more"),
    ],
)
def test_what_cannot_be_read_is_refused(data: bytes) -> None:
    with pytest.raises(WireError, match="packed arrays"):
        unpacked(as_packed(data))


@given(st.binary(max_size=200), st.integers(0, 400))
def test_bytes_changed_on_the_way_are_read_or_refused_and_nothing_else(
    change: bytes, place: int
) -> None:
    data = bytearray(next(iter(packed(a_record())["arrays"].values())).data)
    data[place : place + len(change)] = change
    with suppress(WireError):
        unpacked(as_packed(bytes(data)))


class Echo(GridView):
    """A grid of Flower's: what goes to a node comes back from it; from node 5, spoilt."""

    def __init__(self) -> None:
        self.sent: dict[str, tuple[Message, RecordDict]] = {}
        self.pulls: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        return [4, 5]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.sent = {
            with_id(message).metadata.message_id: (message, message.content) for message in messages
        }
        return list(self.sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        self.pulls.append(len(ids))
        for message, content in map(self.sent.__getitem__, ids):
            if message.metadata.dst_node_id == 5:
                content = as_packed(b"nothing")
            yield Message(content, reply_to=received(content, message.metadata))


def test_a_grid_packs_what_goes_and_unpacks_what_comes_and_passes_on_what_it_cannot_read() -> None:
    flower, record = Echo(), a_record()
    grid = PackedGrid(flower)
    assert list(grid.get_node_ids()) == [4, 5]
    messages = [Message(record, dst_node_id=node, message_type="train") for node in (4, 5)]
    found = list(replies(grid, messages, timeout=10))
    (_, first), (_, second) = flower.sent.values()
    assert len(first["arrays"]) == 1
    assert first is second  # packed once for both
    assert all(message.content is record for message in messages)  # and not held any more
    assert found[0].content.object_id == record.object_id
    with pytest.raises(WireError):
        decode(found[1].content["arrays"], template_of(WEIGHTS))


def test_large_replies_come_a_few_at_a_time() -> None:
    def pulls(at_once: int) -> list[int]:
        flower = Echo()
        grid = PackedGrid(flower)
        grid.at_once = at_once
        messages = [Message(a_record(), dst_node_id=n, message_type="train") for n in range(5)]
        assert len(list(replies(grid, messages, timeout=10))) == 5
        return flower.pulls

    size = record_bytes(packed(a_record()))
    assert pulls(5 * size) == [5]
    assert pulls(2 * size) == [2, 2, 1]
    assert pulls(1) == [1] * 5


class Forgetful(Echo):
    """What goes to node 7 is lost the first time, and comes twice from node 8."""

    def __init__(self) -> None:
        super().__init__()
        self.pushed: list[list[int]] = []
        self.there: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        whole = [with_id(message) for message in messages]
        self.pushed.append([message.metadata.dst_node_id for message in whole])
        for message in whole:
            node = message.metadata.dst_node_id
            lost = node == 9 or (node == 7 and len(self.pushed) == 1)
            asked = received(message.content, message.metadata)
            copies = 0 if lost else 2 if node == 8 else 1
            self.there += [Message(message.content, reply_to=asked) for _ in range(copies)]
        return [message.metadata.message_id for message in whole]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids, whole = set(message_ids), self.there
        self.there = [m for m in whole if m.metadata.reply_to_message_id not in ids]
        return [m for m in whole if m.metadata.reply_to_message_id in ids]


@pytest.mark.parametrize(
    ("kind", "patience_s", "timeout", "again"),
    [
        ("train", 0.0, 5.0, [7]),  # long after the others
        ("train", 60.0, 0.2, [7]),  # half of the time
        ("train", 60.0, None, []),
        ("query", 0.0, 0.2, []),
    ],
)
def test_a_node_whose_request_was_lost_is_asked_once_more(
    kind: str, patience_s: float, timeout: float | None, again: list[int]
) -> None:
    flower = Forgetful()
    grid = PackedGrid(flower)
    grid.patience_s, grid.look_s = patience_s, 0.01
    nodes = [6, 7, 8] if timeout else [6, 8]
    messages = [Message(a_record(), dst_node_id=node, message_type=kind) for node in nodes]
    found = [m.metadata.src_node_id for m in replies(grid, messages, timeout=timeout)]
    assert found == ([6, 8, 7] if again else [6, 8])
    assert flower.pushed == [nodes, again] if again else [nodes]


def test_a_node_that_stays_silent_is_asked_twice_at_the_most() -> None:
    flower = Forgetful()
    grid = PackedGrid(flower)
    grid.patience_s, grid.look_s = 0.0, 0.01
    messages = [Message(a_record(), dst_node_id=node, message_type="train") for node in (6, 9)]
    assert len(list(replies(grid, messages, timeout=0.3))) == 1
    assert flower.pushed == [[6, 9], [9]]


def test_so_many_nodes_are_at_work_at_a_time_and_a_lost_request_keeps_nobody_waiting() -> None:
    flower = Forgetful()
    grid = PackedGrid(flower, at_a_time=2)
    grid.patience_s, grid.look_s = 0.0, 0.01
    messages = [
        Message(a_record(), dst_node_id=node, message_type="train") for node in (1, 7, 2, 3, 8)
    ]
    found = [m.metadata.src_node_id for m in replies(grid, messages, timeout=5.0)]
    assert sorted(found) == [1, 2, 3, 7, 8]
    assert flower.pushed[0] == [1, 7]
    assert all(len(pushed) <= 2 for pushed in flower.pushed)
    assert sorted(node for pushed in flower.pushed for node in pushed) == [1, 2, 3, 7, 7, 8]


def test_nobody_is_asked_once_the_time_is_up() -> None:
    flower = Forgetful()
    grid = PackedGrid(flower, at_a_time=1)
    grid.patience_s, grid.look_s = 60.0, 0.01
    messages = [Message(a_record(), dst_node_id=node, message_type="train") for node in (9, 1)]
    assert list(replies(grid, messages, timeout=0.2)) == []
    assert flower.pushed == [[9], [9]]
