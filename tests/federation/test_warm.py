"""Workers are forked from a copy of the process that loaded everything, where that is safe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from fedfuse.errors import FederationError
from fedfuse.federation.processes import wait_until
from tests.federation.deployment import running

_HEAD = """
import os, sys, threading, time
from fedfuse.federation.warm import context, copy_of_this

LOADED = []  # what this process has loaded by the time it is copied

def look(pipe):
    pipe.send((os.getpid(), os.getppid(), sys.modules["loaded"].LOADED))
"""
_COPIED = f"""{_HEAD}
sys.modules["loaded"] = sys.modules["__main__"]
LOADED.append("everything")
assert copy_of_this()
assert copy_of_this()  # there is one: nothing happens
LOADED.append("afterwards")
here, there = context().Pipe()
worker = context().Process(target=look, args=(there,))
worker.start()
there.close()
pid, parent, loaded = here.recv()
worker.join(30)
assert worker.exitcode == 0
assert loaded == ["everything"], loaded
print(parent, flush=True)
time.sleep(600)
"""
_THREADED = f"""{_HEAD}
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
assert not copy_of_this()
"""


def run(code: str, folder: Path) -> subprocess.Popen[str]:
    path = folder / "program.py"
    path.write_text(f"if __name__ == '__main__':\n{_indented(code)}", encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _indented(code: str) -> str:
    return "".join(f"    {line}\n" for line in code.splitlines())


def test_a_worker_has_what_was_loaded_and_the_copy_ends_with_its_parent(tmp_path: Path) -> None:
    with run(_COPIED, tmp_path) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        copy = int(line or 0)
        assert Path(f"/proc/{copy}").exists()
        process.send_signal(signal.SIGKILL)  # nothing is told to anybody
        wait_until(lambda: not running(copy), 30, "the copy is left over")


def test_a_process_with_threads_is_not_copied(tmp_path: Path) -> None:
    with run(_THREADED, tmp_path) as process:
        assert process.wait(60) == 0, process.stderr


def test_a_temporary_folder_with_too_long_a_name_is_told(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "fedfuse", "simulate", "--out", tmp_path / "run"],
        env=os.environ | {"TMPDIR": str(long)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == FederationError.exit_code
    assert done.stderr.splitlines()[-2:] == [
        f"error: {long}: the name of the temporary folder is too long for the sockets of workers",
        "hint: set TMPDIR to a folder with a shorter name, such as /tmp",
    ]
