"""Whole runs: what is written, what is repeatable, what a broken-off run leaves."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from flwr.app import Context, RecordDict

from fedfuse.config import RunConfig
from fedfuse.data.prepare import prepare
from fedfuse.data.reading import Reading
from fedfuse.errors import ConfigError, FederationError, PrivacyError, RunFolderError
from fedfuse.federation.client import make_client_app
from fedfuse.federation.loopback import LoopbackGrid
from fedfuse.federation.observer import RoundRecord, RunInfo, Silent
from fedfuse.federation.released import open_model
from fedfuse.federation.server import make_server_app, serve
from fedfuse.federation.simulate import simulate
from fedfuse.runfolder import RunFolder
from tests.federation.conftest import write_manifest

MakeConfig = Callable[..., RunConfig]


class Watch(Silent):
    """Remembers what it was told; `stop_in` raises in the middle of that round."""

    def __init__(self, stop_in: int = 0, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.records: list[RoundRecord] = []
        self.info: RunInfo | None = None
        self._stop_in = stop_in
        self._error = error

    def prepared(self, info: RunInfo) -> None:
        self.info = info

    def round_started(self, round: int) -> None:
        self.told.append(("round", round))

    def node_finished(self, round: int, name: str, problem: str | None) -> None:
        self.told.append((round, name, problem))
        if round == self._stop_in:
            raise self._error

    def round_finished(self, record: RoundRecord) -> None:
        self.records.append(record)


def test_a_run_writes_all_that_its_summary_says(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / "tmp" / f"fedfuse-{gone.pid}-x"  # by a run that was killed outright
    running = tmp_path / "tmp" / f"fedfuse-{os.getpid()}-x"
    for folder in (left, running):
        folder.mkdir(parents=True)
    multiprocessing.util.get_temp_dir()  # a socket's name must be short
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    config = make_config(privacy__noise_seed="")
    summary = simulate(config, tmp_path / "run", observer=watch)

    folder = RunFolder.open(tmp_path / "run")
    assert folder.summary() == summary
    assert summary["status"] == "finished"
    assert summary["rounds_done"] == 3
    privacy = summary["privacy"]
    assert privacy["epsilon_server"] == max(privacy["epsilon_by_node"].values())
    assert 0 < privacy["epsilon_server"] <= privacy["epsilon_rdp"]
    assert privacy["steps"] == 6
    assert privacy["noise_source"] == "operating system"
    assert [row["round"] for row in folder.metrics()] == [1, 2, 3]
    events = folder.events()
    assert len(events) == 9
    assert {event.status for event in events} == {"spent"}
    assert not (tmp_path / "run" / "reserved.json").exists()
    model, schema = open_model(folder)
    assert Reading.from_dict(folder.reading()).schema == schema
    assert folder.calibration() is None  # there is no valid split
    assert schema.names == ("left", "right")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == summary["parameters"]
    assert folder.config() == config
    assert watch.info is not None
    assert watch.info.nodes == ("site-a", "site-b", "site-c")
    assert [record.round for record in watch.records] == [1, 2, 3]
    assert {(3, f"site-{x}", None) for x in "abc"} <= set(watch.told)
    assert list((tmp_path / "tmp").glob("fedfuse-*")) == [running]


def test_the_books_give_the_same_epsilon_to_who_does_not_use_fedfuse(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """events.jsonl read as plain JSON, composed by dp-accounting as its documentation says."""
    summary = simulate(make_config(), tmp_path / "run", observer=Silent())
    accountants: dict[str, PLDAccountant] = {}
    for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        accountant = accountants.setdefault(event["node"], PLDAccountant())
        step = PoissonSampledDpEvent(
            event["sample_rate"], GaussianDpEvent(event["noise_multiplier"])
        )
        accountant.compose(step, event["steps"])
    found = {node: accountant.get_epsilon(1e-5) for node, accountant in accountants.items()}
    assert found == pytest.approx(summary["privacy"]["epsilon_by_node"], rel=1e-3)


def test_a_run_that_is_not_private_names_no_epsilon(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    summary = simulate(
        make_config(privacy__unit="none", federation__weighting="examples"),
        tmp_path / "run",
        observer=Silent(),
    )
    assert summary["privacy"]["private"] is False
    assert summary["privacy"]["statement"].startswith("NOT PRIVATE")
    assert "epsilon" not in json.dumps(summary)
    assert "epsilon" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert RunFolder.open(tmp_path / "run").events() == []
    assert summary["metrics"]["accuracy"] > 0.8


def test_declared_records_are_the_mean_to_one_digit(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    summary = simulate(make_config(train__rounds=1), tmp_path / "run", observer=Silent())
    assert summary["privacy"]["declared_records"] == 30
    assert any("declared_records = 30" in text for text in summary["assumptions"])


def test_a_resumed_run_is_the_uninterrupted_one(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(federation__strategy="fedadam", federation__server_learning_rate=0.1)
    whole = simulate(config, tmp_path / "whole", observer=Silent())
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", observer=Watch(stop_in=2))
    folder = RunFolder.open(tmp_path / "run")
    cut = folder.summary()
    assert cut is not None
    assert (cut["status"], cut["rounds_done"]) == ("interrupted", 1)
    assert [event.status for event in folder.events()] == ["spent"] * 3 + ["reserved"] * 3
    assert open_model(folder)

    resumed = simulate(config, tmp_path / "run", observer=Silent(), resume=True)
    assert resumed["rounds_done"] == 3
    assert resumed["privacy"] == whole["privacy"]
    assert folder.events() == RunFolder.open(tmp_path / "whole").events()
    expected, _ = RunFolder.open(tmp_path / "whole").model()
    for name, value in folder.model()[0].items():
        np.testing.assert_array_equal(value, expected[name])


def test_a_signal_after_the_last_round_leaves_a_finished_run(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    class Late(Silent):
        def round_finished(self, record: RoundRecord) -> None:
            if record.round == record.rounds:
                raise KeyboardInterrupt

    summary = simulate(make_config(train__rounds=1), tmp_path / "run", observer=Late())
    assert summary["status"] == "finished"
    assert RunFolder.open(tmp_path / "run").summary() == summary


@pytest.mark.slow
def test_without_a_seed_a_round_broken_off_stays_spent(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(privacy__noise_seed="", privacy__noise_multiplier=0.0)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path / "run", observer=Watch(stop_in=2))
    resumed = simulate(config, tmp_path / "run", observer=Silent(), resume=True)
    assert resumed["status"] == "finished"
    assert resumed["rounds_done"] == 2
    assert any("stays spent" in note for note in resumed["notes"])
    events = RunFolder.open(tmp_path / "run").events()
    assert [event.status for event in events].count("reserved") == 3
    assert resumed["privacy"]["steps"] == 6
    assert resumed["privacy"]["epsilon_server"] <= config.privacy.epsilon


def test_the_same_noise_seed_gives_the_same_model(make_config: MakeConfig, tmp_path: Path) -> None:
    one = simulate(make_config(), tmp_path / "one", observer=Silent())
    other = simulate(make_config(federation__workers=1), tmp_path / "other", observer=Silent())
    assert one["privacy"] == other["privacy"]
    expected, _ = RunFolder.open(tmp_path / "one").model()
    for name, value in RunFolder.open(tmp_path / "other").model()[0].items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("unit", ["record", pytest.param("none", marks=pytest.mark.slow)])
def test_nodes_that_train_together_end_as_they_would_alone(
    make_config: MakeConfig, tmp_path: Path, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(privacy__unit=unit)
    found = []
    for together in (0, 1):
        folder = tmp_path / str(together)
        each = config.with_values({"federation.together": together, "federation.workers": 1})
        simulate(each, folder, observer=Silent())
        run = RunFolder.open(folder)
        found.append((run.model()[0], [(e.node, e.status, e.round) for e in run.events()]))
    (stacked, first), (alone, second) = found
    assert sorted(first) == sorted(second)
    for name, value in alone.items():
        np.testing.assert_allclose(stacked[name], value, rtol=1e-4, atol=1e-5)


def test_what_is_finished_or_another_run_is_not_resumed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(train__rounds=1)
    simulate(config, tmp_path / "run", observer=Silent())
    with pytest.raises(RunFolderError, match="finished"):
        simulate(config, tmp_path / "run", observer=Silent(), resume=True)
    with pytest.raises(RunFolderError, match="not the configuration"):
        simulate(make_config(seed=1), tmp_path / "run", observer=Silent(), resume=True)
    with pytest.raises(RunFolderError, match="not empty"):
        simulate(config, tmp_path / "run", observer=Silent())
    with pytest.raises(RunFolderError, match="no run to resume"):
        simulate(config, tmp_path / "nowhere", observer=Silent(), resume=True)


def test_repeated_subjects_are_refused_unless_records_are_units(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    path = write_manifest(tmp_path, repeat=True)
    config = make_config(data__manifest=str(path), train__rounds=1)
    with pytest.raises(PrivacyError, match="several records") as caught:
        simulate(config, tmp_path / "run", observer=Silent())
    assert "records_are_units" in caught.value.hint
    assert not (tmp_path / "run").exists()
    config = make_config(data__manifest=str(path), train__rounds=1, privacy__records_are_units=True)
    assert simulate(config, tmp_path / "run", observer=Silent())["status"] == "finished"


class Killer(Watch):
    """Kills a worker in the middle of round 2."""

    def node_finished(self, round: int, name: str, problem: str | None) -> None:
        first = (round, name, problem) not in self.told and round == 2
        super().node_finished(round, name, problem)
        if first and len([line for line in self.told if line[0] == 2]) == 1:
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)


def test_a_run_survives_killed_workers_and_counts_what_they_had_reserved(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    watch = Killer()
    config = make_config(federation__together=1)  # so that some are still at work
    summary = simulate(config, tmp_path / "run", observer=watch)
    assert summary["status"] == "finished"
    failed = [len(record.failures) for record in watch.records]
    assert failed[0] == failed[2] == 0
    events = RunFolder.open(tmp_path / "run").events()
    assert len(events) == 9
    assert [event.status for event in events].count("reserved") == failed[1] >= 1
    assert summary["privacy"]["steps"] == 6


def test_a_server_that_knows_no_records_gives_the_same_model(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(privacy__declared_records=30)
    simulate(config, tmp_path / "run", observer=Silent())
    store = tmp_path / "store"
    prepare(config.data, seed=config.seed).write(store)
    with LoopbackGrid(
        partial(make_client_app, config, str(store)), [{"partition-id": i} for i in range(3)]
    ) as grid:
        server = make_server_app(config)
        context = Context(1, 0, {}, RecordDict(), {})
        with pytest.raises(ConfigError, match="FEDFUSE_STORE"):
            server(grid, context)
        monkeypatch.setenv("FEDFUSE_STORE", str(store))
        monkeypatch.setenv("FEDFUSE_OUT", str(tmp_path / "served"))
        server(grid, context)
    served = RunFolder.open(tmp_path / "served")
    summary = served.summary()
    assert summary is not None
    assert summary["status"] == "finished"
    expected, _ = RunFolder.open(tmp_path / "run").model()
    for name, value in served.model()[0].items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6)
    undeclared = make_config(privacy__declared_records=0)
    with pytest.raises(ConfigError, match="nobody may count"):
        serve(grid, undeclared)


def test_what_is_broken_off_before_a_node_told_its_name_counts_as_that_nodes(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real server learns names from answers; the books must not know a node under two."""
    config = make_config(privacy__declared_records=30, privacy__noise_seed="")
    store, run = tmp_path / "store", tmp_path / "run"
    prepare(config.data, seed=config.seed).write(store)
    monkeypatch.setenv("FEDFUSE_STORE", str(store))
    monkeypatch.setenv("FEDFUSE_OUT", str(run))

    def broken(*words: object, **more: object) -> None:
        raise RuntimeError("the power went off at clinic-a")

    with LoopbackGrid(
        partial(make_client_app, config, str(store)), [{"partition-id": i} for i in range(3)]
    ) as grid:
        with monkeypatch.context() as patch:
            patch.setattr("fedfuse.federation.rounds.replies", broken)
            with pytest.raises(RuntimeError, match="the power"):
                serve(grid, config)
        events = RunFolder.open(run).events()
        assert sorted(event.node for event in events) == ["node 1", "node 2", "node 3"]
        serve(grid, config)
    summary = RunFolder.open(run).summary()
    assert summary is not None
    assert summary["engine"] == "superlink"
    names = ["site-a", "site-b", "site-c"]
    assert sorted(summary["privacy"]["epsilon_by_node"]) == names
    for name in names:
        states = [e.status for e in RunFolder.open(run).events() if e.node == name]
        assert (states.count("reserved"), states.count("spent")) == (1, 3)
    assert summary["privacy"]["steps"] == 4 * 2
    told = (run / "progress.jsonl").read_text()
    assert [line["status"] for line in map(json.loads, told.splitlines()) if "status" in line] == [
        "failed",
        "finished",
    ]
    assert "clinic-a" not in told  # of errors that are not ours, only the class


