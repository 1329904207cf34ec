"""Real nodes share masks: with a server that keeps to the protocol, and with one that does not.

Each node is a vault by its own node.toml; letters cross its door. What a killed vault had in memory
is gone with it.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, RecordDict
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fedfuse.config import RunConfig
from fedfuse.data.prepare import open_node
from fedfuse.errors import ConfigError, FederationError, PrivacyError, WireError
from fedfuse.federation.deploy import launch
from fedfuse.federation.masking.member import Member
from fedfuse.federation.masking.messages import terms_to_config, to_config
from fedfuse.federation.masking.peers import known_to, listed_nodes, read_peers
from fedfuse.federation.masking.terms import Terms, threshold_for
from fedfuse.federation.masking.unfinished import InMemory
from fedfuse.federation.node import new_trainer
from fedfuse.federation.nodefile import NodeFile
from fedfuse.federation.observer import Silent
from fedfuse.federation.rounds import job_of
from fedfuse.federation.server import serve
from fedfuse.federation.serverfile import equip_server
from fedfuse.federation.settle import settle
from fedfuse.federation.simulate import simulate
from fedfuse.federation.superlink import SuperLink
from fedfuse.federation.vault import Vault
from fedfuse.federation.wire import TrainRequest, config_digest, encode, signed
from fedfuse.models.model import count_parameters
from fedfuse.privacy import accounting
from fedfuse.privacy.signing import SigningKey
from fedfuse.privacy.spec import Unit
from fedfuse.runfolder import RunFolder
from tests.federation.consortium import Consortium, VaultGrid

MakeConfig = Callable[..., RunConfig]
STAGES = ("announce", "share", "open", "train", "agree", "reveal")


@pytest.fixture(scope="module")
def make_masked(make_config: MakeConfig) -> MakeConfig:
    """A configuration of a masked run of four nodes; three of them make its noise whole."""

    def make(**changes: Any) -> RunConfig:
        return make_config(
            **{
                "privacy__unit": "node",
                "privacy__noise_nodes": 3,
                "privacy__noise_seed": "",
                "privacy__epsilon": 60.0,
                "data__partition": "iid",
                "data__nodes": 4,
                "train__rounds": 1,
                "federation__min_nodes": 3,
                "federation__secure_aggregation": True,
            }
            | changes
        )

    return make


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = RunFolder.open(folder).checkpoint()
    assert checkpoint is not None
    return dict(checkpoint.weights)


# ---- a server that keeps to the protocol


def test_real_nodes_under_masks_spend_and_state_what_simulated_ones_do(
    make_masked: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_masked(train__rounds=2)
    nodes = Consortium(tmp_path, config)
    real = nodes.run(monkeypatch)
    simulated = simulate(config, tmp_path / "simulated", observer=Silent())
    assert real["status"] == simulated["status"] == "finished"
    found, wanted = real["privacy"], simulated["privacy"]
    for key in ("epsilon_server", "epsilon_model", "statement", "sigma", "epsilon_model_why"):
        assert found[key] == wanted[key]
    assert sorted(found["epsilon_by_node"]) == sorted(nodes.identities)
    assert set(found["epsilon_by_node"].values()) == set(wanted["epsilon_by_node"].values())
    assert found["noise_source"] == "operating system"
    assert {event.status for event in RunFolder.open(tmp_path / "run").events()} == {"spent"}
    told = " ".join(real["assumptions"])
    assert "sees only sums of 3 or more of the 3 to 4 updates" in told
    assert "at most 0 of these nodes" in told
    for number, name in nodes.names.items():
        account = nodes.ledger(number).accounts()[0]
        assert (account.steps, account.open) == (2, 0)
        stated = found["epsilon_by_node"][name]
        assert accounting.epsilon(account.history, 1e-5) == pytest.approx(stated)


def test_without_a_promise_the_model_is_that_of_a_run_without_masks(
    make_masked: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"privacy__unit": "none", "privacy__noise_nodes": 1, "privacy__clip_norm": 50.0}
    masked = make_masked(**changes)
    plain = make_masked(**changes, federation__secure_aggregation=False)
    Consortium(tmp_path / "masked", masked).run(monkeypatch)
    Consortium(tmp_path / "plain", plain).run(monkeypatch)
    first, second = (weights_of(tmp_path / name / "run") for name in ("plain", "masked"))
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, atol=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_a_vault_that_is_killed_is_lost_for_the_round_and_spends_nothing_twice(
    make_masked: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """A new one takes its place before the stage: it has no keys, says so, and the round goes on
    without it, or with the update that it gave before."""
    config = make_masked()
    nodes = Consortium(tmp_path, config)

    def befalls(number: int, at: str) -> None:
        if number == 103 and at == stage:
            nodes.kill(number)

    summary = nodes.run(monkeypatch, befalls=befalls)
    assert summary["status"] == "finished"
    events = {event.node: event.status for event in RunFolder.open(tmp_path / "run").events()}
    spent = stage not in ("share", "open", "train")
    expected = dict.fromkeys(nodes.identities, "spent")
    if stage == "train":  # the new vault answers: it refuses, and has spent nothing
        del expected["site-3"]
    elif not spent:
        expected["site-3"] = "reserved"
    assert events == expected
    rounds = [account.steps for account in nodes.ledger(103).accounts()]
    assert rounds == ([1] if spent else [])
    (row,) = RunFolder.open(tmp_path / "run").metrics()
    assert set(row["failures"]) == (set() if stage == "announce" else {"site-3"})
    if stage != "announce":
        assert "no masks for this request" in row["failures"]["site-3"]
    moved = np.concatenate([value.ravel() for value in weights_of(tmp_path / "run").values()])
    assert float(np.abs(moved).max()) < 10  # a mask that was left on would be far more


def test_the_next_round_is_answered_by_a_vault_that_was_killed_in_this_one(
    make_masked: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Consortium(tmp_path, make_masked(train__rounds=2))
    killed: list[int] = []

    def befalls(number: int, at: str) -> None:
        if number == 102 and at == "agree" and not killed:
            killed.append(number)
            nodes.kill(number)

    assert nodes.run(monkeypatch, befalls=befalls)["rounds_done"] == 2
    first, second = RunFolder.open(tmp_path / "run").metrics()
    assert (list(first["failures"]), list(second["failures"])) == (["site-2"], [])
    assert nodes.ledger(102).accounts()[0].rounds == 2


def test_a_run_that_lost_too_many_nodes_goes_on_with_other_masks(
    make_masked: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four vaults are killed before they could sign who is left in round 2: it has no sum,
    and stays spent. Resumed, the round is run again, and paid for again."""
    nodes = Consortium(tmp_path, make_masked(train__rounds=2, privacy__noise_multiplier=4.0))
    trained: list[int] = []

    def befalls(number: int, at: str) -> None:
        trained.extend([number] if at == "train" else [])
        if at == "agree" and number in (102, 103) and len(trained) == 8:
            nodes.kill(number)

    with pytest.raises(FederationError, match="there is no sum"):
        nodes.run(monkeypatch, befalls=befalls)
    assert nodes.run(monkeypatch)["rounds_done"] == 2
    assert [account.steps for account in nodes.ledger(103).accounts()] == [3]
    statuses = [event.status for event in RunFolder.open(tmp_path / "run").events()]
    assert (statuses.count("spent"), statuses.count("reserved")) == (8, 4)


