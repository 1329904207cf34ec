"""Runs whose updates come under masks: the same model, and nothing but sums on the way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedfuse.config import RunConfig
from fedfuse.data.prepare import open_split, prepare
from fedfuse.errors import ConfigError, FederationError, PrivacyError, WireError
from fedfuse.federation.books import StateBooks
from fedfuse.federation.flower import MessageGrid
from fedfuse.federation.masking import conduct
from fedfuse.federation.masking.conduct import MaskedRound
from fedfuse.federation.masking.messages import terms_to_config, to_config
from fedfuse.federation.masking.quantise import Lattice
from fedfuse.federation.masking.roster import Roster
from fedfuse.federation.masking.seat import VECTOR
from fedfuse.federation.masking.terms import Terms
from fedfuse.federation.node import Site, answer
from fedfuse.federation.observer import Silent
from fedfuse.federation.policy import Policy
from fedfuse.federation.session import Session
from fedfuse.federation.simulate import simulate
from fedfuse.federation.wire import config_digest
from fedfuse.privacy import accounting
from fedfuse.privacy.spec import Mechanism, Unit
from fedfuse.reports.budget import of_run
from fedfuse.runfolder import RunFolder
from tests.federation.requests import JOB, a_request

MakeConfig = Callable[..., RunConfig]

NODE = {
    "privacy__unit": "node",
    "privacy__noise_nodes": 3,
    "privacy__epsilon": 60.0,
    "federation__min_nodes": 3,
}
MASKED = {"federation__secure_aggregation": True}


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = RunFolder.open(folder).checkpoint()
    assert checkpoint is not None
    return dict(checkpoint.weights)


def test_a_masked_run_without_a_promise_gives_the_plain_model(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Up to the lattice's steps, over all rounds."""
    plain = make_config(privacy__unit="none", privacy__clip_norm=50.0)
    masked = make_config(privacy__unit="none", privacy__clip_norm=50.0, **MASKED)
    simulate(plain, tmp_path / "plain", observer=Silent())
    summary = simulate(masked, tmp_path / "masked", observer=Silent())
    first, second = weights_of(tmp_path / "plain"), weights_of(tmp_path / "masked")
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, atol=1e-3)
    assert summary["bytes_received"] > 0


