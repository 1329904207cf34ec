"""The program as a user runs it, in a process of its own: stopped, gone on with, finished."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedfuse.privacy.spec import Event
from fedfuse.runfolder import RunFolder

pytestmark = pytest.mark.slow

PROGRAM = (sys.executable, "-c", "import sys; from fedfuse.cli import main; sys.exit(main())")
ROUNDS = 4


def fedfuse(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *words], cwd=folder, capture_output=True, text=True, timeout=300
    )


def small_demo(folder: Path) -> None:
    done = fedfuse(folder, "data", "demo", "demo", "--records", "240", "--clients", "2")
    assert done.returncode == 0, done.stderr


def test_a_stopped_run_goes_on_and_its_books_hold_every_round(tmp_path: Path) -> None:
    small_demo(tmp_path)
    words = ("simulate", "--data", "demo/manifest.csv", "--rounds", str(ROUNDS), "--out", "r")
    with subprocess.Popen(
        [*PROGRAM, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("round 1/"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, "".join(said)
    assert said[-1] == "hint: go on with: fedfuse simulate --resume r\n"
    assert "rounds are saved in r" in said[-2]
    assert "Traceback" not in "".join(said)
    before = RunFolder.open(tmp_path / "r")
    assert 1 <= len(before.metrics()) < ROUNDS

    done = fedfuse(tmp_path, "simulate", "--resume", "r", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["status"] == "finished"
    after = RunFolder.open(tmp_path / "r")
    assert [line["round"] for line in after.metrics()] == list(range(1, summary["rounds_done"] + 1))
    kept: list[Event] = [event for event in before.events() if event.status == "spent"]
    assert set(kept) <= set(after.events())
    assert summary["privacy"]["epsilon_server"] <= 8
    for name in ("metrics.png", "privacy.svg"):
        assert (tmp_path / "r" / "plots" / name).is_file()


def test_a_run_without_a_promise_says_so_and_runs_again_from_its_own_config(tmp_path: Path) -> None:
    small_demo(tmp_path)
    words = ("--data", "demo/manifest.csv", "--unit", "none", "--rounds", "1", "--out", "r")
    first = fedfuse(tmp_path, "simulate", *words)
    assert first.returncode == 0, first.stderr
    assert "*** NOT PRIVATE ***" in first.stdout
    assert "the best constant answer" in first.stdout
    assert "epsilon" not in first.stderr
    again = fedfuse(tmp_path, "simulate", "r/config.toml", "--out", "again", "--quiet")
    assert (again.returncode, again.stdout) == (0, "again\n"), again.stderr
    one, two = (RunFolder.open(tmp_path / name).metrics()[0]["metrics"] for name in ("r", "again"))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_a_terminal_gets_the_live_view(tmp_path: Path) -> None:
    small_demo(tmp_path)
    words = ("simulate", "--data", "demo/manifest.csv", "--rounds", "1", "--out", "r")
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [*PROGRAM, *words],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    for text in ("demo: 2 nodes", "1/1", "epsilon"):
        assert text in shown.decode()