def test_a_server_that_knows_too_few_nodes_is_told_so(
    make_masked: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Consortium(tmp_path, make_masked())
    del nodes.identities["site-1"], nodes.identities["site-2"]
    nodes.write_peers()
    with pytest.raises(ConfigError, match="masks need 2 to 2"):
        nodes.run(monkeypatch)
    (tmp_path / "peers.toml").unlink()
    with pytest.raises(ConfigError, match="no such file"):
        nodes.run(monkeypatch)
    monkeypatch.delenv("FEDFUSE_PEERS")
    with pytest.raises(ConfigError, match="FEDFUSE_PEERS"):
        serve(VaultGrid(nodes, monkeypatch), nodes.config)


# ---- a server that does not


class Hostile:
    """A server that asks site-1 what it likes, with all other nodes on its side."""

    def __init__(self, nodes: Consortium, *, threshold: int = 0, **changes: Any) -> None:
        self.nodes = nodes
        config = settle(nodes.config, mean_records=None).config
        settled = settle(nodes.config, mean_records=None)
        schema = open_node(nodes.folder / "store", 0)[1].schema
        job = job_of(config, settled.mechanism, 1)
        self.ask = signed(
            dataclasses.replace(
                TrainRequest(
                    run=secrets.token_hex(16),
                    request=secrets.token_hex(16),
                    round=1,
                    rounds=1,
                    deadline=0.0,
                    digest=config_digest(nodes.config),
                    task="classification",
                    modalities=schema.names,
                    parameters=count_parameters(
                        schema, config.model, vocabulary=config.data.vocabulary
                    ),
                    job=job,
                    arrays=encode(new_trainer(config, schema).weights()),
                ),
                **changes,
            ),
            nodes.server,
        )
        names = tuple(sorted(nodes.identities))
        self.terms = Terms(
            request=self.ask.request,
            digest=self.ask.digest,
            nodes=names,
            threshold=threshold or threshold_for(len(names)),
            length=self.ask.parameters,
        )
        self.others = {name: self.member(name) for name in names[1:]}
        self.announced: dict[str, bytes] = {}

    def member(self, name: str, key: SigningKey | None = None) -> Member:
        own = key or self.nodes.keys[name]
        return Member(self.terms, name, own, self.nodes.identities | {name: own.public})

    def told(self, record: ConfigRecord | Mapping[str, Any]) -> dict[str, Any]:
        answer = self.nodes.hear(101, RecordDict({"config": ConfigRecord(dict(record))}))
        return dict(answer.config_records["config"])

    def announce(self, terms: Terms | None = None, key: SigningKey | None = None) -> dict[str, Any]:
        return self.told(terms_to_config(terms or self.terms, key or self.nodes.server))

    def stage(self, stage: str, parts: Mapping[str, bytes]) -> dict[str, Any]:
        return self.told(to_config(stage, self.terms.request, parts))

    def problem(self, stage: str, parts: Mapping[str, bytes]) -> str:
        return str(self.stage(stage, parts).get("problem", ""))

    def train(self, ask: TrainRequest | None = None) -> tuple[str, str]:
        """(status, problem)"""
        answer = self.nodes.hear(101, (ask or self.ask).to_record(), "train")
        self.sent = answer.array_records.get("arrays")
        told = answer.config_records["config"]
        return str(told["status"]), str(told["problem"])

    def until(self, stage: str) -> None:
        """Plays by the rules up to `stage`."""
        steps = (self._announce, self._share, self._open, self._train, self._agree)
        for step in steps[: STAGES.index(stage)]:
            step()

    def _announce(self) -> None:
        self.announced = dict(zip(*self._parts(self.announce()), strict=True))
        self.announced |= {name: member.announce() for name, member in self.others.items()}

    def _share(self) -> None:
        names, parts = self._parts(self.stage("share", self.announced))
        assert names == sorted(self.others)
        self.boxes = {name: one.share(self.announced) for name, one in self.others.items()}
        for name, member in self.others.items():
            from_1 = {"site-1": dict(zip(names, parts, strict=True))[name]}
            member.open(from_1 | {o: b[name] for o, b in self.boxes.items() if o != name})
            member.mask(np.zeros(self.terms.length, np.int64))

    def _open(self) -> None:
        boxes = {name: boxes["site-1"] for name, boxes in self.boxes.items()}
        assert "problem" not in self.stage("open", boxes)

    def _train(self) -> None:
        assert self.train() == ("ok", "")

    def _agree(self) -> None:
        left = self.terms.nodes
        names, parts = self._parts(self.stage("agree", dict.fromkeys(left, b"")))
        self.signatures = dict(zip(names, parts, strict=True))
        self.signatures |= {name: one.agree(left) for name, one in self.others.items()}

    def _parts(self, told: dict[str, Any]) -> tuple[list[str], list[bytes]]:
        assert "problem" not in told, told
        return list(told["names"]), list(told["parts"])


@pytest.fixture
def hostile(make_masked: MakeConfig, tmp_path: Path) -> Hostile:
    return Hostile(Consortium(tmp_path, make_masked()))


def spends(nodes: Consortium) -> int:
    return sum(account.steps for account in nodes.ledger().accounts())


def test_a_server_by_the_rules_gets_one_share_of_each(hostile: Hostile) -> None:
    """The hostile cases differ from this one in a single thing each."""
    hostile.until("reveal")
    names, parts = hostile._parts(hostile.stage("reveal", hostile.signatures))
    assert names == list(hostile.terms.nodes)
    assert len(parts) == 4
    assert spends(hostile.nodes) == 1


def test_a_key_that_the_peers_file_does_not_list_is_refused(hostile: Hostile) -> None:
    """In the name of a node that it lists, or of one that it does not."""
    hostile.until("share")
    stranger = hostile.member("site-2", SigningKey(Ed25519PrivateKey.generate()))
    told = hostile.announced | {"site-2": stranger.announce()}
    assert "did not sign the keys" in hostile.problem("share", told)
    assert "no masks for this request" in hostile.problem("share", hostile.announced)
    names = ("site-1", "site-2", "site-3", "site-5")
    fakes = dataclasses.replace(hostile.terms, request="ab" * 16, nodes=names)
    assert "not all known" in str(hostile.announce(fakes)["problem"])


def test_terms_of_a_server_that_the_node_does_not_answer_are_refused(hostile: Hostile) -> None:
    stranger = SigningKey(Ed25519PrivateKey.generate())
    assert "not signed by a server" in str(hostile.announce(key=stranger)["problem"])
    assert "not signed by a server" in str(hostile.told(terms_to_config(hostile.terms))["problem"])
    told = dict(terms_to_config(hostile.terms, hostile.nodes.server))
    for change in ({"threshold": 4}, {"request": "ab" * 16}, {"signature": "00" * 64}):
        assert "did not sign them" in str(hostile.told(told | change)["problem"])
    assert "problem" not in hostile.told(told)  # none of those has begun anything


def test_terms_that_were_changed_between_stages_are_refused(hostile: Hostile) -> None:
    """Others announced for another threshold."""
    hostile.until("share")
    hostile.terms = dataclasses.replace(hostile.terms, threshold=4)
    told = hostile.announced | {n: hostile.member(n).announce() for n in ("site-2", "site-3")}
    assert "did not sign the keys" in hostile.problem("share", told)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_second_announcement_for_a_request_is_refused_and_the_first_stands(
    hostile: Hostile, stage: str
) -> None:
    hostile.until(stage)
    for terms in (hostile.terms, dataclasses.replace(hostile.terms, threshold=4)):
        assert "were begun before" in str(hostile.announce(terms)["problem"])
    match stage:
        case "share":
            assert "problem" not in hostile.stage("share", hostile.announced)
        case "train":
            assert hostile.train() == ("ok", "")
        case "reveal":
            assert "problem" not in hostile.stage("reveal", hostile.signatures)


def test_after_a_restart_a_request_is_begun_with_other_keys_and_paid_for_once(
    hostile: Hostile,
) -> None:
    """The new vault's keys open nothing of the old one's, and the ledger remembers the request."""
    hostile.until("agree")
    first = hostile.announced["site-1"]
    hostile.nodes.kill(101)
    for stage, parts in (("agree", dict.fromkeys(hostile.terms.nodes, b"")), ("reveal", {})):
        assert "no masks for this request" in hostile.problem(stage, parts)
    hostile.others = {name: hostile.member(name) for name in hostile.others}
    hostile.until("train")
    second = hostile.announced["site-1"]
    assert all(first[i : i + 32] != second[i : i + 32] for i in (0, 32, 64))
    status, problem = hostile.train()
    assert status == "refused"
    assert "was answered before" in problem
    assert hostile.sent is None
    assert spends(hostile.nodes) == 1


def test_boxes_for_keys_of_a_vault_that_is_gone_do_not_open(hostile: Hostile) -> None:
    hostile.until("open")
    old = {name: boxes["site-1"] for name, boxes in hostile.boxes.items()}
    hostile.nodes.kill(101)
    hostile.others = {name: hostile.member(name) for name in hostile.others}
    hostile.until("open")
    assert "changed on its way" in hostile.problem("open", old)


def test_a_training_request_that_comes_again_gives_nothing_and_costs_nothing(
    hostile: Hostile, unread: list[int]
) -> None:
    hostile.until("agree")
    read = len(unread)
    status, problem = hostile.train()
    assert (status, hostile.sent) == ("refused", None)
    assert "masks at stage agree" in problem
    assert (len(unread), spends(hostile.nodes)) == (read, 1)
    hostile._agree()  # the round goes on
    assert "problem" not in hostile.stage("reveal", hostile.signatures)


@pytest.mark.parametrize("stage", ["announce", "share", "open"])
def test_training_before_its_masks_are_there_is_refused_and_costs_nothing(
    hostile: Hostile, unread: list[int], stage: str
) -> None:
    hostile.until(stage)
    status, problem = hostile.train()
    assert (status, hostile.sent) == ("refused", None)
    assert "no masks for" in problem or f"masks at stage {stage}" in problem
    assert (unread, spends(hostile.nodes)) == ([], 0)


@pytest.mark.parametrize(
    ("there", "stage"),
    [(a, b) for a in STAGES[1:] for b in ("share", "open", "agree", "reveal") if a != b],
)
def test_a_stage_out_of_order_ends_the_round_for_the_node(
    hostile: Hostile, there: str, stage: str
) -> None:
    hostile.until(there)
    parts = {
        "share": hostile.announced,
        "open": {},
        "agree": dict.fromkeys(hostile.terms.nodes, b""),
        "reveal": getattr(hostile, "signatures", {}),
    }
    assert hostile.problem(stage, parts[stage])
    assert "no masks for this request" in hostile.problem(stage, parts[stage])


def test_too_few_that_are_left_are_not_agreed_to(hostile: Hostile) -> None:
    hostile.until("agree")
    assert "are needed" in hostile.problem("agree", dict.fromkeys(hostile.terms.nodes[:2], b""))
    assert "no masks for this request" in hostile.problem("reveal", {})


def test_both_secrets_of_a_node_are_never_given(hostile: Hostile) -> None:
    """The server has the others sign that site-4 was lost, and site-1 that it is left: it would
    have the shares of one secret from them, and that of the other from here."""
    hostile.until("agree")
    hostile._parts(hostile.stage("agree", dict.fromkeys(hostile.terms.nodes, b"")))
    without = hostile.terms.nodes[:3]
    told = {name: hostile.others[name].agree(without) for name in ("site-2", "site-3")}
    told["site-4"] = told["site-3"]
    assert "told of other nodes" in hostile.problem("reveal", told)
    again = dict.fromkeys(without, b"")
    assert "no masks for this request" in hostile.problem("agree", again)


def test_a_second_answer_to_reveal_is_refused(hostile: Hostile) -> None:
    hostile.until("reveal")
    assert "problem" not in hostile.stage("reveal", hostile.signatures)
    assert "no masks for this request" in hostile.problem("reveal", hostile.signatures)


def test_under_masks_no_count_leaves_and_no_other_unit(hostile: Hostile, unread: list[int]) -> None:
    """The job is the server's to write, whatever its configuration says: a count that the masked
    noise does not cover, and steps of another unit."""
    job = hostile.ask.job
    assert job.mechanism is not None
    for change, why in (
        ({"count_noise": 1.0}, "no count"),
        ({"unit": Unit.RECORD, "steps": job.steps}, "unit"),
    ):
        bad = dataclasses.replace(job, mechanism=dataclasses.replace(job.mechanism, **change))
        one = Hostile(hostile.nodes, job=bad)
        one.until("train")
        status, problem = one.train()
        assert (status, one.sent) == ("refused", None)
        assert why in problem
    assert (unread, spends(hostile.nodes)) == ([], 0)


def test_rounds_that_too_many_liars_could_undo_are_refused(
    make_masked: MakeConfig, tmp_path: Path, unread: list[int]
) -> None:
    """Four nodes, three to be there and three shares of noise: it stands none on the server's side.
    Two shares stand one."""
    few = Hostile(Consortium(tmp_path / "3", make_masked(), colluders=1))
    few.until("train")
    status, problem = few.train()
    assert status == "refused"
    assert "of which 3 must be honest" in problem
    assert (unread, spends(few.nodes)) == ([], 0)
    enough = Hostile(Consortium(tmp_path / "2", make_masked(privacy__noise_nodes=2), colluders=1))
    enough.until("agree")
    many = Hostile(Consortium(tmp_path / "many", make_masked(), colluders=2))
    assert "with 2 nodes on its side" in str(many.announce()["problem"])


def test_without_noise_a_sum_with_a_liar_alone_is_refused(
    make_masked: MakeConfig, tmp_path: Path, unread: list[int]
) -> None:
    """Of two nodes the other one could take its own update off."""
    config = make_masked(
        privacy__unit="none", privacy__noise_nodes=1, data__nodes=2, federation__min_nodes=2
    )
    one = Hostile(Consortium(tmp_path, config, 2, colluders=1))
    one.until("train")
    status, problem = one.train()
    assert status == "refused"
    assert "of which 2 must be honest" in problem
    assert unread == []


def test_a_server_that_begins_many_rounds_fills_no_memory(hostile: Hostile) -> None:
    hostile.until("share")
    for _ in range(30):
        other = dataclasses.replace(hostile.terms, request=secrets.token_hex(16))
        assert "problem" not in hostile.announce(other)
    assert len(hostile.nodes.vault()._unfinished) == 8
    assert "no masks for this request" in hostile.problem("share", hostile.announced)


def test_what_was_begun_is_remembered_up_to_a_bound() -> None:
    kept = InMemory(remembered=2)
    for request in ("a", "b"):
        kept.begin(request)
    with pytest.raises(WireError, match="begun before"):
        kept.begin("a")
    kept.begin("c")
    kept.begin("a")  # forgotten, as after a restart
    assert len(kept._begun) == 2


def test_two_runs_at_a_time_do_not_disturb_each_other(hostile: Hostile) -> None:
    other = Hostile(hostile.nodes)
    hostile.until("open")
    other.until("reveal")
    hostile._open()
    hostile._train()
    hostile._agree()
    for one in (hostile, other):
        assert "problem" not in one.stage("reveal", one.signatures)
    assert spends(hostile.nodes) == 2


def test_a_message_of_masks_holds_nothing_else(hostile: Hostile) -> None:
    good = dict(terms_to_config(hostile.terms, hostile.nodes.server))
    arrays = RecordDict({"config": ConfigRecord(good), "arrays": hostile.ask.arrays})
    assert "one config record" in str(hostile.nodes.hear(101, arrays).config_records["config"])
    for change in ({"stage": "dance"}, {"length": "6"}, {"nodes": [b"site-1"]}, {"more": 1}):
        assert "problem" in hostile.told(good | change)
    assert "runs fedfuse 0.0.9" in str(
        hostile.nodes.hear(101, RecordDict({"config": ConfigRecord(good)}), version="0.0.9")
    )
    assert "problem" not in hostile.told(good)


VALUES: st.SearchStrategy[Any] = st.one_of(
    st.text(max_size=40),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.binary(max_size=200),
    st.lists(st.sampled_from(["site-1", "site-2", "site-9", ""]), max_size=4),
    st.lists(st.binary(max_size=170), max_size=4),
)
FIELDS = (
    "request",
    "names",
    "parts",
    "nodes",
    "threshold",
    "length",
    "digest",
    "signature",
    "more",
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    stage=st.sampled_from([*STAGES, "mask", "over"]),
    announced=st.booleans(),
    changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3),
)
def test_whatever_comes_as_a_stage_is_refused_in_words_and_reads_nothing(
    hostile: Hostile, unread: list[int], stage: str, announced: bool, changes: dict[str, Any]
) -> None:
    fresh = dataclasses.replace(hostile.terms, request=secrets.token_hex(16))
    good = terms_to_config(fresh, hostile.nodes.server)
    assert "problem" not in hostile.told(good)
    other = dataclasses.replace(fresh, request=secrets.token_hex(16))
    base = terms_to_config(other) if announced else to_config(stage, fresh.request, {})
    assume(any(base.get(key) != value for key, value in changes.items()))
    told = hostile.told(dict(base) | {"stage": stage} | changes)
    assert 0 < len(str(told["problem"])) < 500
    assert set(told) == {"stage", "problem"}
    assert (unread, spends(hostile.nodes)) == ([], 0)


