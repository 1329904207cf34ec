"""The loopback engine: its workers, their deaths, and what it touches of Flower."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedfuse.errors import FederationError
from fedfuse.federation.books import DurableContext
from fedfuse.federation.client import SimulatedApp
from fedfuse.federation.flower import SERVER_ID, received, take_identity, with_id
from fedfuse.federation.loopback import LoopbackGrid, threads_of, worker_count


def make_echo() -> ClientApp:
    """Answers with what came, changed in place, and counts its calls in the node's state."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        order = message.content.config_records["config"]
        count = context.state.config_records.get("count", ConfigRecord({"n": 0}))
        count["n"] = int(count["n"]) + 1  # type: ignore[call-overload]
        context.state["count"] = count
        if isinstance(context, DurableContext):
            context.keep()
        if order.get("die") == context.node_id:
            os.kill(os.getpid(), signal.SIGKILL)
        if order.get("sleep") == context.node_id:
            time.sleep(60)
        if order.get("raise") == context.node_id:
            raise RuntimeError("record 17 of /data/secret is odd")
        reply = RecordDict(
            {
                "config": ConfigRecord(
                    {
                        "pid": os.getpid(),
                        "seen": bool(order.get("seen", False)),
                        "count": count["n"],
                        "partition": context.node_config["partition-id"],
                    }
                )
            }
        )
        order["seen"] = True
        message.content.array_records["arrays"].clear()
        return Message(reply, reply_to=message)

    return app


