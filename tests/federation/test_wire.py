"""The protocol: what is written is read again, and nothing else is."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedfuse.config import RunConfig
from fedfuse.errors import WireError
from fedfuse.federation.wire import (
    TrainReply,
    TrainRequest,
    config_digest,
    decode,
    encode,
    event_of,
    template_of,
)
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.train import Job
from tests.federation.requests import a_request

WEIGHTS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(1.5, dtype=np.float32),
    "steps": np.array([3], dtype=np.int64),
}
TEMPLATE = template_of(WEIGHTS)
MECHANISM = Mechanism(
    unit=Unit.RECORD, sample_rate=0.25, noise_multiplier=1.5, clip_norm=1.0, steps=4
)
JOB = Job(
    steps=4,
    optimizer="sgd",
    learning_rate=0.1,
    momentum=0.9,
    expected_batch=10.0,
    mechanism=MECHANISM,
)
REQUEST = a_request(round=2, rounds=5, job=JOB, arrays=encode(WEIGHTS))
REPLY = TrainReply(
    node="site-a",
    round=2,
    status="ok",
    event=event_of(MECHANISM, node="site-a", round=2, status="spent"),
    arrays=encode(WEIGHTS),
)


def read_reply(record: RecordDict, *, counts: bool = False) -> TrainReply:
    return TrainReply.from_record(record, request=REQUEST, template=TEMPLATE, counts=counts)


positive = st.floats(1e-6, 1.0, allow_nan=False)
arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
    elements=st.floats(-1e6, 1e6, width=32),
)


@given(
    weights=st.dictionaries(st.text(min_size=1, max_size=8), arrays, min_size=1, max_size=4),
    rate=positive,
    sigma=positive,
    steps=st.integers(1, 1000),
    learning_rate=positive,
    private=st.booleans(),
)
def test_a_request_comes_through_as_it_was(
    weights: dict[str, Any],
    rate: float,
    sigma: float,
    steps: int,
    learning_rate: float,
    private: bool,
) -> None:
    mechanism = dataclasses.replace(
        MECHANISM, sample_rate=rate, noise_multiplier=sigma, steps=steps
    )
    job = dataclasses.replace(
        JOB,
        steps=steps,
        learning_rate=learning_rate,
        mechanism=mechanism if private else None,
    )
    request = dataclasses.replace(REQUEST, job=job, arrays=encode(weights))
    read = TrainRequest.from_record(request.to_record())
    assert read.job == job
    assert (read.round, read.rounds, read.digest) == (2, 5, REQUEST.digest)
    back = decode(read.arrays, template_of(weights))
    assert set(back) == set(weights)
    for name, value in weights.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        np.testing.assert_array_equal(back[name], value)


def test_a_reply_comes_through_as_it_was() -> None:
    assert read_reply(REPLY.to_record()) == REPLY
    refused = TrainReply(node="site-a", round=2, status="refused", problem="BudgetExceeded: no")
    assert read_reply(refused.to_record()) == refused
    lost = dataclasses.replace(
        refused,
        status="failed",
        event=event_of(MECHANISM, node="site-a", round=2, status="reserved"),
    )
    assert read_reply(lost.to_record()) == lost


def test_events_and_mechanisms_go_over_into_each_other() -> None:
    event = event_of(MECHANISM, node="x", round=1, status="spent")
    assert event.mechanism == MECHANISM


def test_what_flower_adds_to_a_request_is_allowed() -> None:
    record = REQUEST.to_record()
    record.config_records["config"]["server-round"] = 2
    record.config_records["config"]["proximal-mu"] = 0.1
    assert TrainRequest.from_record(record).job == JOB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": 1}, "protocol 1"),
        ({"protocol": "1"}, "must be int"),
        ({"version": "0.0.0"}, "runs fedfuse 0.0.0"),
        ({"round": 6}, "round = 6"),
        ({"round": 0}, "round = 0"),
        ({"round": True}, "must be int"),
        ({"rounds": 10**9}, "rounds = 1000000000"),
        ({"deadline": math.inf}, "not finite"),
        ({"job.learning_rate": math.nan}, "not finite"),
        ({"job.learning_rate": -1.0}, "learning_rate = -1"),
        ({"job.steps": 5}, "5 steps are asked for, but 4 accounted"),
        ({"job.optimizer": "evil"}, "optimizer"),
        ({"job.expected_batch": 0.0}, "expected_batch"),
        ({"mechanism.sample_rate": 0.0}, "not a mechanism"),
        ({"mechanism.noise_multiplier": 0.0}, "not a mechanism"),
        ({"mechanism.unit": "none"}, "not a mechanism"),
        ({"mechanism.unit": "planet"}, "not a mechanism"),
        ({"query": "all records"}, "not part of the protocol"),
    ],
)
def test_a_request_that_is_wrong_is_refused(changes: dict[str, Any], message: str) -> None:
    record = REQUEST.to_record()
    record.config_records["config"].update(changes)
    with pytest.raises(WireError, match=message):
        TrainRequest.from_record(record)


def test_a_request_that_lacks_something_is_refused() -> None:
    for key in REQUEST.to_record().config_records["config"]:
        record = REQUEST.to_record()
        del record.config_records["config"][key]
        with pytest.raises(WireError):
            TrainRequest.from_record(record)


def test_records_beside_those_of_the_protocol_are_refused() -> None:
    extra = REQUEST.to_record()
    extra["more"] = ConfigRecord({"a": 1})
    two = REQUEST.to_record()
    two["arrays2"] = encode(WEIGHTS)
    metrics = REQUEST.to_record()
    metrics["metrics"] = MetricRecord({"loss": 0.5})
    for record in (extra, two, metrics, RecordDict()):
        with pytest.raises(WireError):
            TrainRequest.from_record(record)


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf, 2, 0.5])
def test_a_weight_that_is_not_one_is_refused(weight: float) -> None:
    record = REPLY.to_record()
    record["metrics"] = MetricRecord({"weight": weight})
    with pytest.raises(WireError, match="weight"):
        read_reply(record)


def test_a_count_is_a_weight_only_where_nothing_is_promised() -> None:
    record = dataclasses.replace(REPLY, weight=37.0).to_record()
    with pytest.raises(WireError, match="equal"):
        read_reply(record)
    assert read_reply(record, counts=True).weight == 37


@pytest.mark.parametrize(
    "metrics",
    [{"weight": 1.0, "loss": 0.3}, {"loss": 1.0}, {}, {"weight": [1.0]}],
)
def test_metrics_beside_the_weight_are_refused(metrics: dict[str, Any]) -> None:
    record = REPLY.to_record()
    record["metrics"] = MetricRecord(metrics)
    with pytest.raises(WireError):
        read_reply(record)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"round": 3}, "answer to round 3"),
        ({"status": "fine"}, "status"),
        ({"node": ""}, "name"),
        ({"node": "a\x1b[2J"}, "printable"),
        ({"problem": "two\nlines"}, "one line"),
        ({"event": None}, "without its event"),
        ({"arrays": None}, "come with status"),
        ({"status": "failed"}, "come with status"),
        ({"node": "site-b"}, "not what was asked for"),
    ],
)
def test_a_reply_that_is_wrong_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=message):
        read_reply(dataclasses.replace(REPLY, **changes).to_record())


def test_an_event_cheaper_than_what_was_asked_is_refused() -> None:
    cheap = dataclasses.replace(MECHANISM, noise_multiplier=9.0)
    event = event_of(cheap, node="site-a", round=2, status="spent")
    with pytest.raises(WireError, match="not what was asked for"):
        read_reply(dataclasses.replace(REPLY, event=event).to_record())


def with_array(name: str, array: Array) -> ArrayRecord:
    record = encode(WEIGHTS)
    record[name] = array
    return record


def claiming(value: np.ndarray, **claims: Any) -> Array:
    array = Array(value)
    fields = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data}
    return Array(**fields | claims)


SQUARE = WEIGHTS["a.weight"]


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("c", Array(SQUARE), "not of this model"),
        ("a.weight", Array(SQUARE[:1]), "shape"),
        ("a.weight", Array(SQUARE.reshape(6)), "shape"),
        ("b", Array(np.array([1.5], dtype=np.float32)), "shape"),
        ("a.weight", Array(SQUARE.astype(np.float64)), "type"),
        ("a.weight", Array(SQUARE.astype(np.int32)), "type"),
        ("a.weight", Array(SQUARE * np.float32(np.nan)), "not finite"),
        ("b", Array(np.array(np.inf, dtype=np.float32)), "not finite"),
        ("a.weight", claiming(SQUARE[:1], shape=(2, 3)), "shape"),
        ("a.weight", claiming(SQUARE, dtype="float64"), "type"),
        ("a.weight", claiming(SQUARE, data=b"no array"), "NumPy's format"),
        ("a.weight", claiming(SQUARE, data=Array(SQUARE).data[:-1]), "cut short"),
        ("a.weight", claiming(SQUARE, data=Array(SQUARE).data + b"x"), "too long"),
    ],
)
def test_weights_that_do_not_fit_are_refused(name: str, array: Array, message: str) -> None:
    with pytest.raises(WireError, match=message):
        decode(with_array(name, array), TEMPLATE)
    reply = dataclasses.replace(REPLY, arrays=with_array(name, array))
    with pytest.raises(WireError, match=message):
        read_reply(reply.to_record())


def test_a_header_that_claims_a_huge_array_allocates_nothing() -> None:
    data = Array(SQUARE).data.replace(b"(2, 3)", b"(2000000000000, 3)".ljust(6))
    with pytest.raises(WireError):
        decode(with_array("a.weight", claiming(SQUARE, data=data)), TEMPLATE)


def test_a_missing_weight_is_named() -> None:
    record = encode(WEIGHTS)
    del record["b"]
    with pytest.raises(WireError, match="'b' is missing"):
        decode(record, TEMPLATE)


def test_fortran_order_comes_through() -> None:
    value: Any = np.asfortranarray(SQUARE)
    np.testing.assert_array_equal(
        decode(encode({"x": value}), template_of({"x": value}))["x"], value
    )


def test_the_digest_is_of_what_must_be_the_same_and_holds_no_secret() -> None:
    base = RunConfig()
    for key, value in (
        ("privacy.noise_seed", "secret"),
        ("train.device", "cpu"),
        ("federation.engine", "ray"),
        ("federation.workers", 3),
    ):
        assert config_digest(base.with_values({key: value})) == config_digest(base)
    for key, value in (("privacy.delta", 1e-6), ("model.dim", 64), ("seed", 1)):
        assert config_digest(base.with_values({key: value})) != config_digest(base)