# ---- what the node's operator says


def test_a_node_that_requires_masks_gives_nothing_without_them(
    make_masked: MakeConfig, tmp_path: Path, unread: list[int]
) -> None:
    plain = make_masked(federation__secure_aggregation=False, privacy__noise_nodes=1)
    one = Hostile(Consortium(tmp_path / "plain", plain, secure_aggregation="required"))
    status, problem = one.train()
    assert status == "refused"
    assert "under masks only" in problem
    assert (unread, spends(one.nodes)) == ([], 0)
    masked = Hostile(Consortium(tmp_path / "masked", make_masked(), secure_aggregation="required"))
    masked.until("reveal")


def test_a_node_that_refuses_masks_shares_none(
    make_masked: MakeConfig, tmp_path: Path, unread: list[int]
) -> None:
    one = Hostile(Consortium(tmp_path, make_masked(), secure_aggregation="refused"))
    assert "or this node does not" in str(one.announce()["problem"])
    status, problem = one.train()
    assert status == "refused"
    assert "without masks only" in problem
    assert (unread, spends(one.nodes)) == ([], 0)


def test_a_share_of_noise_alone_leaves_only_under_masks(
    make_masked: MakeConfig, tmp_path: Path, unread: list[int]
) -> None:
    """A policy that does not trust the server: masks stand in for that trust, and nothing else."""
    one = Hostile(Consortium(tmp_path, make_masked(federation__secure_aggregation=False)))
    status, problem = one.train()
    assert status == "refused"
    assert "too little noise" in problem
    by_server = dataclasses.replace(one.ask.job, noise_by="server")
    masked = Hostile(Consortium(tmp_path / "masked", make_masked()), job=by_server)
    masked.until("train")
    assert "too little noise" in masked.train()[1]
    assert unread == []


