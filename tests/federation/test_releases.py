"""Every byte that a node lets out, and why it may leave.

A node's answer is taken as it goes over the wire, byte by byte. What WHY names is put aside, and
nothing else may be left. Then two nodes answer the same request, whose
records differ in one, in all, or in number: all bytes but those that were noised and charged must
be the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_to_proto

from fedfuse.config import RunConfig
from fedfuse.data.dataset import Dataset
from fedfuse.federation import node
from fedfuse.federation.wire import TrainRequest
from tests.federation.clinic import Clinic
from tests.federation.conftest import write_manifest

MakeConfig = Callable[..., RunConfig]

FIXED = "the same in every answer"
PUBLIC = "follows from the request and the node's public name"
CHARGED = "noised on the node; what it costs was reserved before a record was read"
BOOKS = "of the ledger: a hash over mechanisms, ids and times, salted by the ledger's random id"
SCRUBBED = "an error's class, and its text where that was made of public settings"

WHY = {
    "config/protocol": FIXED,
    "config/version": FIXED,
    "config/node": PUBLIC,
    "config/round": PUBLIC,
    "config/status": SCRUBBED,
    "config/problem": SCRUBBED,
    "config/unclipped": CHARGED,
    "config/ledger": BOOKS,
    "config/head": BOOKS,
    "config/event.node": PUBLIC,
    "config/event.round": PUBLIC,
    "config/event.status": SCRUBBED,
    "config/event.unit": PUBLIC,
    "config/event.sample_rate": PUBLIC,
    "config/event.noise_multiplier": PUBLIC,
    "config/event.clip_norm": PUBLIC,
    "config/event.steps": PUBLIC,
    "config/event.count_noise": PUBLIC,
    "metrics/weight": FIXED,
    "arrays/*": CHARGED,
}
"""Why each thing in an answer may leave. Whoever adds one to the wire must say it here."""


@pytest.fixture(params=["record", "subject", "node", "adaptive"])
def config(make_config: MakeConfig, request: pytest.FixtureRequest) -> RunConfig:
    adaptive = request.param == "adaptive"
    return make_config(
        privacy__unit="record" if adaptive else request.param,
        privacy__adaptive_clip=adaptive,
        privacy__noise_multiplier=3.0,
        privacy__declared_records=30,
        privacy__declared_subjects=30,
        train__rounds=1,
        privacy__noise_seed="",
    )


def leaves(record: RecordDict) -> Iterator[tuple[str, Any]]:
    """Every value in a message, under the name of its record and its own."""
    for name in record:
        for key, value in record[name].items():
            yield f"{name}/{key}", value


def reason(name: str) -> str | None:
    return WHY.get("arrays/*" if name.startswith("arrays/") else name)


def on_the_wire(record: RecordDict) -> bytes:
    """The message as Flower sends it."""
    return bytes(recorddict_to_proto(record).SerializeToString(deterministic=True))


def without(record: RecordDict, *reasons: str) -> bytes:
    """The bytes on the wire, with zeros where values leave for one of `reasons`."""
    blank = RecordDict()
    for name in record:
        part = record[name]
        if isinstance(part, ArrayRecord):
            blank[name] = ArrayRecord({key: _zeros(array) for key, array in part.items()})
        elif isinstance(part, ConfigRecord):
            blank[name] = ConfigRecord(
                {
                    key: _nothing(value) if reason(f"{name}/{key}") in reasons else value
                    for key, value in part.items()
                }
            )
        else:
            blank[name] = part
    return on_the_wire(blank)


def _zeros(array: Array) -> Array:
    return Array(np.zeros_like(array.numpy()))


def _nothing(value: Any) -> Any:
    return [0.0] * len(value) if isinstance(value, list) else type(value)()


def answers(clinic: Clinic, asked: TrainRequest) -> RecordDict:
    clinic.restart()
    return clinic.answer(asked)


def test_nothing_leaves_that_is_not_named_with_its_reason(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clinic = Clinic.open(tmp_path / "clinic", config)
    replies = {"ok": answers(clinic, clinic.request())}
    replies["refused"] = answers(clinic, clinic.request(task="faces"))
    replies["not understood"] = answers(clinic, RecordDict())  # type: ignore[arg-type]

    def broken(self: Dataset, rows: Any) -> Any:
        raise ValueError("patient-17 has 3 records in /data/secret/patient-17.png")

    monkeypatch.setattr(Dataset, "batch", broken)
    # The budget is one round's, so that the ledger of another clinic pays for the next.
    other = Clinic.open(tmp_path / "other", config)
    replies["failed"] = answers(other, other.request())
    for kind, reply in replies.items():
        unnamed = {name for name, _ in leaves(reply)} - set(WHY)
        unnamed = {name for name in unnamed if not name.startswith("arrays/")}
        assert unnamed == set(), kind
        assert ("arrays" in reply) == (kind == "ok")
        assert dict(leaves(reply))["metrics/weight"] == 1.0
    assert dict(leaves(replies["failed"]))["config/problem"] == "ValueError"
    assert b"patient" not in b"".join(map(on_the_wire, replies.values()))
    # What is not a value is Flower's framing: the same for every content.
    size = len(on_the_wire(replies["ok"]))
    parts = sum(len(json.dumps(v)) if not isinstance(v, Array) else len(v.data)
                for _, v in leaves(replies["ok"]))  # fmt: skip
    assert parts < size < 2 * parts + 40 * len(list(leaves(replies["ok"])))


def changed(folder: Path, how: str) -> Path:
    """The small data set in which node site-a has other records."""
    folder.mkdir()
    path = write_manifest(folder)
    lines = path.read_text().splitlines(keepends=True)
    own = [i for i, line in enumerate(lines) if "train,site-a" in line]
    if how == "one record less":
        del lines[own[3]]
    elif how == "another label":
        lines[own[3]] = re.sub(",(up|down),", ",up,", lines[own[3]])
        lines[own[4]] = re.sub(",(up|down),", ",down,", lines[own[4]])
    elif how == "one record alone":
        lines = [line for i, line in enumerate(lines) if i not in own[1:]]
    elif how == "no modality":
        for i in own:
            lines[i] = re.sub(r",(up|down),.*", r",\1,,", lines[i])
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    "how", ["one record less", "another label", "one record alone", "no modality"]
)
def test_all_bytes_but_the_charged_ones_are_the_same_whatever_the_records(
    config: RunConfig, tmp_path: Path, how: str
) -> None:
    first = Clinic.open(tmp_path / "first", config)
    asked = first.request()
    manifest = changed(tmp_path / "data", how)
    second = Clinic.open(
        tmp_path / "second",
        config.with_values({"data.manifest": str(manifest)}),
        servers=[first.server.public],
    )
    one = answers(first, asked)
    second.config = config  # the server runs one configuration
    two = answers(second, asked)
    assert dict(leaves(one))["config/status"] == dict(leaves(two))["config/status"] == "ok"
    assert on_the_wire(one) != on_the_wire(two)
    assert without(one, CHARGED, BOOKS) == without(two, CHARGED, BOOKS)
    for reply in (one, two):
        found = dict(leaves(reply))
        assert re.fullmatch("[0-9a-f]{64}", found["config/head"])
        assert re.fullmatch("[0-9a-f]{32}", found["config/ledger"])


def test_every_weight_that_leaves_was_noised(config: RunConfig, tmp_path: Path) -> None:
    """The same request twice: no trained weight comes out the same, and no other weight moved."""
    clinic = Clinic.open(tmp_path / "clinic", config, max_epsilon=1000.0)
    asked = clinic.request()
    again = clinic.request(run="c" * 32)
    one, two = answers(clinic, asked), answers(clinic, again)
    trained = node.new_trainer(
        config, node._open(str(clinic.folder / "store"), 0)[1].schema
    ).trainable
    for name, array in one.array_records["arrays"].items():
        start = asked.arrays[name].numpy()
        first, second = array.numpy(), two.array_records["arrays"][name].numpy()
        if name in trained:
            assert np.mean(first == second) < 0.02, name
        else:
            np.testing.assert_array_equal(first, start)
            np.testing.assert_array_equal(second, start)


def test_a_node_gives_no_metrics(clinic_message: Callable[[str], RecordDict]) -> None:
    """An evaluation of its records would be a release: it has no answer but a refusal."""
    for kind in ("evaluate", "query"):
        told = clinic_message(kind).config_records["config"]
        assert told["status"] == "refused"
        assert "gives no" in str(told["problem"])


@pytest.fixture
def clinic_message(make_config: MakeConfig, tmp_path: Path) -> Callable[[str], RecordDict]:
    clinic = Clinic.open(tmp_path / "clinic", make_config(privacy__declared_records=30))

    def send(kind: str) -> RecordDict:
        content = clinic.asked(kind, clinic.request())
        assert clinic.ledger().datasets() == ()
        return content

    return send
