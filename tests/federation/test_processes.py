"""Processes of others: started without what is ours, ended with all that they started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedfuse.errors import FederationError
from fedfuse.federation.processes import (
    Follower,
    Process,
    answers,
    environment,
    free_port,
    program,
    wait_until,
)
from tests.federation.deployment import running


def test_settings_of_ours_and_telemetry_do_not_reach_flower(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDFUSE_KEY", "/secret/key.pem")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    found = environment(tmp_path, {"MORE": "1"})
    assert "FEDFUSE_KEY" not in found
    assert (found["FLWR_TELEMETRY_ENABLED"], found["MORE"]) == ("0", "1")
    assert found["FLWR_HOME"] == str(tmp_path)
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert "FEDFUSE_STORE" in environment(tmp_path, {"FEDFUSE_STORE": "here"})


def test_a_program_is_of_this_installation_or_none() -> None:
    assert program("flower-supernode").parent == Path(sys.executable).parent
    with pytest.raises(FederationError, match="not installed beside this Python"):
        program("ls")


def test_a_process_ends_with_all_that_it_started_also_what_ignores_the_first_signal(
    tmp_path: Path,
) -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn!r}])\n"
        "print(child.pid, flush=True)\nchild.wait()"
    )
    log = tmp_path / "log"
    lines = Follower(log)
    found: list[str] = []
    with Process(
        [sys.executable, "-c", code], environment=os.environ, folder=tmp_path, log=log
    ) as process:
        wait_until(lambda: bool(found.extend(lines.lines()) or found), 20, "no child", process)
        child = int(found[0])
        assert process.ended is None
        time.sleep(0.3)  # the child has its handler
        process.stop(0.2)
    wait_until(lambda: not running(child), 10, "the child lives on")
    assert process.ended is not None
    assert process.stop() == process.ended


def test_a_process_ends_when_the_one_that_started_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from fedfuse.federation.processes import Process\n"
        "words = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "one = Process(words, environment=os.environ, folder=Path.cwd())\n"
        "print(one.pid, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        words = Path(f"/proc/{child}/cmdline")
        wait_until(lambda: b"tether" not in words.read_bytes(), 20, "it has not become it")
        assert running(child)
        parent.kill()
    wait_until(lambda: not running(child), 10, "the child lives on")


def test_waiting_ends_when_the_process_does(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "raise SystemExit(7)"]
    process = Process(words, environment=os.environ, folder=tmp_path, log=tmp_path / "log")
    with pytest.raises(FederationError, match="ended with code 7: it does not answer"):
        wait_until(lambda: False, 20, "it does not answer", process)
    with pytest.raises(FederationError, match=r"nothing came within 0\.1 s"):
        wait_until(lambda: False, 0.1, "nothing came")
    with pytest.raises(FederationError, match="cannot be started"):
        Process(["/nowhere/at-all"], environment={}, folder=tmp_path)


def test_a_port_answers_only_while_somebody_listens() -> None:
    port = free_port()
    assert not answers("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        assert answers("127.0.0.1", port)


def test_lines_of_a_file_come_once_and_whole(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("old\n")
    lines, all_lines = Follower(log), Follower(log, place=0)
    with log.open("a") as file:
        file.write("new\nhal")
    assert list(lines.lines()) == ["new"]
    with log.open("a") as file:
        file.write("f\n")
    assert list(lines.lines()) == ["half"]
    assert list(all_lines.lines()) == ["old", "new", "half"]