def test_a_node_without_peers_shares_no_masks(make_masked: MakeConfig, tmp_path: Path) -> None:
    one = Hostile(Consortium(tmp_path, make_masked()))
    path = tmp_path / "site-1" / "node.toml"
    path.write_text(path.read_text().replace("../peers.toml", ""))
    assert "this run shares no masks" in str(one.announce()["problem"])
    assert "this node shares none" in one.train()[1]


def test_a_file_of_peers_is_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    keys = [SigningKey(Ed25519PrivateKey.generate()) for _ in range(3)]
    a, b, c = (key.public for key in keys)
    for text, why in (
        (f'a = "{a}"\nb = "{a}"', "'a' and 'b' have the same key"),
        (f'a = "{a[:-1]}"', "not 64 hexadecimal digits"),
        ("a = 7", "not 64 hexadecimal digits"),
        (f'[a]\nkey = "{a}"', "not 64 hexadecimal digits"),
        (f'"" = "{a}"', "1 to 200"),
        (f'a = "{a}"\na = "{b}"', "cannot be read as TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=why):
            read_peers(path)
    path.write_text(f'"a b" = "{a}"\nc = "{c}"')
    peers = read_peers(path)
    assert peers == {"a b": a, "c": c}
    assert known_to("c", keys[2], peers, where="x") == peers
    assert known_to("b", keys[1], peers, where="x") == peers | {"b": b}
    with pytest.raises(ConfigError, match="is not its own"):
        known_to("c", keys[1], peers, where="x")
    with pytest.raises(ConfigError, match="have the same key"):
        known_to("d", keys[2], peers, where="x")


def test_a_vault_does_not_start_with_keys_that_cannot_be_right(
    make_masked: MakeConfig, tmp_path: Path
) -> None:
    nodes = Consortium(tmp_path, make_masked())
    path, key = tmp_path / "site-1" / "node.toml", tmp_path / "site-1" / "identity.pem"
    key.chmod(0o640)
    with pytest.raises(PrivacyError, match="others may read"):
        Vault(path)
    key.chmod(0o600)
    nodes.identities["site-1"] = "ab" * 32
    nodes.write_peers()
    with pytest.raises(ConfigError, match="is not its own"):
        Vault(path)
    assert NodeFile.read(path).masks.peers == str(tmp_path / "site-1" / "../peers.toml")


def test_a_run_is_not_submitted_while_too_few_peers_are_connected(
    make_masked: MakeConfig, tmp_path: Path
) -> None:
    server = equip_server(tmp_path / "srv", hosts=["localhost"], port=9092, bind="127.0.0.1")
    states = {"a": "online", "b": "offline", "stranger": "online"}
    online = [{"name": name, "status": status} for name, status in states.items()]
    link = cast(SuperLink, SimpleNamespace(server=server, nodes=lambda: online))
    config = make_masked()
    with pytest.raises(ConfigError, match="no such file") as caught:
        launch(link, config, server.runs / "run", resume=False)
    assert "fedfuse node identity" in caught.value.hint
    server.peers.write_text(f'a = "{"aa" * 32}"\nb = "{"bb" * 32}"\n')
    with pytest.raises(FederationError, match=r"1 of 2 registered nodes named in peers\.toml"):
        launch(link, config, server.runs / "run", resume=False)


def test_only_registered_nodes_that_are_peers_are_asked(tmp_path: Path) -> None:
    path = tmp_path / "nodes.json"
    path.write_text(json.dumps({"7": {"name": "a", "key": ""}, "8": {"name": "b", "key": ""}}))
    assert listed_nodes(path, {"b": "x", "c": "y"}) == {8: "b"}
    for text in ("[]", "{", '{"x": {"name": "a"}}', '{"7": {}}'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="cannot be read"):
            listed_nodes(path, {})
