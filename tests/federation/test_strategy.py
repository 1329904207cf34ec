"""The guard, and what comes out of Flower's strategies behind it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

from fedfuse.config import STRATEGIES, FederationConfig
from fedfuse.errors import FederationError
from fedfuse.federation.flower import GridView, received, with_id
from fedfuse.federation.strategy import Aggregate, GuardedStrategy, build_strategy
from fedfuse.federation.wire import TrainReply, TrainRequest, Weights, encode, template_of
from fedfuse.train import Job
from tests.federation.requests import a_request

JOB = Job(steps=1, optimizer="sgd", learning_rate=0.1, momentum=0.0)
DRAW = np.random.default_rng(0)


class Nodes(GridView):
    """A grid that only says who is there."""

    def __init__(self, count: int) -> None:
        self._there = list(range(1, count + 1))

    def get_node_ids(self) -> list[int]:
        return self._there


def weights(scale: float = 1.0) -> Weights:
    return {
        "layer.weight": (scale * DRAW.normal(size=(4, 3))).astype(np.float32),
        "bias": np.array(scale * DRAW.normal(), dtype=np.float32),
        "count": np.array([7], dtype=np.int64),
    }


def request(start: Weights, round: int = 1) -> TrainRequest:
    return a_request(round=round, rounds=9, job=JOB, arrays=encode(start))


def reply_to(message: Message, name: str, value: Weights, **changes: Any) -> Message:
    reply = TrainReply(node=name, round=1, status="ok", arrays=encode(value), **changes)
    asked = received(message.content, with_id(message).metadata)
    return Message(reply.to_record(), reply_to=asked)


def one_round(
    strategy: GuardedStrategy,
    start: Weights,
    updates: dict[str, Weights],
    *,
    round: int = 1,
    shuffle: bool = False,
) -> Aggregate:
    asked = request(start, round)
    messages = strategy.configure_train(asked, Nodes(len(updates)), seed=0)
    replies = []
    for message, (name, value) in zip(messages, updates.items(), strict=True):
        arrays = ArrayRecord({key: Array(np.asarray(value[key])) for key in value})
        reply = TrainReply(node=name, round=round, status="ok", arrays=arrays)
        replies.append(Message(reply.to_record(), reply_to=with_id(message)))
    if shuffle:
        replies.reverse()
    names = {message.metadata.dst_node_id: "?" for message in messages}
    return strategy.aggregate_train(asked, replies, asked=names, template=template_of(start))


def oracle(name: str, start: Weights, rounds: list[list[Weights]]) -> Weights:
    """Each strategy in float64 NumPy, from the papers."""
    config = FederationConfig()
    lr = 0.01 if name in ("fedadam", "fedyogi") else 1.0
    beta, tau, beta_2 = config.server_momentum, config.tau, 0.99
    x = {k: v.astype(np.float64) for k, v in start.items()}
    m = {k: np.zeros_like(v) for k, v in x.items()}
    v = {k: np.zeros_like(v) for k, v in x.items()}
    for t, updates in enumerate(rounds, 1):
        stacks = {k: np.stack([u[k].astype(np.float64) for u in updates]) for k in x}
        mean = {k: s.mean(0) for k, s in stacks.items()}
        for k in x:
            delta = mean[k] - x[k]
            match name:
                case "fedavg" | "fedprox":
                    x[k] = mean[k]
                case "median":
                    x[k] = np.median(stacks[k], axis=0)
                case "trimmed-mean":
                    cut = int(config.trim * len(updates))
                    x[k] = np.sort(stacks[k], axis=0)[cut : len(updates) - cut].mean(0)
                case "fedavgm":
                    m[k] = beta * m[k] + delta
                    x[k] = x[k] + lr * m[k]
                case "fedadam":
                    m[k] = beta * m[k] + (1 - beta) * delta
                    v[k] = beta_2 * v[k] + (1 - beta_2) * delta**2
                    eta = lr * np.sqrt(1 - beta_2 ** (t + 1)) / (1 - beta ** (t + 1))
                    x[k] = x[k] + eta * m[k] / (np.sqrt(v[k]) + tau)
                case "fedyogi":
                    m[k] = beta * m[k] + (1 - beta) * delta
                    v[k] = v[k] - (1 - beta_2) * delta**2 * np.sign(v[k] - delta**2)
                    x[k] = x[k] + lr * m[k] / (np.sqrt(v[k]) + tau)
    return {k: np.asarray(value) for k, value in x.items()}


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_strategy_agrees_with_numpy_and_keeps_types(name: str) -> None:
    start = weights()
    rounds = [[weights() for _ in range(5)] for _ in range(3)]
    strategy = build_strategy(FederationConfig(strategy=name), private=True)
    current = start
    for round, updates in enumerate(rounds, 1):
        named = {f"n{i}": update for i, update in enumerate(updates)}
        current = one_round(strategy, current, named, round=round).weights
    expected = oracle(name, start, rounds)
    for key, value in current.items():
        assert value.dtype == start[key].dtype
        assert value.shape == start[key].shape
        np.testing.assert_allclose(value, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_restored_strategy_goes_on_as_if_nothing_had_been(name: str) -> None:
    start = weights()
    rounds = [{f"n{i}": weights() for i in range(3)} for _ in range(2)]
    whole = build_strategy(FederationConfig(strategy=name), private=True)
    middle = one_round(whole, start, rounds[0]).weights
    saved = {key: np.array(value) for key, value in whole.state().items()}
    expected = one_round(whole, middle, rounds[1], round=2).weights
    resumed = build_strategy(FederationConfig(strategy=name), private=True)
    resumed.restore(saved)
    for key, value in one_round(resumed, middle, rounds[1], round=2).weights.items():
        np.testing.assert_array_equal(value, expected[key])


def test_the_order_of_replies_changes_nothing() -> None:
    start, updates = weights(), {f"n{i}": weights(1e4**i) for i in range(4)}
    strategy = build_strategy(FederationConfig(), private=True)
    one = one_round(strategy, start, updates).weights
    other = one_round(strategy, start, dict(reversed(updates.items())), shuffle=True).weights
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_order_of_names_in_a_reply_changes_nothing(name: str) -> None:
    start, update = weights(), weights()
    turned = dict(reversed(update.items()))
    one, other = (
        one_round(build_strategy(FederationConfig(strategy=name), private=True), start, {"a": u})
        for u in (update, turned)
    )
    for key in one.weights:
        np.testing.assert_array_equal(one.weights[key], other.weights[key])


def test_bad_replies_are_dropped_and_named() -> None:
    start, good = weights(), weights()
    strategy = build_strategy(FederationConfig(), private=True)
    asked = request(start)
    messages = [with_id(m) for m in strategy.configure_train(asked, Nodes(8), seed=0)]
    nan = good | {"bias": np.array(np.nan, dtype=np.float32)}
    thin = good | {"layer.weight": good["layer.weight"][:1]}
    record = reply_to(messages[2], "n3", good).content
    record["second"] = encode(good)
    refused = TrainReply(node="n7", round=1, status="refused", problem="BudgetExceeded: no")
    replies = [
        reply_to(messages[0], "n1", nan),
        reply_to(messages[1], "n2", thin),
        Message(record, reply_to=messages[2]),
        reply_to(messages[3], "n4", good, weight=5.0),
        Message(Error(2, "the worker process died"), reply_to=messages[4]),
        Message(RecordDict(), reply_to=messages[5]),
        Message(refused.to_record(), reply_to=messages[6]),
        reply_to(messages[7], "n8", good),
        reply_to(messages[7], "n8", nan),
    ]
    names = {i: f"n{i}" for i in range(1, 9)}
    outcome = strategy.aggregate_train(asked, replies, asked=names, template=template_of(start))
    assert set(outcome.failures) == {f"n{i}" for i in range(1, 8)}
    assert "not finite" in outcome.failures["n1"]
    assert "shape" in outcome.failures["n2"]
    assert "weight = 5" in outcome.failures["n4"]
    assert outcome.failures["n5"] == "the worker process died"
    assert outcome.failures["n7"] == "BudgetExceeded: no"
    for key, value in outcome.weights.items():
        np.testing.assert_array_equal(value, good[key])


def test_two_nodes_of_one_name_are_both_dropped() -> None:
    start = weights()
    strategy = build_strategy(FederationConfig(), private=True)
    asked = request(start)
    messages = [with_id(m) for m in strategy.configure_train(asked, Nodes(3), seed=0)]
    replies = [
        reply_to(message, name, start)
        for message, name in zip(messages, ("twin", "twin", "other"), strict=True)
    ]
    outcome = strategy.aggregate_train(
        asked, replies, asked={1: "a", 2: "b", 3: "c"}, template=template_of(start)
    )
    assert [reply.node for reply in outcome.replies.values()] == ["other"]
    assert len(outcome.failures) == 2


def test_a_reply_that_nobody_asked_for_is_ignored() -> None:
    start = weights()
    strategy = build_strategy(FederationConfig(), private=True)
    asked = request(start)
    messages = [with_id(m) for m in strategy.configure_train(asked, Nodes(2), seed=0)]
    replies = [reply_to(messages[0], "a", start), reply_to(messages[1], "b", weights(100))]
    outcome = strategy.aggregate_train(asked, replies, asked={1: "a"}, template=template_of(start))
    for key, value in outcome.weights.items():
        np.testing.assert_array_equal(value, start[key])


def test_too_few_good_updates_fail_the_round_and_name_the_failures() -> None:
    start = weights()
    strategy = build_strategy(FederationConfig(min_nodes=2), private=True)
    asked = request(start)
    messages = [with_id(m) for m in strategy.configure_train(asked, Nodes(2), seed=0)]
    replies = [
        reply_to(messages[0], "a", start),
        Message(Error(2, "boom"), reply_to=messages[1]),
    ]
    with pytest.raises(FederationError, match=r"1 of 2 nodes gave a good update.*b: boom"):
        strategy.aggregate_train(
            asked, replies, asked={1: "a", 2: "b"}, template=template_of(start)
        )
    with pytest.raises(FederationError, match="no answer within the time limit"):
        strategy.aggregate_train(asked, [], asked={1: "a", 2: "b"}, template=template_of(start))


def test_an_aggregate_that_overflows_is_not_passed_on() -> None:
    config = FederationConfig(strategy="fedavgm", server_learning_rate=1e6)
    start, far = weights(), weights(1e35)
    with pytest.raises(FederationError, match="cannot be used"), np.errstate(all="ignore"):
        one_round(build_strategy(config, private=True), start, {"a": far})


def test_counts_weigh_only_where_nothing_is_promised() -> None:
    config = FederationConfig(weighting="examples")
    start, light, heavy = weights(), weights(), weights()
    strategy = build_strategy(config, private=False)
    asked = request(start)
    messages = [with_id(m) for m in strategy.configure_train(asked, Nodes(2), seed=0)]
    replies = [
        reply_to(messages[0], "a", light, weight=1.0),
        reply_to(messages[1], "b", heavy, weight=3.0),
    ]
    outcome = strategy.aggregate_train(
        asked, replies, asked={1: "a", 2: "b"}, template=template_of(start)
    )
    np.testing.assert_allclose(
        outcome.weights["layer.weight"],
        0.25 * light["layer.weight"] + 0.75 * heavy["layer.weight"],
        rtol=1e-5,
    )


def test_which_nodes_are_drawn_follows_from_the_seed_and_the_round() -> None:
    strategy = build_strategy(FederationConfig(fraction=0.3), private=True)

    def drawn(seed: int, round: int) -> list[int]:
        messages = strategy.configure_train(request(weights(), round), Nodes(20), seed=seed)
        return [message.metadata.dst_node_id for message in messages]

    assert len(drawn(0, 1)) == 6
    assert drawn(0, 1) == drawn(0, 1)
    assert drawn(0, 1) != drawn(0, 2)
    assert drawn(0, 1) != drawn(1, 1)


def test_unknown_strategies_are_refused() -> None:
    with pytest.raises(FederationError, match="unknown"):
        build_strategy(dataclasses.replace(FederationConfig(), strategy="magic"), private=True)
