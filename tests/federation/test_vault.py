"""The vault: the same answers as in a simulation, over its door, whoever brings the letter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from fedfuse.config import RunConfig
from fedfuse.errors import PrivacyError
from fedfuse.federation import node
from fedfuse.federation import vault as vaults
from fedfuse.federation.client import make_client_app
from fedfuse.federation.door import Door
from fedfuse.federation.flower import received, with_id
from fedfuse.federation.forward import make_forwarder
from fedfuse.federation.framing import Letter
from fedfuse.federation.packing import packed, unpacked
from fedfuse.federation.vault import Answered, Vault, serve
from tests.federation.clinic import Clinic

MakeConfig = Callable[..., RunConfig]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(make_config: MakeConfig) -> RunConfig:
    return make_config(privacy__declared_records=30)


@pytest.fixture
def open_vault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Clinic], list[Answered]]]:
    """Serves a clinic in a thread of its own; gives what is told of each answer."""
    doors: list[Door] = []
    served: list[threading.Thread] = []

    def opened(*given: Any, **named: Any) -> Door:
        doors.append(Door(*given, **named))
        return doors[-1]

    def start(clinic: Clinic) -> list[Answered]:
        told: list[Answered] = []
        ready = threading.Event()
        path = clinic.folder / "node.toml"
        monkeypatch.setattr(vaults, "Door", opened)
        thread = threading.Thread(
            target=serve, args=(path, told.append, lambda _: ready.set()), daemon=True
        )
        thread.start()
        assert ready.wait(60)
        served.append(thread)
        return told

    yield start
    for door in doors:
        door.close()
    for thread in served:
        thread.join(20)


def through_flower(clinic: Clinic, record: RecordDict, kind: str = "train") -> RecordDict:
    """What comes back from the app in clinics' bundles, as Flower calls it, packed both ways."""
    message = with_id(Message(RecordDict(), dst_node_id=1, message_type=kind))
    socket = str(clinic.folder / "door" / "vault.sock")
    context = Context(1, 1, {"vault": socket}, RecordDict(), clinic.config.to_flat())
    reply = make_forwarder()(received(packed(record), message.metadata), context).content
    assert all(len(arrays) == 1 for arrays in reply.array_records.values())
    return unpacked(reply)


def test_the_update_is_that_of_a_simulated_node(
    make_config: MakeConfig, tmp_path: Path, open_vault: Callable[[Clinic], list[Answered]]
) -> None:
    """Without a promise nothing is random but the order, which the run's seed gives."""
    config = make_config(privacy__unit="none")
    clinic = Clinic.open(tmp_path / "clinic", config, unit="none")
    told = open_vault(clinic)
    asked = clinic.request().to_record()
    found = through_flower(clinic, asked)
    simulated = make_client_app(config, str(clinic.folder / "store"))
    message = with_id(Message(RecordDict(), dst_node_id=1, message_type="train"))
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    wanted = simulated(received(asked, message.metadata), context).content
    arrays, others = found.array_records["arrays"], wanted.array_records["arrays"]
    assert list(arrays) == list(others)
    for name in arrays:  # to float rounding, which follows where arrays happen to lie in memory
        np.testing.assert_allclose(arrays[name].numpy(), others[name].numpy(), rtol=0, atol=1e-6)
    assert found.metric_records == wanted.metric_records
    start = asked.array_records["arrays"]
    moved = [np.abs(arrays[name].numpy() - start[name].numpy()).max() for name in arrays]
    assert min(moved) > 1e-3
    while not told:
        threading.Event().wait(0.05)
    assert [(a.status, a.epsilon) for a in told] == [("ok", None)]