@pytest.fixture(scope="module")
def finished(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a masked run with a promise."""
    folder = tmp_path_factory.mktemp("masked") / "run"
    simulate(make_config(**NODE, **MASKED), folder, observer=Silent())
    return folder


def test_a_masked_run_keeps_its_promise_against_the_server(
    make_config: MakeConfig, finished: Path, tmp_path: Path
) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    privacy = summary["privacy"]
    assert privacy["secure_aggregation"] is True
    events = RunFolder.open(finished).events()
    own = [event.mechanism for event in events if event.node == events[0].node]
    expected = accounting.epsilon(own, 1e-5)
    assert privacy["epsilon_server"] == pytest.approx(expected)
    assert privacy["epsilon_model"] <= privacy["epsilon_server"]
    assert all(event.status == "spent" for event in events)
    assert "a server that sees only sums" in privacy["statement"]
    told = " ".join(summary["assumptions"])
    assert "sees only sums of 3 or more of the 3 updates" in told
    assert "at most 0 of these nodes" in told
    assert "looks at nothing but sums" not in told
    without = simulate(make_config(**NODE), tmp_path / "open", observer=Silent())["privacy"]
    assert without["epsilon_server"] > privacy["epsilon_server"]


def test_the_report_bears_out_the_summary_of_a_masked_run(finished: Path) -> None:
    facts = of_run(finished)
    assert facts.problems == ()
    server, public = facts.statements
    assert server.role == "node"
    assert server.epsilon is not None
    assert public.epsilon is not None
    assert public.epsilon <= server.epsilon


def test_the_noise_of_a_masked_sum_is_in_the_model(make_config: MakeConfig, tmp_path: Path) -> None:
    """With little learning and much noise a round moves the weights by the declared deviation."""
    config = make_config(
        **NODE,
        **MASKED,
        train__rounds=1,
        train__learning_rate=1e-9,
        privacy__noise_multiplier=8.0,
        privacy__clip_norm=0.5,
        model__dim=32,
        model__head_width=64,
    )
    still = dataclasses.replace(
        config,
        privacy=dataclasses.replace(config.privacy, unit="none"),
    )
    simulate(config, tmp_path / "noisy", observer=Silent())
    simulate(still, tmp_path / "still", observer=Silent())
    noisy, plain = weights_of(tmp_path / "noisy"), weights_of(tmp_path / "still")
    moved = np.concatenate([(noisy[n] - plain[n]).ravel() for n in noisy])
    declared = 8.0 * 0.5 / 3  # the sum's, over the nodes asked
    assert abs(float(np.square(moved).mean()) / declared**2 - 1) < 4.5 * (2 / moved.size) ** 0.5


def test_a_run_goes_on_without_a_node_that_shared_masks_and_is_lost_in_training(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of four, in every round: it counts as asked, and its masks are taken off."""
    prepare_all = MaskedRound.prepare
    monkeypatch.setattr(MaskedRound, "prepare", lambda one, end: prepare_all(one, end) - {2})
    config = make_config(
        **NODE, **MASKED, data__partition="iid", data__nodes=4, train__rounds=2
    )  # fmt: skip
    summary = simulate(config, tmp_path / "run", observer=Silent())
    assert summary["status"] == "finished"
    events = RunFolder.open(tmp_path / "run").events()
    lost = {event.node for event in events if event.status == "reserved"}
    assert len(lost) == 1
    assert sum(event.status == "spent" for event in events) == 2 * 3
    moved = np.concatenate([value.ravel() for value in weights_of(tmp_path / "run").values()])
    assert float(np.abs(moved).max()) < 10  # a mask that was left on would be far more
    assert "at most 0 of these nodes" in " ".join(summary["assumptions"])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"privacy__unit": "record"}, "all their noise by themselves"),
        ({"privacy__unit": "node", "privacy__noise_by": "server"}, "cannot clip"),
        ({"privacy__unit": "node", "privacy__adaptive_clip": True}, "without a mask"),
        ({"privacy__unit": "none", "federation__strategy": "fedadam"}, "fedadam"),
        ({"privacy__unit": "none", "federation__weighting": "examples"}, "no weights"),
        ({"privacy__unit": "none", "federation__compression": "int8"}, "nothing to compress"),
        ({"privacy__unit": "none", "federation__engine": "ray"}, "ray"),
    ],
)
def test_what_does_not_go_with_masks_is_refused_with_a_reason(
    make_config: MakeConfig, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        make_config(**MASKED, **changes)


def test_too_few_nodes_for_masks_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(privacy__unit="none", federation__fraction=0.1, **MASKED)
    with pytest.raises(ConfigError, match="masks need 2"):
        simulate(config, tmp_path / "run", observer=Silent())


# ---- the round by itself, over a grid whose nodes are lost when the test says so


class SeatGrid(MessageGrid):
    """Nodes 1 to n answer at once, by their seats; a node in `lost` says nothing from there on."""

    look_s = 0.0

    def __init__(self, roster: Roster, config: RunConfig, lost: Mapping[int, str]) -> None:
        self._seats = {
            number: roster.seat(number - 1, config, RecordDict())
            for number in range(1, len(roster.names) + 1)
        }
        self._lost = lost
        self._gone: set[int] = set()
        self.told: dict[str, list[RecordDict]] = {}

    def replies(self, messages: Any, *, timeout: float | None = None) -> Iterator[Message]:
        for message in messages:
            number = message.metadata.dst_node_id
            stage = str(message.content.config_records["config"]["stage"])
            if self._lost.get(number) == stage:
                self._gone.add(number)
            if number in self._gone:
                continue
            answer = self._seats[number].answer(message.content).to_record()
            self.told.setdefault(stage, []).append(answer)
            yield Message(answer, reply_to=message)

    def seat(self, number: int) -> Any:
        return self._seats[number]

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def get_node_ids(self) -> Any:
        return list(self._seats)

    def push_messages(self, messages: Any) -> Any:
        raise NotImplementedError

    def pull_messages(self, message_ids: Any) -> Any:
        raise NotImplementedError

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        raise NotImplementedError


def a_round(
    config: RunConfig, n: int, lost: Mapping[int, str]
) -> tuple[MaskedRound, SeatGrid, Terms, Lattice]:
    names = tuple(f"node-{number}" for number in range(1, n + 1))
    roster = Roster.drawn(names)
    grid = SeatGrid(roster, config, lost)
    terms = Terms(
        request="ab" * 16,
        digest=config_digest(config),
        nodes=names,
        threshold=2 * n // 3 + 1,
        length=6,
    )
    lattice = Lattice.of(clip_norm=1.0, length=6, nodes=n)
    masked = MaskedRound(
        grid,
        terms,
        lattice,
        asked=dict(enumerate(names, 1)),
        identities=roster.identities,
        start={"w": np.zeros((2, 3), np.float32)},
        trained=["w"],
        divisor=n,
    )
    return masked, grid, terms, lattice


def masked_update(grid: SeatGrid, number: int, lattice: Lattice) -> np.ndarray:
    """What node `number` sends: under masks, its number in each coordinate's steps."""
    seat = grid.seat(number)
    member = seat.unfinished.take("ab" * 16)
    vector = member.mask(np.full(6, number, np.int64))
    seat.unfinished.keep(member)
    return np.asarray(vector)


END = float("inf")


@pytest.mark.parametrize("stage", ["announce", "share", "open", "train", "agree", "reveal"])
def test_a_node_lost_at_any_stage_costs_the_others_nothing(
    make_config: MakeConfig, stage: str
) -> None:
    config = make_config(privacy__unit="none", **MASKED)
    masked, grid, _, lattice = a_round(config, 4, {2: stage})
    there = masked.prepare(END)
    assert there == ({1, 2, 3, 4} if stage in ("train", "agree", "reveal") else {1, 3, 4})
    sent = [n for n in sorted(there) if (n, stage) != (2, "train")]
    for number in sent:
        masked.add(f"node-{number}", {VECTOR: masked_update(grid, number, lattice)}, 1.0)
    masked.finish(END)
    ((mean, weight),) = masked.updates()
    assert weight == 1.0
    np.testing.assert_allclose(mean["w"], sum(sent) / lattice.scale / 4, rtol=1e-6)
    assert masked.failures.keys() == (set() if stage == "train" else {"node-2"})
    assert masked.bytes_sent > 0
    assert masked.bytes_received > 0


@pytest.mark.parametrize("stage", ["announce", "share", "open", "train", "agree", "reveal"])
def test_below_the_threshold_there_is_no_sum(make_config: MakeConfig, stage: str) -> None:
    config = make_config(privacy__unit="none", **MASKED)
    masked, grid, _, lattice = a_round(config, 4, {2: stage, 3: stage})

    def all_stages() -> None:
        there = masked.prepare(END)
        for number in there - ({2, 3} if stage == "train" else set()):
            masked.add(f"node-{number}", {VECTOR: masked_update(grid, number, lattice)}, 1.0)
        masked.finish(END)

    with pytest.raises(FederationError, match="there is no sum"):
        all_stages()
    assert masked.updates() == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"digest": "0" * 64}, "another configuration"),
        ({"threshold": 2}, "not above half|too few|above half"),
        ({"nodes": ["node-1", "node-2", "node-9"]}, "not all known"),
        ({"nodes": ["node-2", "node-3", "node-4"]}, "not among those"),
        ({"length": "6"}, "must have their fields"),
        ({"more": 1}, "must have their fields"),
    ],
)
def test_a_node_refuses_terms_that_do_not_protect_it(
    make_config: MakeConfig, change: dict[str, Any], why: str
) -> None:
    config = make_config(privacy__unit="none", **MASKED)
    _, grid, terms, _ = a_round(config, 4, {})
    told = ConfigRecord(dict(terms_to_config(terms)) | change)
    problem = grid.seat(1).answer(RecordDict({"config": told})).problem
    assert any(one in problem for one in why.split("|"))


