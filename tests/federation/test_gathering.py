"""Replies as they come: what is folded, what is kept, and under whose name."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
from flwr.app import Error, Message

from fedfuse.config import STRATEGIES, FederationConfig
from fedfuse.federation.flower import received, with_id
from fedfuse.federation.gathering import Everything, Gathering, RunningMean
from fedfuse.federation.strategy import build_strategy
from fedfuse.federation.wire import TrainReply, TrainRequest, Weights, encode, template_of
from tests.federation.requests import a_request

DRAW = np.random.default_rng(1)
START: Weights = {"w": np.zeros((3, 2), np.float32), "n": np.array([2], np.int64)}
TEMPLATE = template_of(START)
REQUEST = a_request(arrays=encode(START))


def update() -> Weights:
    return {"w": DRAW.normal(size=(3, 2)).astype(np.float32), "n": np.array([4], np.int64)}


def reply(node: int, name: str, weights: Weights | None, **changes: Any) -> Message:
    status = "ok" if weights is not None else "failed"
    answer = TrainReply(
        node=name,
        round=1,
        status=status,
        arrays=None if weights is None else encode(weights),
        **changes,
    )
    asked = with_id(Message(REQUEST.to_record(), dst_node_id=node, message_type="train"))
    return Message(answer.to_record(), reply_to=received(REQUEST.to_record(), asked.metadata))


def gathering(
    count: int, *, known: bool = True, fold: Any = None, request: TrainRequest = REQUEST
) -> Gathering:
    names = {node: f"n{node}" for node in range(1, count + 1)}
    return Gathering(
        request,
        fold or RunningMean(TEMPLATE),
        asked=names,
        known=names if known else {},
        template=TEMPLATE,
        counts=False,
    )


class Counting(RunningMean):
    """Looks at how many updates are alive while the next one comes."""

    def __init__(self) -> None:
        super().__init__(TEMPLATE)
        self.alive: list[weakref.ref[Any]] = []
        self.most = 0

    def add(self, node: str, weights: Weights, weight: float) -> None:
        super().add(node, weights, weight)
        self.alive.append(weakref.ref(weights["w"]))
        self.most = max(self.most, sum(ref() is not None for ref in self.alive))


def test_a_reply_is_folded_in_and_dropped() -> None:
    fold = Counting()
    some = gathering(200, fold=fold)
    for node in range(1, 201):
        some.take(reply(node, f"n{node}", update()))
    assert some.good == 200
    assert fold.most <= 2
    assert all(kept.arrays is None for kept in some.replies.values())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_those_that_rank_updates_keep_them(strategy: str) -> None:
    guarded = build_strategy(FederationConfig(strategy=strategy), private=True)
    some = guarded.gather(REQUEST, asked={1: "n1"}, template=TEMPLATE)
    kept = strategy in ("trimmed-mean", "median")
    assert isinstance(some.fold, Everything if kept else RunningMean)


def test_what_ranks_updates_gets_all_of_them_by_name() -> None:
    some = gathering(3, fold=Everything())
    updates = {node: update() for node in (3, 1, 2)}
    for node, weights in updates.items():
        some.take(reply(node, f"n{node}", weights))
    some.close()
    for (weights, weight), node in zip(some.fold.updates(), (1, 2, 3), strict=True):
        assert weight == 1.0
        np.testing.assert_array_equal(weights["w"], updates[node]["w"])


def test_the_order_of_coming_changes_no_bit() -> None:
    updates = {node: update() for node in range(1, 30)}
    means = []
    for order in (list(updates), list(reversed(updates))):
        some = gathering(len(updates))
        for node in order:
            some.take(reply(node, f"n{node}", updates[node]))
        some.close()
        means.append(some.fold.updates()[0][0])
    np.testing.assert_array_equal(means[0]["w"], means[1]["w"])
    exact = np.mean([u["w"].astype("f8") for u in updates.values()], axis=0)
    np.testing.assert_array_equal(means[0]["w"], exact.astype(np.float32))
    assert means[0]["n"].tolist() == [4]


def test_replies_are_in_the_order_of_nodes_whoever_came_first() -> None:
    some = gathering(3)
    for node in (2, 3, 1):
        some.take(reply(node, f"n{node}", update()))
    some.close()
    assert list(some.replies) == [1, 2, 3]


def test_a_node_keeps_its_name() -> None:
    some = gathering(3)
    some.take(reply(1, "n2", update()))
    some.take(reply(2, "n2", update()))
    some.close()
    assert list(some.replies) == [2]
    assert some.failures == {
        "n1": "it answers under another name than before",
        "n3": "no answer within the time limit",
    }


def test_a_newcomer_cannot_take_the_name_of_a_node_that_is_known() -> None:
    some = Gathering(
        REQUEST,
        RunningMean(TEMPLATE),
        asked={1: "n1", 2: "node 2"},
        known={1: "n1"},
        template=TEMPLATE,
        counts=False,
    )
    some.take(reply(2, "n1", update()))
    some.take(reply(1, "n1", update()))
    some.close()
    assert list(some.replies) == [1]
    assert some.failures == {"n1 (node 2)": "another node goes by the same name"}


def test_unknown_nodes_are_folded_in_at_the_end() -> None:
    some = gathering(3, known=False)
    for node, name in ((1, "twin"), (2, "twin"), (3, "other")):
        some.take(reply(node, name, update()))
    assert some.good == 0
    some.close()
    assert some.good == 1
    assert list(some.replies) == [3]


def test_a_failure_is_told_under_the_name_that_the_server_knows() -> None:
    some = gathering(2)
    some.take(reply(1, "id-1", None, problem="DataError"))
    asked = with_id(Message(REQUEST.to_record(), dst_node_id=2, message_type="train"))
    some.take(Message(Error(2, "gone"), reply_to=received(REQUEST.to_record(), asked.metadata)))
    some.close()
    assert some.failures == {"n1": "DataError", "n2": "gone"}
    assert some.replies[1].node == "n1"


def test_a_second_answer_and_one_that_nobody_asked_for_are_ignored() -> None:
    some = gathering(1)
    first = update()
    some.take(reply(1, "n1", first))
    some.take(reply(1, "n1", update()))
    some.take(reply(7, "n7", update()))
    some.close()
    np.testing.assert_array_equal(some.fold.updates()[0][0]["w"], first["w"])
