"""What a run tells arrives as it was told; tickets and locks; figures for Prometheus."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from fedfuse.errors import FederationError, FedfuseError, RunFolderError
from fedfuse.federation import deploy, tickets
from fedfuse.federation.journal import JOURNAL, Journal, replay
from fedfuse.federation.metrics import exposition, serving
from fedfuse.federation.observer import RoundRecord, RunInfo, Silent
from fedfuse.federation.processes import Follower, free_port, wait_until
from fedfuse.federation.serverfile import ServerFile, equip_server
from fedfuse.federation.superlink import SuperLink

INFO = RunInfo(
    name="a", engine="superlink", workers=1, device="cpu", nodes=("n 1",), rounds=3, first_round=2,
    parameters=5, private=True, epsilon=8.0, delta=1e-5, sigma=1.0, sample_rate=0.5,
    expected_batch=9.5, assumptions=("x",), notes=(),
)  # fmt: skip
RECORD = RoundRecord(
    round=2, rounds=3, metrics={"loss": 0.5, "auroc": math.nan}, epsilon=1.5, epsilon_allowed=8.0,
    nodes_ok=1, failures={"b": "no answer"}, seconds=1.5, bytes_sent=10, bytes_received=20,
)  # fmt: skip


class Watch(Silent):
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.info: RunInfo | None = None
        self.records: list[RoundRecord] = []

    def prepared(self, info: RunInfo) -> None:
        self.info = info

    def round_finished(self, record: RoundRecord) -> None:
        self.records.append(record)


@pytest.fixture
def link(tmp_path: Path) -> SuperLink:
    return SuperLink(
        equip_server(tmp_path / "srv", hosts=["localhost"], port=free_port(), bind="127.0.0.1")
    )


def test_a_run_is_told_as_it_happened(tmp_path: Path) -> None:
    journal, watch = Journal(tmp_path), Watch()
    journal.prepared(INFO)
    journal.round_started(2)
    journal.node_finished(2, "b", "no answer")
    journal.round_finished(RECORD)
    journal.ended("failed", FederationError("few nodes", where="round 3", hint="more"))
    lines = (tmp_path / JOURNAL).read_text().splitlines()
    *others, last = [replay(line, watch) for line in lines]
    assert others == [None] * 4
    assert watch.info == INFO
    (found,) = watch.records
    assert math.isnan(found.metrics.pop("auroc"))
    assert found == RoundRecord(**{**_fields(RECORD), "metrics": {"loss": 0.5}})
    assert last is not None
    assert (last["status"], last["problem"], last["code"]) == ("failed", "few nodes", 7)
    assert replay('{"event": "from a later version"}', watch) is replay("cut o", watch) is None


def _fields(record: RoundRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def test_of_an_error_that_is_not_ours_only_the_class_is_written(tmp_path: Path) -> None:
    Journal(tmp_path).ended("failed", RuntimeError("patient-17.png"))
    text = (tmp_path / JOURNAL).read_text()
    assert "RuntimeError" in text
    assert "patient" not in text


def test_the_error_that_ended_a_run_ends_its_follower(link: SuperLink) -> None:
    run = link.server.runs / "r"
    lines = Follower(run / JOURNAL)
    Journal(run).ended("failed", FederationError("few nodes", where="round 3", hint="more"))
    with pytest.raises(FedfuseError, match="few nodes") as caught:
        deploy.follow(link, deploy.Started(run, 7, lines), Watch())
    assert caught.value.exit_code == 7
    assert "--resume" not in str(caught.value)  # it had not begun
    (run / "config.toml").touch()
    lines = Follower(run / JOURNAL, place=0)
    with pytest.raises(FedfuseError, match="--resume r") as caught:
        deploy.follow(link, deploy.Started(run, 7, lines), Watch())


def test_a_run_that_was_stopped_ends_its_follower_as_ctrl_c_does(link: SuperLink) -> None:
    run = link.server.runs / "r"
    lines = Follower(run / JOURNAL)
    Journal(run).ended("interrupted")
    with pytest.raises(FedfuseError, match="the run was stopped") as caught:
        deploy.follow(link, deploy.Started(run, 7, lines), Watch())
    assert caught.value.exit_code == 130


def test_a_run_is_followed_again_from_its_last_attempt(link: SuperLink) -> None:
    run = link.server.runs / "r"
    with pytest.raises(RunFolderError, match="no run of this server's"):
        deploy.attach(link, run)
    tickets.issue_ticket(run, 7)
    journal = Journal(run)
    for error in ("first", "second"):
        journal.prepared(INFO)
        journal.round_finished(RECORD)
        journal.ended("failed", FederationError(error))
    watch = Watch()
    with pytest.raises(FedfuseError, match="second"):
        deploy.follow(link, deploy.attach(link, run), watch)
    assert len(watch.records) == 1
    (run / "config.toml").touch()
    watch = Watch()
    with tickets.alone(run):  # and now a third, which has not told anything yet
        started = deploy.attach(link, run)
        assert list(started.lines.lines()) == []
        journal.prepared(INFO)
        journal.ended("finished")
        assert deploy.follow(link, started, watch) == {}
    assert watch.info == INFO


def test_a_server_app_that_ends_without_a_word_is_noticed(link: SuperLink) -> None:
    run = link.server.runs / "r"
    lines = Follower(run / JOURNAL)
    Journal(run).round_started(1)
    with pytest.raises(FederationError, match="killed, or ended without a word") as caught:
        deploy.follow(link, deploy.Started(run, 7, lines), Watch())
    assert "fedfuse server start" in caught.value.hint


def test_a_run_finds_its_folder_by_its_newest_ticket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tickets.issue_ticket(tmp_path / "one", 11)
    tickets.issue_ticket(tmp_path / "two", 12)
    tickets.issue_ticket(tmp_path / "one", 5)
    assert tickets.folder_of(tmp_path, 11) == tickets.folder_of(tmp_path, 5) == tmp_path / "one"
    assert tickets.flower_run_of(tmp_path / "one") == 5
    assert tickets.flower_run_of(tmp_path / "three") is None
    monkeypatch.setattr(tickets, "_TICKET_S", 0.0)
    with pytest.raises(RunFolderError, match="nobody said"):
        tickets.folder_of(tmp_path, 99)


def test_two_server_apps_are_never_at_work_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tickets, "_LOCK_S", 0.1)
    run = tmp_path / "run"
    code = (
        "import sys, time; from pathlib import Path; from fedfuse.federation.tickets import alone\n"
        f"with alone(Path({str(run)!r})):\n    print('in', flush=True); time.sleep(60)"
    )
    assert not tickets.is_conducted(run)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        assert tickets.is_conducted(run)
        with pytest.raises(RunFolderError, match="another server app"), tickets.alone(run):
            pass
        other.kill()
    assert not tickets.is_conducted(run)  # the lock went with its process
    with tickets.alone(run):
        pass


def test_a_server_app_does_not_outlive_what_started_it(tmp_path: Path) -> None:
    """Also where it hangs: in the signal by which Flower would end it, for example."""
    run = tmp_path / "run"
    child = (
        "import time; from pathlib import Path; from fedfuse.federation import tickets\n"
        "tickets._ORPHAN_S = 0.3\n"
        f"with tickets.alone(Path({str(run)!r})), tickets.no_orphan():\n"
        "    print('in', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys\n"
        f"with subprocess.Popen([sys.executable, '-c', {child!r}]) as child:\n    child.wait()"
    )
    words = [sys.executable, "-c", parent]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        time.sleep(1.0)
        assert tickets.is_conducted(run)
        process.kill()
        wait_until(lambda: not tickets.is_conducted(run), 20, "it lives on")


def test_figures_are_those_of_the_run_folders(link: SuperLink) -> None:
    run = link.server.runs / 'a"b'
    run.mkdir()
    (run / "config.toml").touch()
    rows = [
        {"round": n, "failures": {"x": "why"}, "seconds": 1.5, "bytes_sent": 10, "nodes_ok": 2,
         "bytes_received": 20, "epsilon": 1.25 * n} for n in (1, 2)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = dict(
        line.rsplit(" ", 1) for line in exposition(link).splitlines() if not line.startswith("#")
    )
    label = r'{run="a\"b"}'
    assert found["fedfuse_up"] == "0"
    assert 390 * 86400 < float(found["fedfuse_certificate_seconds"]) <= 397 * 86400
    for name, value in {
        "rounds_total": 2, "node_failures_total": 2, "round_seconds_total": 3, "run_active": 0,
        "sent_bytes_total": 20, "received_bytes_total": 40, "round_nodes": 2, "epsilon": 2.5,
    }.items():  # fmt: skip
        assert float(found[f"fedfuse_{name}{label}"]) == value
    assert "why" not in exposition(link)


def test_figures_are_served_to_this_machine(link: SuperLink) -> None:
    path, port = link.server.folder / "server.toml", free_port()
    path.write_text(path.read_text().replace("port = 0", f"port = {port}"))
    link = SuperLink(ServerFile.read(link.server.folder))
    with serving(link):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b"\nfedfuse_up 0\n" in answer.read()
        for name, status in (("health", 503), ("server.toml", 404)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/{name}", timeout=10)
            assert caught.value.code == status
            caught.value.close()