def make_large() -> ClientApp:
    """Answers with 100,000 numbers, each the node's own."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        seen = message.content.array_records["arrays"]["0"].numpy()
        values = np.full(100_000, context.node_id + float(seen.sum()), np.float32)
        return Message(RecordDict({"arrays": ArrayRecord([values])}), reply_to=message)

    return app


def make_nothing() -> ClientApp:
    raise SystemExit(3)


def grid(nodes: int = 4, workers: int = 2, **more: Callable[..., None]) -> LoopbackGrid:
    settings = [{"partition-id": index} for index in range(nodes)]
    return LoopbackGrid(make_echo, settings, workers=workers, **more)  # type: ignore[arg-type]


def ask(grid: LoopbackGrid, *, timeout: float = 60, **order: int) -> dict[int, Message]:
    content = RecordDict(
        {"arrays": ArrayRecord([np.ones(10, np.float32)]), "config": ConfigRecord(dict(order))}
    )
    messages = [
        Message(content, dst_node_id=node, message_type="train") for node in grid.get_node_ids()
    ]
    replies = grid.send_and_receive(messages, timeout=timeout)
    return {reply.metadata.src_node_id: reply for reply in replies}


def said(reply: Message, key: str) -> object:
    return reply.content.config_records["config"][key]


def test_each_node_gets_its_own_copy_and_keeps_its_own_state() -> None:
    heard: list[int] = []
    with grid(on_reply=lambda node, message: heard.append(node)) as nodes:
        first, second = ask(nodes), ask(nodes)
        pids = set(nodes.pids)
        assert sorted(first) == sorted(second) == [1, 2, 3, 4]
        for node in first:
            assert said(first[node], "partition") == node - 1
            assert not said(first[node], "seen")
            assert not said(second[node], "seen")
            assert said(second[node], "count") == 2
            assert said(second[node], "pid") in pids
        assert nodes.state(3).config_records["count"]["n"] == 2
        assert sorted(heard) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert all(_gone(pid) for pid in pids)


def test_replies_refer_to_what_they_answer() -> None:
    with grid(nodes=2) as nodes:
        content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord()})
        asked = [Message(content, dst_node_id=n, message_type="train") for n in (1, 2)]
        numbers = list(nodes.push_messages(asked))
        replies = list(nodes.pull_messages(numbers))
        assert [reply.metadata.reply_to_message_id for reply in replies] == numbers
        assert list(nodes.pull_messages(numbers)) == []


def test_a_worker_that_is_killed_costs_one_reply_and_is_replaced() -> None:
    with grid() as nodes:
        before = set(nodes.pids)
        replies = ask(nodes, die=2)
        assert sorted(replies) == [1, 2, 3, 4]
        assert replies[2].has_error()
        assert replies[2].error.reason == "the worker process died"
        assert [n for n, reply in replies.items() if reply.has_error()] == [2]
        assert len(set(nodes.pids) - before) == 1
        # What the node put in safety before it died is still there.
        assert nodes.state(2).config_records["count"]["n"] == 1
        again = ask(nodes)
        assert not any(reply.has_error() for reply in again.values())
        assert said(again[2], "count") == 2


def test_an_idle_worker_that_is_killed_is_noticed() -> None:
    with grid() as nodes:
        ask(nodes)
        os.kill(nodes.pids[0], signal.SIGKILL)
        time.sleep(0.2)
        replies = ask(nodes)
        assert sorted(replies) == [1, 2, 3, 4]
        assert sum(reply.has_error() for reply in replies.values()) <= 1
        assert not any(reply.has_error() for reply in ask(nodes).values())


def test_what_is_not_there_in_time_is_left_out_and_stopped() -> None:
    with grid() as nodes:
        ask(nodes)
        before = set(nodes.pids)
        began = time.monotonic()
        replies = ask(nodes, timeout=2, sleep=1)
        assert time.monotonic() - began < 20
        assert sorted(replies) == [2, 3, 4]
        assert len(before - set(nodes.pids)) == 1
        assert sorted(ask(nodes)) == [1, 2, 3, 4]


def test_large_replies_come_whole_one_by_one_and_together() -> None:
    settings = [{"partition-id": index} for index in range(9)]
    content = RecordDict({"arrays": ArrayRecord([np.ones(10, np.float32)])})

    def asked() -> list[Message]:
        return [Message(content, dst_node_id=n, message_type="train") for n in range(1, 10)]

    def right(reply: Message) -> bool:
        values = reply.content.array_records["arrays"]["0"].numpy()
        return values.shape == (100_000,) and bool(
            (values == reply.metadata.src_node_id + 10).all()
        )

    with LoopbackGrid(make_large, settings, workers=2) as nodes:
        seen = [(right(reply), reply.metadata.src_node_id) for reply in nodes.replies(asked())]
        assert sorted(seen) == [(True, node) for node in range(1, 10)]
        together = list(nodes.send_and_receive(asked()))
        assert [reply.metadata.src_node_id for reply in together] == list(range(1, 10))
        assert all(right(reply) for reply in together)


def test_messages_that_differ_are_each_answered_for_themselves() -> None:
    settings = [{"partition-id": index} for index in range(6)]
    with LoopbackGrid(make_large, settings, workers=2) as nodes:
        asked = [
            Message(
                RecordDict({"arrays": ArrayRecord([np.full(1, n * 100, np.float32)])}),
                dst_node_id=n,
                message_type="train",
            )
            for n in range(1, 7)
        ]
        for reply in nodes.replies(asked):
            values = reply.content.array_records["arrays"]["0"].numpy()
            assert values[0] == 101 * reply.metadata.src_node_id


def test_tasks_behind_one_that_dies_go_to_others() -> None:
    with grid(nodes=60) as nodes:
        ask(nodes)  # now it is known how short they are, and many are given at once
        replies = ask(nodes, die=30)
        assert [n for n, reply in replies.items() if reply.has_error()] == [30]
        assert sorted(replies) == list(range(1, 61))
        again = ask(nodes)
        assert {n: said(reply, "count") for n, reply in again.items()} == dict.fromkeys(again, 3)


def make_group() -> ClientApp:
    """Answers for several nodes in one go, and says for how many; dies where one of them is to."""

    def together(asked: Sequence[tuple[Message, Context]]) -> list[Message]:
        replies = []
        for message, context in asked:
            order = message.content.config_records["config"]
            if isinstance(context, DurableContext):
                context.state["begun"] = ConfigRecord({"yes": True})
                context.keep()
            told = ConfigRecord({"group": len(asked), "pid": os.getpid()})
            replies.append(Message(RecordDict({"config": told}), reply_to=message))
        if any(order.get("die") == context.node_id for _, context in asked):
            os.kill(os.getpid(), signal.SIGKILL)
        return replies

    return SimulatedApp(together)


def grouped(nodes: int) -> LoopbackGrid:
    settings = [{"partition-id": index} for index in range(nodes)]
    return LoopbackGrid(make_group, settings, workers=2, together=8)  # type: ignore[arg-type]


def test_nodes_are_asked_together_where_there_are_enough() -> None:
    with grouped(20) as nodes:
        groups = {n: said(reply, "group") for n, reply in ask(nodes).items()}
        assert sorted(groups) == list(range(1, 21))
        assert set(groups.values()) == {8, 4}
    with grouped(6) as nodes:
        assert {said(reply, "group") for reply in ask(nodes).values()} == {3}


def test_a_worker_that_is_killed_costs_the_group_that_it_had_begun() -> None:
    with grouped(20) as nodes:
        replies = ask(nodes, die=2)
        lost = [n for n, reply in replies.items() if reply.has_error()]
        assert lost == list(range(1, 9))
        assert sorted(replies) == list(range(1, 21))
        # What they put in safety before it died is still there: nothing is spent unseen.
        assert all(nodes.state(n)["begun"] for n in lost)


def test_who_wants_no_more_replies_leaves_no_stale_work() -> None:
    with grid() as nodes:
        while len({said(reply, "pid") for reply in ask(nodes).values()}) < 2:
            pass  # until both workers are there
        content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord({"sleep": 2})})
        asked = [Message(content, dst_node_id=n, message_type="train") for n in (1, 2, 3)]
        before = set(nodes.pids)
        for reply in nodes.replies(asked):
            assert reply.metadata.src_node_id != 2
            break
        assert before - set(nodes.pids)
        assert sorted(ask(nodes)) == [1, 2, 3, 4]


def test_many_nodes_open_no_more_files_than_few() -> None:
    def files(pids: tuple[int, ...]) -> list[int]:
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), *pids)]  # noqa: PTH208

    with grid(nodes=400) as nodes:
        for _ in range(50):  # until each worker has been at work
            if len({said(reply, "pid") for reply in ask(nodes).values()}) == 2:
                break
        before = files(nodes.pids)
        for _ in range(3):
            assert len(ask(nodes)) == 400
        assert files(nodes.pids) == before


def test_all_cores_are_shared_out_and_none_twice() -> None:
    for workers in range(1, 9):
        assert sum(threads_of(n, workers, 8) for n in range(workers)) == 8
    assert [threads_of(n, 5, 2) for n in range(5)] == [1] * 5


def test_an_error_leaves_without_its_text() -> None:
    with grid() as nodes:
        replies = ask(nodes, **{"raise": 3})
        assert replies[3].error.reason == "RuntimeError"
        assert sum(reply.has_error() for reply in replies.values()) == 1


def test_a_worker_that_cannot_start_is_an_error_with_a_hint() -> None:
    with (
        LoopbackGrid(make_nothing, [{"partition-id": 0}]) as nodes,
        pytest.raises(FederationError, match="while they are starting") as caught,
    ):
        ask(nodes)
    assert "__main__" in caught.value.hint


def test_workers_are_as_many_as_asked_but_never_more_than_nodes() -> None:
    cores = len(os.sched_getaffinity(0))
    assert worker_count(0, 100) == cores
    assert worker_count(3, 100) == 3
    assert worker_count(8, 2) == 2
    assert worker_count(0, 100, gpus=1) == 1


def test_flower_still_has_what_this_package_touches() -> None:
    """Fails when Flower changes one of the three private things in `flower.py`."""
    take_identity()
    assert (TaskIdentity.task_id, TaskIdentity.run_id) == (1, 1)
    message = Message(RecordDict(), dst_node_id=1, message_type="train")
    assert message.metadata.src_node_id == SERVER_ID
    assert message.metadata.message_id == ""
    with_id(message)
    assert len(message.metadata.message_id) == 32
    copy = received(RecordDict(), message.metadata)
    assert copy.metadata.message_id == message.metadata.message_id
    reply = Message(RecordDict(), reply_to=copy)
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (1, SERVER_ID)


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