def test_a_threshold_below_two_thirds_is_refused_by_nodes(make_config: MakeConfig) -> None:
    config = make_config(privacy__unit="none", **MASKED)
    _, grid, terms, _ = a_round(config, 5, {})
    low = dataclasses.replace(terms, threshold=3)
    answer = grid.seat(1).answer(RecordDict({"config": terms_to_config(low)}))
    assert "too few to protect" in answer.problem


def test_a_refusal_ends_the_protocol_for_the_node_also_in_its_state(
    make_config: MakeConfig,
) -> None:
    config = make_config(privacy__unit="none", **MASKED)
    masked, grid, _, _ = a_round(config, 4, {})
    masked.prepare(END)
    seat = grid.seat(1)
    wrong = RecordDict({"config": to_config("agree", "ab" * 16, {"node-1": b""})})
    assert seat.answer(wrong).problem
    assert "agreed on no masks" in seat.answer(wrong).problem


def test_no_secret_of_a_node_is_in_what_it_sends(make_config: MakeConfig) -> None:
    config = make_config(privacy__unit="none", **MASKED)
    masked, grid, _, lattice = a_round(config, 4, {})
    masked.prepare(END)
    kept = []
    for number in range(1, 5):
        saved = grid.seat(number).unfinished.find("ab" * 16).save()
        kept += [bytes.fromhex(one) for one in json.loads(saved)["secrets"]]
    for number in range(1, 5):
        masked.add(f"node-{number}", {VECTOR: masked_update(grid, number, lattice)}, 1.0)
    masked.finish(END)
    sent = b"".join(
        part
        for answers in grid.told.values()
        for answer in answers
        for part in answer.config_records["config"]["parts"]
    )
    assert len(kept) == 12
    assert not any(secret in sent for secret in kept)
    assert set(grid.told) == {"announce", "share", "open", "agree", "reveal"}


