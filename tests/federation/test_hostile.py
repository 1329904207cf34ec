"""A server that asks for what a node must not give: refused before a record is read, nothing spent.

Each request here is well-formed Flower and, unless that is the point, signed by a server that the
node answers.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedfuse.config import RunConfig
from fedfuse.data.dataset import Dataset
from fedfuse.data.prepare import prepare
from fedfuse.errors import LedgerError
from fedfuse.federation import node
from fedfuse.federation.wire import config_digest, signed
from fedfuse.privacy import accounting
from fedfuse.privacy.ledger import Kind
from fedfuse.privacy.signing import SigningKey
from fedfuse.privacy.spec import Unit
from tests.federation.clinic import Clinic
from tests.federation.conftest import write_manifest

MakeConfig = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def config(make_config: MakeConfig) -> RunConfig:
    return make_config(privacy__noise_seed="", privacy__declared_records=30)


@pytest.fixture
def clinic(config: RunConfig, tmp_path: Path) -> Clinic:
    return Clinic.open(tmp_path / "clinic", config)


def mechanism(clinic: Clinic, *, rounds: int = 3, sign: bool = True, **changes: Any) -> Any:
    """An honest request but for some fields of its mechanism."""
    honest = clinic.request()
    assert honest.job.mechanism is not None
    what = dataclasses.replace(honest.job.mechanism, **changes)
    job = dataclasses.replace(honest.job, mechanism=what, steps=what.steps)
    return clinic.request(job=job, rounds=rounds, sign=sign)


def no_noise(clinic: Clinic) -> Any:
    record = clinic.request().to_record()
    record.config_records["config"]["mechanism.noise_multiplier"] = 0.0
    return record


def changed_on_the_way(clinic: Clinic) -> Any:
    record = clinic.request().to_record()
    record.config_records["config"]["job.learning_rate"] = 0.25
    return record


def other_weights(clinic: Clinic) -> Any:
    asked, other = clinic.request(), clinic.request()
    name = min(asked.arrays)
    value = asked.arrays[name].numpy() + 1
    other.arrays[name] = type(asked.arrays[name])(value)
    return dataclasses.replace(asked, arrays=other.arrays)


def a_stranger(clinic: Clinic) -> Any:
    key = SigningKey.create(clinic.folder / "stranger.pem")
    return signed(clinic.request(sign=False), key)


HOSTILE: dict[str, tuple[Callable[[Clinic], Any], str]] = {
    "no noise": (no_noise, "not a mechanism: .*noise_multiplier = 0"),
    "next to no noise": (lambda c: mechanism(c, noise_multiplier=1e-3), "at least 0.3"),
    "all records, little noise": (
        lambda c: mechanism(c, sample_rate=1.0, noise_multiplier=0.3),
        "BudgetExceeded",
    ),
    "a million steps": (lambda c: mechanism(c, steps=10**6), "steps in all rounds"),
    "as many steps as allowed": (lambda c: mechanism(c, steps=33_000), "BudgetExceeded"),
    "a million rounds": (lambda c: mechanism(c, rounds=10**6), "rounds"),
    "as many rounds as allowed": (lambda c: mechanism(c, rounds=1000), "BudgetExceeded"),
    "a huge clip norm": (lambda c: mechanism(c, clip_norm=1e9), r"C = 1e\+09"),
    "another unit": (
        lambda c: mechanism(c, unit=Unit.NODE, sample_rate=1.0, steps=1),
        'promises unit "record"',
    ),
    "nothing promised": (
        lambda c: c.request(job=dataclasses.replace(c.request().job, mechanism=None)),
        '"none" was asked for',
    ),
    "an unknown task": (lambda c: c.request(task="faces"), "'faces'"),
    "other modalities": (lambda c: c.request(modalities=("left", "genome")), "modalities"),
    "a lie about the model": (lambda c: c.request(parameters=10), "10 parameters are announced"),
    "a huge model": (lambda c: c.request(parameters=10**12), "parameters, but this node allows"),
    "unsigned": (lambda c: c.request(sign=False), "unsigned request is not one"),
    "signed by a stranger": (a_stranger, "not one that this node answers"),
    "changed on its way": (changed_on_the_way, "did not sign it"),
    "other weights than signed": (other_weights, "did not sign it"),
    "late": (lambda c: c.request(deadline=time.time() - 1), "after its deadline$"),
    "late by a day": (lambda c: c.request(deadline=time.time() - 86400), "clock right"),
    "of another configuration": (lambda c: c.request(digest="e" * 64), "another configuration"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_request_is_refused_before_a_record_is_read_and_costs_nothing(
    clinic: Clinic, unread: list[int], what: str
) -> None:
    make, message = HOSTILE[what]
    said = clinic.said(make(clinic))
    assert said.startswith("refused: ")
    assert re.search(message, said), said
    assert unread == []
    assert clinic.ledger().datasets() == ()
    assert clinic.said(clinic.request()) == "ok: "  # the node is alive, and its budget whole
    assert clinic.ledger().accounts()[0].rounds == 1


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"tasks": ["regression"]}, "task 'classification' is not allowed here"),
        ({"modalities": ["left"]}, "modality 'right' is not allowed here"),
        ({"max_parameters": 10}, "parameters, but this node allows 10"),
        ({"max_rounds": 2}, "3 rounds, but this node allows 2"),
        ({"max_steps": 5}, "6 steps in all rounds, but this node allows 5"),
        ({"min_noise_multiplier": 1.3}, "sigma = 1.2 is asked for, but this node allows at least"),
        ({"max_sample_rate": 0.4}, "q = 0.5 is asked for, but this node allows at most 0.4"),
        ({"max_clip_norm": 0.5}, "C = 1 is asked for, but this node allows at most 0.5"),
        ({"max_epsilon": 3.0}, "more than epsilon = 3"),
        ({"delta": 1e-12, "max_epsilon": 8.0}, "delta = 1e-12"),
        ({"outputs": []}, "update is not allowed to leave"),
    ],
)
def test_each_limit_of_the_policy_is_kept(
    config: RunConfig, tmp_path: Path, unread: list[int], policy: dict[str, Any], message: str
) -> None:
    clinic = Clinic.open(tmp_path / "clinic", config, **policy)
    said = clinic.said(clinic.request())
    assert said.startswith("refused: ")
    assert message in said
    assert unread == []
    assert clinic.ledger().datasets() == ()


def test_a_model_too_large_for_memory_is_refused_without_being_built(
    clinic: Clinic, unread: list[int], config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*args: Any, **given: Any) -> Any:
        raise AssertionError("it was built")

    huge = config.with_values({"model.dim": 65536, "model.head_width": 65536})
    lying = clinic.request()
    monkeypatch.setattr(node, "build_model", build)
    said = clinic.said(
        signed(dataclasses.replace(lying, digest=config_digest(huge)), clinic.server), config=huge
    )
    assert "but the configuration's model has" in said
    assert unread == []
    assert clinic.ledger().datasets() == ()


def test_a_message_that_comes_twice_is_charged_once(clinic: Clinic, unread: list[int]) -> None:
    asked = clinic.request()
    assert clinic.said(asked) == "ok: "
    read = len(unread)
    assert "was answered before" in clinic.said(asked)
    assert len(unread) == read
    assert clinic.ledger().accounts()[0].rounds == 1


def test_a_round_that_is_over_is_refused_and_costs_nothing(
    clinic: Clinic, unread: list[int]
) -> None:
    stale = clinic.request(round=1)
    assert clinic.said(clinic.request(round=2)) == "ok: "
    assert clinic.said(clinic.request(round=2)) == "ok: "  # its server was stopped, and goes on
    read = len(unread)
    assert "round 1 is over: round 2 of this run was answered" in clinic.said(stale)
    assert len(unread) == read
    assert [entry.round for entry in clinic.ledger().entries()][1:] == [2, 2, 2, 2]
    assert clinic.said(clinic.request(run="e" * 32, round=1)) == "ok: "


def test_a_round_that_ends_while_its_cost_is_weighed_is_not_charged(
    clinic: Clinic, unread: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = clinic.request(deadline=time.time() + 60)

    def slowly(*given: Any) -> bool:
        monkeypatch.setattr(time, "time", lambda: late.deadline + 1)
        return True

    monkeypatch.setattr(accounting, "within", slowly)
    assert "after its deadline" in clinic.said(late)
    assert unread == []
    assert clinic.ledger().datasets() == ()


def test_a_run_of_another_server_cannot_be_gone_on_with(
    clinic: Clinic, config: RunConfig, tmp_path: Path
) -> None:
    other = SigningKey.create(tmp_path / "other.pem")
    text = (clinic.folder / "node.toml").read_text()
    both = text.replace(clinic.server.public, f'{clinic.server.public}",\n"{other.public}')
    (clinic.folder / "node.toml").write_text(both)
    assert clinic.said(clinic.request()) == "ok: "
    stolen = signed(dataclasses.replace(clinic.request(), round=2), other)
    assert "belongs to another server" in clinic.said(stolen)
    assert clinic.ledger().accounts()[0].rounds == 1


def test_servers_and_runs_spend_from_one_budget(config: RunConfig, tmp_path: Path) -> None:
    """Two servers, three runs, one of them under another name: they compose."""
    tight = dataclasses.replace(
        config, privacy=dataclasses.replace(config.privacy, epsilon=7.0, noise_multiplier=1.2)
    )
    clinic = Clinic.open(tmp_path / "clinic", tight, max_epsilon=7.0)
    other = SigningKey.create(tmp_path / "other.pem")
    text = (clinic.folder / "node.toml").read_text()
    both = text.replace(clinic.server.public, f'{clinic.server.public}",\n"{other.public}')
    (clinic.folder / "node.toml").write_text(both)
    answers = []
    for run in range(8):
        asked = clinic.request(run=f"{run:032x}", rounds=1, sign=False)
        answers.append(clinic.said(signed(asked, (clinic.server, other)[run % 2])))
    done = answers.count("ok: ")
    assert 1 < done < 8
    assert answers[:done] == ["ok: "] * done
    assert all("BudgetExceeded" in said for said in answers[done:])
    account = clinic.ledger().accounts()[0]
    assert (account.runs, account.servers) == (done, 2)


def test_what_crashed_after_the_reservation_is_spent(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Dataset, rows: Any) -> Any:
        entries = list(clinic.ledger().entries())
        assert entries[-1].kind is Kind.RESERVED  # it stands there before a record is read
        raise OSError("cannot read /data/secret/patient-17.png")

    with monkeypatch.context() as patch:
        patch.setattr(Dataset, "batch", broken)
        assert clinic.said(clinic.request()) == "failed: OSError"
    account = clinic.ledger().accounts()[0]
    assert (account.rounds, account.open) == (1, 1)


def test_noise_does_not_follow_from_what_the_server_configures(
    clinic: Clinic, config: RunConfig
) -> None:
    """Its noise seed is refused, and calling the run one without a promise changes no noise."""
    said = clinic.said(clinic.request(), config.with_values({"privacy.noise_seed": "known"}))
    assert said.startswith("refused: PrivacyError: privacy.noise_seed is set"), said
    assert clinic.ledger().datasets() == ()
    plain = clinic.config.with_values({"privacy.unit": "none"})
    digest = config_digest(plain)
    seen = []
    for run in range(4):
        asked = clinic.request(run=f"{run:032x}", rounds=1)
        given = clinic.config if run < 2 else plain
        if run >= 2:
            asked = signed(dataclasses.replace(asked, digest=digest), clinic.server)
        reply = clinic.answer(asked, given)
        assert reply.config_records["config"]["status"] == "ok", reply.config_records["config"]
        arrays = reply.array_records["arrays"]
        seen.append(b"".join(arrays[name].data for name in sorted(arrays)))
    assert len(set(seen)) == 4


def test_a_trial_with_noise_from_a_seed_is_entered_as_no_promise(
    config: RunConfig, tmp_path: Path
) -> None:
    """The same update from two nodes of one name, in the ledger for ever: NOT PRIVATE."""
    seeded, seen = config.with_values({"privacy.noise_seed": "known"}), []
    for folder in (tmp_path / "one", tmp_path / "two"):
        clinic = Clinic.open(folder, config, seeded_noise=True)
        for round in (1, 2):
            reply = clinic.answer(clinic.request(round=round), seeded)
            assert reply.config_records["config"]["status"] == "ok", reply.config_records
            arrays = reply.array_records["arrays"]
            seen.append(b"".join(arrays[name].data for name in sorted(arrays)))
        kinds = [entry.kind for entry in clinic.ledger().entries()]
        assert kinds == ["opened", "exposed", "exposed"]
        assert clinic.vault is not None
        assert clinic.vault.spent() is None  # no figure holds
        assert "no promise holds for them any more" in clinic.said(clinic.request(run="b" * 32))
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]


def test_a_ledger_that_cannot_be_trusted_stops_the_node(clinic: Clinic, unread: list[int]) -> None:
    path = clinic.folder / "ledger"
    older = path.read_bytes()
    assert clinic.said(clinic.request()) == "ok: "
    whole = path.read_bytes()
    read = len(unread)
    for damaged in (older, b""):
        path.write_bytes(damaged)
        said = clinic.said(clinic.request())
        assert said.startswith("refused: LedgerError"), said
        assert str(clinic.folder) not in said
    path.unlink()
    assert "there is no ledger" in clinic.said(clinic.request())
    for damaged in (older, whole.replace(b"site-a", b"site-b", 1), b"", None):
        path.unlink(missing_ok=True)
        if damaged is not None:
            path.write_bytes(damaged)
        clinic.restart()
        with pytest.raises(LedgerError):
            clinic.answer(clinic.request())
    assert len(unread) == read


def test_changed_records_do_not_bring_a_new_budget(
    config: RunConfig, tmp_path: Path, unread: list[int]
) -> None:
    """Without a name of their own, other records than the ledger knows are refused."""
    clinic = Clinic.open(tmp_path / "clinic", config)
    assert clinic.said(clinic.request()) == "ok: "
    more = tmp_path / "more"
    more.mkdir()
    manifest = write_manifest(more)
    manifest.write_text(manifest.read_text().replace("site-a,s0,down", "site-a,s0,up", 1))
    shutil.rmtree(clinic.folder / "store")
    changed = config.with_values({"data.manifest": str(manifest)})
    prepare(changed.data, seed=0, fingerprints=True).write(clinic.folder / "store")
    read = len(unread)
    assert "were changed while it was running" in clinic.said(clinic.request())
    clinic.restart()
    assert "not those that its ledger knows" in clinic.said(clinic.request())
    assert len(unread) == read
    known = clinic.ledger().datasets()[0]
    text = (clinic.folder / "node.toml").read_text()
    (clinic.folder / "node.toml").write_text(text.replace("[data]", f'[data]\ndataset = "{known}"'))
    clinic.restart()
    assert clinic.said(clinic.request(run="c" * 32)) == "ok: "
    assert clinic.ledger().accounts()[0].runs == 2


def test_a_person_with_several_records_is_not_taken_for_a_record(
    make_config: MakeConfig, tmp_path: Path, unread: list[int]
) -> None:
    repeats = write_manifest(tmp_path)
    repeats.write_text(re.sub(r",s\d+,", ",s1,", repeats.read_text()))
    config = make_config(
        data__manifest=str(repeats), privacy__declared_records=30, privacy__records_are_units=True
    )
    clinic = Clinic.open(tmp_path / "clinic", config)
    said = clinic.said(clinic.request())
    assert "subjects have several records" in said
    assert not any(character.isdigit() for character in said)  # no count leaves
    assert unread == []
    allowed = Clinic.open(tmp_path / "other", config, records_are_units=True)
    assert allowed.said(allowed.request()) == "ok: "


def test_a_count_leaves_only_where_the_operator_lets_it(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(privacy__unit="none", federation__weighting="examples")
    for outputs, said in ((["update"], "record-count is not allowed"), (None, "ok: ")):
        policy = {"unit": "none", "outputs": outputs or ["update", "record-count"]}
        clinic = Clinic.open(tmp_path / str(said[:2]), config, **policy)
        reply = clinic.answer(clinic.request())
        told = reply.config_records["config"]
        assert said in f"{told['status']}: {told['problem']}"
        weight = reply.metric_records["metrics"]["weight"]
        assert (weight > 1) == (said == "ok: ")


def test_data_that_a_run_without_a_promise_has_read_cannot_be_promised_anything_later(
    config: RunConfig, make_config: MakeConfig, tmp_path: Path, unread: list[int]
) -> None:
    private = Clinic.open(tmp_path / "clinic", config)
    text = (private.folder / "node.toml").read_text()
    plain = text.replace('unit = "record"', 'unit = "none"')
    plain = re.sub("(max_epsilon|delta) = .*\n", "", plain)
    (private.folder / "node.toml").write_text(plain)
    open_run = Clinic(private.folder, make_config(privacy__unit="none"), private.server)
    asked = open_run.request()
    assert open_run.said(asked) == "ok: "
    assert "was answered before" in open_run.said(asked)
    assert private.ledger().accounts()[0].exposed
    (private.folder / "node.toml").write_text(text)
    private.restart()
    read = len(unread)
    assert "promises nothing" in private.said(private.request(run="d" * 32))
    assert len(unread) == read