def test_a_real_node_takes_cores_that_torch_leaves_and_a_simulated_one_none(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a simulation share all cores out."""
    clinic = Clinic.open(tmp_path / "clinic", config)
    monkeypatch.setattr(vaults, "idle_cores", lambda: 5)
    taken: list[int] = []

    def trainer_for(*_: object, idle: int, **named: object) -> NoReturn:
        taken.append(idle)
        raise PrivacyError("enough")

    monkeypatch.setattr(node, "trainer_for", trainer_for)
    asked = clinic.request().to_record()
    clinic.answer(asked)
    simulated = make_client_app(config, str(clinic.folder / "store"))
    message = with_id(Message(RecordDict(), dst_node_id=1, message_type="train"))
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    simulated(received(asked, message.metadata), context)
    assert taken == [5, 0]


def test_each_answer_is_told_and_left_for_the_operator_alone(
    config: RunConfig, tmp_path: Path, open_vault: Callable[[Clinic], list[Answered]]
) -> None:
    clinic = Clinic.open(tmp_path / "clinic", config)
    told = open_vault(clinic)
    asked = clinic.request()
    for record, kind in (
        (asked.to_record(), "train"),
        (asked.to_record(), "train"),
        (asked.to_record(), "evaluate"),
        (RecordDict(), "train"),
    ):
        through_flower(clinic, record, kind)
    while len(told) < 4:
        threading.Event().wait(0.05)
    assert [answered.status for answered in told] == ["ok", "refused", "refused", "refused"]
    first, twice, metrics, nonsense = told
    assert (first.run, first.round, first.rounds) == (asked.run, 1, 3)
    assert first.server == clinic.server.public
    assert first.epsilon is not None
    assert 0 < first.epsilon < 30.0
    assert "was answered before" in twice.problem
    assert twice.epsilon == first.epsilon
    assert "gives no metrics" in metrics.problem
    assert (nonsense.rounds, nonsense.run) == (0, "")
    status = clinic.folder / "door" / vaults.STATUS
    assert json.loads(status.read_text())["problem"] == nonsense.problem
    for name in (vaults.STATUS, vaults.LOG):
        assert (status.with_name(name).stat().st_mode & 0o777) == 0o600


@pytest.mark.parametrize("offline", [True, False])
def test_no_hub_is_asked_for_weights_unless_the_operator_says_so(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    clinic = Clinic.open(tmp_path / "clinic", config)
    with (clinic.folder / "node.toml").open("a") as file:
        file.write(f"\n[vault]\noffline = {str(offline).lower()}\n")
    found: list[str] = []

    def ready(vault: Vault) -> None:
        found.append(os.environ["HF_HUB_OFFLINE"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve(clinic.folder / "node.toml", lambda _: None, ready)
    assert found == ["1" if offline else "0"]
    assert os.environ["HF_HUB_OFFLINE"] == "0"


def test_a_bundle_with_a_fedfuse_of_its_own_is_refused(
    config: RunConfig, tmp_path: Path, unread: list[int]
) -> None:
    clinic = Clinic.open(tmp_path / "clinic", config)
    assert clinic.said(clinic.request()) == "ok: "
    assert clinic.vault is not None
    read = len(unread)
    asked = clinic.request().to_record()
    for changes, said in (
        ({"package": "/home/flower/.flwr/apps/evil/fedfuse"}, "runs a fedfuse of its own"),
        ({"version": "0.0.9"}, "runs fedfuse 0.0.9"),
    ):
        letter = Letter(kind="train", record=asked, settings=clinic.config.to_flat(), **changes)
        reply = clinic.vault.hear(letter)
        assert reply.status == "refused"
        assert said in reply.problem
        assert "/" not in reply.problem.replace("server/, clients/", "")
    assert len(unread) == read


BUNDLE = """
import sys
from clients.app import app
from flwr.app import Context, Message, RecordDict
from fedfuse.federation.flower import received, take_identity, with_id
take_identity()
message = with_id(Message(RecordDict(), dst_node_id=1, message_type="train"))
context = Context(1, 1, {"vault": sys.argv[1]}, RecordDict(), {})
print(dict(app(received(RecordDict(), message.metadata), context).content["config"])["problem"])
"""


@pytest.mark.slow
def test_a_bundle_that_shadows_fedfuse_is_found_out(
    config: RunConfig, tmp_path: Path, open_vault: Callable[[Clinic], list[Answered]]
) -> None:
    """As Flower runs a bundle: its folder comes first where Python looks for modules."""
    clinic = Clinic.open(tmp_path / "clinic", config)
    open_vault(clinic)
    said = []
    for name, parts in (("thin", ("clients",)), ("thick", ("clients", "fedfuse"))):
        bundle = tmp_path / name
        for part in parts:
            shutil.copytree(ROOT / part, bundle / part)
        path = os.pathsep.join([str(bundle), str(ROOT)])
        done = subprocess.run(
            [sys.executable, "-c", BUNDLE, clinic.folder / "door" / "vault.sock"],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "exactly one is needed" in said[0]  # understood, and no request
    assert "runs a fedfuse of its own" in said[1]


def test_what_runs_in_the_bundles_process_loads_neither_torch_nor_data() -> None:
    code = (
        "import sys, clients.app\n"
        "held = {'torch', 'opacus', 'pyarrow', 'fedfuse.data', 'fedfuse.privacy.ledger'}\n"
        "print(sorted(held & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