def test_masks_of_another_request_or_for_too_little_noise_give_no_update(
    make_config: MakeConfig,
) -> None:
    config = make_config(**NODE, **MASKED)
    start = {"w": np.zeros((2, 3), np.float32)}
    mechanism = Mechanism(
        unit=Unit.NODE, sample_rate=1.0, noise_multiplier=1.0, clip_norm=1.0, steps=1
    )

    def masked(request: str, noise_nodes: int) -> ArrayRecord:
        one, grid, _, _ = a_round(config, 4, {})
        one.prepare(END)
        job = dataclasses.replace(JOB, mechanism=mechanism, noise_nodes=noise_nodes)
        asked = a_request(request=request, job=job, parameters=6, digest=config_digest(config))
        found: ArrayRecord = grid.seat(1).masked(asked, start, start, ["w"], b"s" * 32)
        return found

    assert list(masked("ab" * 16, 3)) == [VECTOR]
    with pytest.raises(WireError, match="no masks for this request"):
        masked("cd" * 16, 3)
    with pytest.raises(PrivacyError, match="of which 4 must be honest"):
        masked("ab" * 16, 4)


def test_masked_runs_are_refused_where_nobody_is_known_to_share_them(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """By a server that knows no identities, and by a node without a place."""
    config = make_config(**NODE, **MASKED)
    prepared = prepare(config.data, seed=0)
    store = tmp_path / "store"
    prepared.write(store)
    with pytest.raises(ConfigError, match="no node's identity is known"):
        Session(
            announced=config,
            config=config,
            mechanism=None,
            folder=RunFolder.create(tmp_path / "run", config),
            schema=prepared.schema,
            test=open_split(store, "test"),
            observer=Silent(),
        )
    site = Site(config=config, policy=Policy.of(config.privacy), store=store, index=0)
    request = a_request(digest=config_digest(config))
    reply = answer(request.to_record(), site, StateBooks(Context(1, 1, {}, RecordDict(), {})))
    assert "this node shares none" in reply.problem


def test_a_node_that_is_silent_leaves_the_others_time(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage waits for it, but not for all of the round's time."""
    config = make_config(privacy__unit="none", **MASKED)
    masked, grid, _, _ = a_round(config, 4, {2: "announce"})
    answers, now = grid.replies, [0.0]
    monkeypatch.setattr(conduct.time, "monotonic", lambda: now[0])

    def waiting(messages: Any, *, timeout: float) -> Iterator[Message]:
        if timeout <= 0:
            return
        told = list(messages)
        found = list(answers(told))
        now[0] += timeout if len(found) < len(told) else 1.0
        yield from found

    monkeypatch.setattr(grid, "replies", waiting)
    assert masked.prepare(60.0) == {1, 3, 4}
    assert now[0] == 10 + 2
