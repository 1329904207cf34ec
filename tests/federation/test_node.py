"""A node's own guard: what it refuses, what it books, what it lets out about its errors."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from fedfuse.config import RunConfig
from fedfuse.data.dataset import Dataset
from fedfuse.data.prepare import open_node, prepare
from fedfuse.errors import BudgetExceeded, DataError, ModelError
from fedfuse.federation import node
from fedfuse.federation.books import DurableContext, StateBooks
from fedfuse.federation.client import make_client_app
from fedfuse.federation.flower import received, with_id
from fedfuse.federation.node import Site, answer, new_trainer
from fedfuse.federation.policy import Policy, scrubbed
from fedfuse.federation.rounds import job_of, learning_rate
from fedfuse.federation.wire import TrainReply, TrainRequest, config_digest, encode
from fedfuse.models.model import count_parameters
from fedfuse.privacy import accounting
from fedfuse.privacy.plan import plan
from fedfuse.privacy.spec import Mechanism, Unit

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def config(make_config: MakeConfig) -> RunConfig:
    return make_config(privacy__declared_records=30)


@pytest.fixture(scope="module")
def store(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    prepare(config.data, seed=0).write(folder)
    return folder


@pytest.fixture
def context() -> Context:
    return Context(1, 1, {"partition-id": 0}, RecordDict(), {})


def site(config: RunConfig, store: Path) -> Site:
    return Site(config=config, policy=Policy.of(config.privacy), store=store, index=0)


def request(config: RunConfig, store: Path, *, round: int = 1, **changes: Any) -> TrainRequest:
    whole = plan(config.privacy, steps=config.train.rounds * config.train.local_steps)
    schema = open_node(store, 0)[1].schema
    weights = new_trainer(config, schema).weights()
    made = TrainRequest(
        run="a" * 32,
        request=secrets.token_hex(16),
        round=round,
        rounds=config.train.rounds,
        deadline=0.0,
        digest=config_digest(config),
        task="classification",
        modalities=schema.names,
        parameters=count_parameters(schema, config.model),
        job=job_of(config, whole, round),
        arrays=encode(weights),
    )
    return dataclasses.replace(made, **changes)


def test_the_books_survive_the_rounds(config: RunConfig, store: Path, context: Context) -> None:
    for round in (1, 2, 3):
        asked = request(config, store, round=round).to_record()
        reply = answer(asked, site(config, store), StateBooks(context))
        assert (reply.status, reply.problem) == ("ok", "")
        assert reply.weight == 1.0
        assert reply.event is not None
        assert reply.event.status == "spent"
    events = StateBooks(context).events()
    assert [(event.round, event.status) for event in events] == [(r, "spent") for r in (1, 2, 3)]
    assert {event.node for event in events} == {"site-a"}


def test_a_hostile_request_is_refused_and_nothing_is_spent_or_read(
    config: RunConfig, store: Path, context: Context, unread: list[int]
) -> None:
    books = StateBooks(context)
    honest = request(config, store)
    mechanism = honest.job.mechanism
    assert mechanism is not None
    for changes, rounds in (
        ({"noise_multiplier": 1e-6}, 1),
        ({"noise_multiplier": 0.01, "steps": 10**6}, 1),
        ({"steps": 10**6}, 1),
        ({"sample_rate": 1.0, "noise_multiplier": 0.05}, 1),
        ({}, 10**6),
    ):
        hostile = dataclasses.replace(mechanism, **changes)  # type: ignore[arg-type]
        job = dataclasses.replace(honest.job, mechanism=hostile, steps=hostile.steps)
        asked = dataclasses.replace(honest, job=job, rounds=rounds)
        began = time.monotonic()
        reply = answer(asked.to_record(), site(config, store), books)
        assert time.monotonic() - began < 10
        assert reply.status == "refused"
        assert reply.problem.startswith("BudgetExceeded")
        assert reply.arrays is None
        assert reply.event is None
    assert books.events() == ()
    assert unread == []


def test_a_private_node_does_not_train_without_noise(
    config: RunConfig, store: Path, context: Context, unread: list[int]
) -> None:
    honest = request(config, store)
    plain = dataclasses.replace(honest, job=dataclasses.replace(honest.job, mechanism=None))
    reply = answer(plain.to_record(), site(config, store), StateBooks(context))
    assert reply.status == "refused"
    assert 'promises unit "record"' in reply.problem
    assert unread == []


def test_what_was_spent_before_counts(config: RunConfig, store: Path, context: Context) -> None:
    tight = dataclasses.replace(
        config,
        privacy=dataclasses.replace(config.privacy, noise_multiplier=0.0, epsilon=4.0),
    )
    books = StateBooks(context)
    for round in (1, 2, 3):
        asked = request(tight, store, round=round).to_record()
        assert answer(asked, site(tight, store), books).status == "ok"
    again = answer(request(tight, store, round=3).to_record(), site(tight, store), books)
    assert again.status == "refused"
    assert again.problem.startswith("BudgetExceeded")
    assert len(books.events()) == 3


def test_a_round_is_reserved_before_a_record_is_read(
    config: RunConfig, store: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def broken(self: Dataset, rows: Any) -> Any:
        assert [event.status for event in StateBooks(context).events()] == ["reserved"]
        assert kept == [1]
        raise OSError("cannot read /data/secret/patient-17.png")

    monkeypatch.setattr(Dataset, "batch", broken)
    context = DurableContext(
        run_id=1,
        node_id=1,
        node_config={},
        state=RecordDict(),
        keep=lambda state: kept.append(len(state)),
    )
    books = StateBooks(context)
    reply = answer(request(config, store).to_record(), site(config, store), books)
    assert (reply.status, reply.problem) == ("failed", "OSError")
    assert reply.event is not None
    assert reply.event.status == "reserved"
    assert [event.status for event in books.events()] == ["reserved"]


def test_weights_of_another_model_cost_nothing(
    config: RunConfig, store: Path, context: Context
) -> None:
    asked = request(config, store, arrays=encode({"x": np.zeros(3, np.float32)}))
    books = StateBooks(context)
    reply = answer(asked.to_record(), site(config, store), books)
    assert reply.status == "refused"
    assert reply.problem.startswith("WireError")
    assert books.events() == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"digest": "0" * 64}, "another configuration"), ({"deadline": 1.0}, "after its deadline")],
)
def test_late_or_foreign_requests_cost_nothing(
    config: RunConfig, store: Path, context: Context, changes: dict[str, Any], message: str
) -> None:
    reply = answer(
        request(config, store, **changes).to_record(), site(config, store), StateBooks(context)
    )
    assert reply.status == "refused"
    assert message in reply.problem
    assert StateBooks(context).events() == ()


def test_the_trainer_is_built_once(config: RunConfig, store: Path, context: Context) -> None:
    node._trainers.clear()
    for round in (1, 2):
        answer(
            request(config, store, round=round).to_record(),
            site(config, store),
            StateBooks(context),
        )
    assert len(node._trainers) == 1


def test_an_update_without_noise_seed_differs_each_time(
    config: RunConfig, store: Path, context: Context
) -> None:
    def update(setup: RunConfig) -> TrainReply:
        fresh = StateBooks(Context(1, 1, {}, RecordDict(), {}))
        return answer(request(setup, store).to_record(), site(setup, store), fresh)

    open_ended = dataclasses.replace(
        config, privacy=dataclasses.replace(config.privacy, noise_seed="")
    )
    assert update(config) == update(config)
    assert update(open_ended) != update(open_ended)


def test_the_app_answers_also_what_it_cannot_read(config: RunConfig, store: Path) -> None:
    app = make_client_app(config, str(store))
    asked = received(
        RecordDict(),
        with_id(Message(RecordDict(), dst_node_id=1, message_type="train")).metadata,
    )
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    reply = app(asked, context)
    assert reply.content.config_records["config"]["status"] == "refused"
    assert "WireError" in str(reply.content.config_records["config"]["problem"])
    lost = app(asked, Context(1, 1, {}, RecordDict(), {}))
    assert "partition-id" in str(lost.content.config_records["config"]["problem"])


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("boom on /data/secret/patient-17.png"), "RuntimeError"),
        (KeyError("patient-17"), "KeyError"),
        (DataError("3 records are odd", where="/data/secret"), "DataError"),
        (ModelError("no /home/x/y.bin here", where="/etc/z"), "ModelError: no <path> here"),
        (ModelError(r"no C:\data\a.bin here"), "ModelError: no <path> here"),
        (ModelError("no ../up/a.bin or ~/a/b"), "ModelError: no <path> or <path>"),
        (BudgetExceeded("too much"), "BudgetExceeded: too much"),
    ],
)
def test_only_the_class_and_public_words_of_an_error_leave(error: Exception, text: str) -> None:
    assert scrubbed(error) == text


def test_the_policys_accountant_agrees_with_the_accountant_where_it_is_close() -> None:
    one = Mechanism(
        unit=Unit.RECORD, sample_rate=0.25, noise_multiplier=1.0, clip_norm=1.0, steps=20
    )
    from fedfuse.privacy.accounting import epsilon

    spent = epsilon([one], 1e-5)
    assert accounting.within([one], spent * 1.001, 1e-5)
    assert not accounting.within([one], spent * 0.999, 1e-5)
    assert accounting.within([], 0.1, 1e-5)


def test_the_learning_rate_follows_its_schedule(config: RunConfig) -> None:
    train = dataclasses.replace(config.train, rounds=4, learning_rate=1.0, schedule="constant")
    assert [learning_rate(train, r) for r in (1, 4)] == [1.0, 1.0]
    cosine = dataclasses.replace(train, schedule="cosine")
    rates = [learning_rate(cosine, r) for r in (1, 2, 3, 4)]
    assert rates[0] == 1.0
    assert rates[2] == pytest.approx(0.5)
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.2
