"""A run on disk: nothing half written, nothing forgotten, nothing overwritten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedfuse.config import RunConfig
from fedfuse.errors import RunFolderError
from fedfuse.privacy.spec import Event
from fedfuse.runfolder import Checkpoint, RunFolder

CONFIG = RunConfig()
WEIGHTS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(2.5, dtype=np.float32),
    "turned": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
}


def event(node: str, round: int, status: str = "spent") -> Event:
    return Event(
        node=node,
        round=round,
        status=status,
        unit="record",
        sample_rate=0.25,
        noise_multiplier=1.0,
        clip_norm=1.0,
        steps=4,
    )


def checkpoint(round: int) -> Checkpoint:
    return Checkpoint(
        round=round, weights=WEIGHTS, strategy={"m_t/a": np.zeros(3)}, extra={"seconds": 1.5}
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", CONFIG)


def test_what_is_written_is_read(folder: RunFolder) -> None:
    for round in (1, 2):
        folder.begin_round([event("x", round, "reserved")])
        folder.end_round([event("x", round)], {"round": round, "loss": 0.5}, checkpoint(round))
    folder.write_model(WEIGHTS, {"classes": ["up", "down"], "model": {"dim": 3}})
    folder.write_summary({"status": "interrupted"})

    again = RunFolder.open(folder.path)
    assert again.config() == CONFIG
    assert again.metrics() == [{"round": 1, "loss": 0.5}, {"round": 2, "loss": 0.5}]
    assert again.events() == [event("x", 1), event("x", 2)]
    assert again.summary() == {"status": "interrupted"}
    weights, text = again.model()
    assert text == {"classes": ["up", "down"], "model": {"dim": 3}}
    saved = again.checkpoint()
    assert saved is not None
    assert (saved.round, saved.extra) == (2, {"seconds": 1.5})
    assert set(saved.strategy) == {"m_t/a"}
    for found in (weights, saved.weights):
        assert set(found) == set(WEIGHTS)
        for name, value in WEIGHTS.items():
            np.testing.assert_array_equal(found[name], value)
            assert found[name].shape == value.shape
    assert len(list((folder.path / "checkpoint").glob("round-*"))) == 1
    assert not list(folder.path.rglob("*.tmp"))
    assert again.problems == []


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    RunFolder.create(tmp_path / "run", CONFIG)  # empty is fine
    with pytest.raises(RunFolderError, match="not empty"):
        RunFolder.create(tmp_path / "run", CONFIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="not empty"):
        RunFolder.create(tmp_path / "file", CONFIG)
    with pytest.raises(RunFolderError, match="no run is here"):
        RunFolder.open(tmp_path)


def test_only_the_same_unfinished_run_is_resumed(folder: RunFolder, tmp_path: Path) -> None:
    assert RunFolder.create(folder.path, CONFIG, resume=True).path == folder.path
    with pytest.raises(RunFolderError, match="not the configuration given"):
        RunFolder.create(folder.path, RunConfig(seed=1), resume=True)
    with pytest.raises(RunFolderError, match="no run to resume"):
        RunFolder.create(tmp_path / "other", CONFIG, resume=True)
    folder.write_summary({"status": "finished"})
    with pytest.raises(RunFolderError, match="finished") as caught:
        RunFolder.create(folder.path, CONFIG, resume=True)
    assert caught.value.hint


def test_a_round_counts_from_its_beginning(folder: RunFolder) -> None:
    folder.end_round([event("x", 1)], {"round": 1}, checkpoint(1))
    folder.begin_round([event("x", 2, "reserved"), event("y", 2, "reserved")])
    assert folder.events() == [event("x", 1), event("x", 2, "reserved"), event("y", 2, "reserved")]


def test_a_crash_between_the_books_and_the_rest_counts_nothing_twice(folder: RunFolder) -> None:
    folder.begin_round([event("x", 1, "reserved"), event("y", 1, "reserved")])
    reserved = (folder.path / "reserved.json").read_bytes()
    folder.append_events([event("x", 1)])
    (folder.path / "reserved.json").write_bytes(reserved)
    assert folder.events() == [event("x", 1), event("y", 1, "reserved")]


def test_the_same_round_run_twice_counts_twice(folder: RunFolder) -> None:
    folder.append_events([event("x", 1, "reserved")])
    folder.begin_round([event("x", 1, "reserved")])
    assert folder.events() == [event("x", 1, "reserved")] * 2


def test_a_round_that_is_run_again_is_forgotten_only_where_that_is_right(
    folder: RunFolder,
) -> None:
    folder.end_round([event("x", 1)], {"round": 1}, checkpoint(1))
    folder.end_round([event("x", 2)], {"round": 2}, checkpoint(2))
    folder.begin_round([event("x", 3, "reserved")])
    folder.forget_after(1, events=False)
    assert [row["round"] for row in folder.metrics()] == [1]
    assert [e.round for e in folder.events()] == [1, 2, 3]
    assert folder.reserved() == []
    folder.forget_after(1, events=True)
    assert [e.round for e in folder.events()] == [1]


def test_a_last_line_that_was_cut_off_is_left_out_and_mended(folder: RunFolder) -> None:
    folder.end_round([event("x", 1)], {"round": 1}, checkpoint(1))
    for name in ("metrics.jsonl", "events.jsonl"):
        with (folder.path / name).open("a") as file:
            file.write('{"round": 2, "no')
    again = RunFolder.open(folder.path)
    assert again.metrics() == [{"round": 1}]
    assert again.events() == [event("x", 1)]
    assert any("cut off" in problem for problem in again.problems)
    again.end_round([event("x", 2)], {"round": 2}, checkpoint(2))
    fresh = RunFolder.open(folder.path)
    assert fresh.metrics() == [{"round": 1}, {"round": 2}]
    assert fresh.events() == [event("x", 1), event("x", 2)]
    assert fresh.problems == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("events.jsonl", b"nonsense\n"),
        ("events.jsonl", b'{"round": 1}\n'),
        ("metrics.jsonl", b"[]\n"),
        ("summary.json", b"{"),
        ("checkpoint/state.json", b"{}"),
        ("checkpoint/state.json", b'{"round": 1, "arrays": "gone", "extra": {}}'),
        ("model.safetensors", b"short"),
    ],
)
def test_damage_is_named(folder: RunFolder, name: str, content: bytes) -> None:
    folder.end_round([event("x", 1)], {"round": 1}, checkpoint(1))
    folder.write_model(WEIGHTS, {})
    (folder.path / name).write_bytes(content)

    def read() -> None:
        folder.events()
        folder.metrics()
        folder.summary()
        folder.checkpoint()
        folder.model()

    with pytest.raises(RunFolderError, match="cannot be read") as caught:
        read()
    assert caught.value.where == str(folder.path)


def test_a_full_disk_is_an_error_that_leaves_what_was_there(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.write_summary({"status": "interrupted"})

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedfuse.runfolder.os.fsync", full)
    with pytest.raises(RunFolderError, match="No space left") as caught:
        folder.write_summary({"status": "finished"})
    assert "free some space" in caught.value.hint
    monkeypatch.undo()
    assert folder.summary() == {"status": "interrupted"}
    assert not list(folder.path.rglob("*.tmp"))


def test_reading_a_run_needs_no_torch() -> None:
    code = (
        "import sys, fedfuse.runfolder; sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
