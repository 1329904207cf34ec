"""A lock says that its holder is at work, and asking whether it is held keeps nobody out."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedfuse.federation.locks import hold, is_held

_HOLDS = """
import sys, time
from pathlib import Path
from fedfuse.federation.locks import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_goes_with_the_process_that_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    words = [sys.executable, "-c", _HOLDS, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert is_held(path)
        with pytest.raises(BlockingIOError):
            hold(path, patience_s=0.05)
        process.kill()
    assert not is_held(path)
    os.close(hold(path))


def test_those_who_ask_keep_nobody_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            is_held(path)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    os.close(hold(path))
    for thread in asking:
        thread.start()
    try:
        for _ in range(300):
            os.close(hold(path, patience_s=20))
    finally:
        over.set()
        for thread in asking:
            thread.join()
