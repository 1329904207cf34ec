"""How `fedfuse simulate` starts: what is done beside what, and how that is told and ended."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedfuse.config import RunConfig
from fedfuse.data.demo import make_demo
from fedfuse.errors import PrivacyError
from fedfuse.federation.policy import Policy
from fedfuse.federation.processes import wait_until
from fedfuse.federation.settle import settle
from fedfuse.privacy import accounting
from tests.federation.requests import a_request

_LOADED = """
import contextlib, sys
import fedfuse.federation.store as store
from fedfuse.cli import main
from fedfuse.federation.warm import one_thread

@contextlib.contextmanager
def storing(*given, **named):
    print([name for name in ("torch", "flwr", "scipy") if name in sys.modules], one_thread())
    raise SystemExit
    yield

store.storing = storing
main(["simulate"])
"""


def begun(folder: Path, *words: object) -> subprocess.Popen[str]:
    """A simulation of a small data set in `folder`, with its temporary files there too."""
    manifest = make_demo(folder / "data", records=600, clients=3)
    temporary = folder / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "fedfuse", "simulate", "--data", manifest, *words]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=folder,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def left(process: subprocess.Popen[str], folder: Path) -> list[str]:
    """What is left of a simulation: temporary folders with data, processes of its session."""
    found = [path.name for path in (folder / "tmp").glob("fedfuse-*")]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if words[3] == str(process.pid) and words[0] != "Z":
            found.append(stat.parent.name)
    return found


def test_the_data_is_begun_before_anything_large_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", _LOADED], capture_output=True, text=True)
    assert done.stdout == "[] True\n", done.stderr


def test_a_promise_that_cannot_be_kept_is_told_once_and_leaves_nothing(tmp_path: Path) -> None:
    words = ("--set", "privacy.noise_multiplier=0.5", "--epsilon", "0.1", "--out", "run")
    with begun(tmp_path, *words) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == PrivacyError.exit_code, err
    assert out == ""
    assert err.count("does not keep epsilon = 0.1") == len(err.splitlines()) - 1 == 1, err
    assert not (tmp_path / "run").exists()
    wait_until(lambda: not left(process, tmp_path), 30, f"left: {left(process, tmp_path)}")


def test_it_can_be_interrupted_while_it_loads(tmp_path: Path) -> None:
    with begun(tmp_path) as process:
        wait_until(lambda: bool(left(process, tmp_path)[1:]), 60, "it has not begun")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        try:
            _, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, err) == (
        130,
        "interrupted before the first round; nothing was saved\n",
    )
    wait_until(lambda: not left(process, tmp_path), 30, f"left: {left(process, tmp_path)}")


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy.unit": "record"},
        {"privacy.unit": "record", "privacy.noise_multiplier": 3.0, "privacy.adaptive_clip": True},
        {"privacy.unit": "subject"},
        {"privacy.unit": "node", "privacy.noise_by": "server"},
    ],
)
def test_what_nodes_ask_is_known_before_the_data_is(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig().with_values({"train.rounds": 3, "train.local_steps": 2, **changes})
    first = settle(config, mean_records=1.0, mean_subjects=1.0).mechanism

    def computed(*_: object) -> bool:
        raise AssertionError("the accountant was asked anew")

    monkeypatch.setattr(accounting, "_within", computed)
    mechanism = settle(config, mean_records=951.0, mean_subjects=87.0).mechanism
    assert first is not None
    assert mechanism is not None
    assert (mechanism.noise_multiplier, mechanism.steps) == (first.noise_multiplier, first.steps)
    for done in range(3):
        request = a_request(round=done + 1, rounds=3, deadline=math.inf)
        past = [replace(mechanism, steps=mechanism.steps * done)] if done else []
        Policy.of(config.privacy).afford(request, mechanism)(past)
    with pytest.raises(AssertionError):
        Policy.of(config.privacy).afford(a_request(rounds=4, deadline=math.inf), mechanism)([])