def test_a_run_that_fails_says_why_and_keeps_what_is_done(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(federation__min_nodes=4)
    with pytest.raises(FederationError, match="3 nodes are connected, but 4 are needed"):
        simulate(config, tmp_path / "run", observer=Silent())
    summary = RunFolder.open(tmp_path / "run").summary()
    assert summary is not None
    assert summary["status"] == "failed"
    assert "4 are needed" in summary["problem"]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_leaves_a_readable_folder_and_no_process(
    make_config: MakeConfig, tmp_path: Path, number: signal.Signals
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(make_config(train__rounds=2000, privacy__noise_multiplier=20.0).to_toml())
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            from pathlib import Path
            from fedfuse.config import RunConfig
            from fedfuse.federation.observer import Silent
            from fedfuse.federation.simulate import simulate

            class Watch(Silent):
                def round_finished(self, record):
                    print(record.round, flush=True)

            if __name__ == "__main__":
                config = RunConfig.from_toml(Path({str(config)!r}))
                simulate(config, Path({str(tmp_path / "run")!r}), observer=Watch())
            """
        )
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stdout is not None
        try:
            started = process.stdout.readline().strip()
            # As a terminal does it: to the whole group.
            os.killpg(process.pid, number)
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert started == "1", stderr
    assert process.returncode != 0
    assert "KeyboardInterrupt" in stderr
    assert "leaked" not in stderr
    folder = RunFolder.open(tmp_path / "run")
    summary = folder.summary()
    assert summary is not None
    assert summary["status"] == "interrupted"
    assert len(folder.metrics()) == summary["rounds_done"] >= 1
    assert open_model(folder)
    assert not list(tmp_path.glob("fedfuse-*"))
    end = time.monotonic() + 10
    while (left := _group(process.pid)) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []


def _group(leader: int) -> list[int]:
    """The processes of a group that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[2]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore")
def test_loopback_and_ray_give_the_same_model(make_config: MakeConfig, tmp_path: Path) -> None:
    one = simulate(make_config(), tmp_path / "one", observer=Silent())
    watch = Watch()
    other = simulate(make_config(federation__engine="ray"), tmp_path / "other", observer=watch)
    assert one["privacy"] == other["privacy"]
    assert len(watch.records) == 3
    events = RunFolder.open(tmp_path / "one").events()
    key = lambda event: (event.round, event.node)  # noqa: E731
    assert sorted(events, key=key) == sorted(RunFolder.open(tmp_path / "other").events(), key=key)
    expected, _ = RunFolder.open(tmp_path / "one").model()
    for name, value in RunFolder.open(tmp_path / "other").model()[0].items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("declared", "hopeless"), [(1, True), (100_000, False)])
def test_a_run_in_which_noise_drowns_the_signal_says_so(
    make_config: MakeConfig, tmp_path: Path, declared: int, hopeless: bool
) -> None:
    config = make_config(privacy__declared_records=declared, train__rounds=1)
    summary = simulate(config, tmp_path / "run", observer=Silent())
    said = [note for note in summary["notes"] if "the noise of the run is" in note]
    assert bool(said) == hopeless
