"""A vault that is killed, and one whose app bundle is hostile: data, keys and budget hold."""

from __future__ import annotations

import dataclasses
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedfuse.config import RunConfig
from fedfuse.errors import FederationError, WireError
from fedfuse.federation.door import is_guarded
from fedfuse.federation.forward import forwarded
from fedfuse.federation.framing import Letter, send
from fedfuse.federation.processes import Process, environment, wait_until
from fedfuse.federation.wire import TrainRequest
from fedfuse.privacy.ledger import verify
from tests.federation.clinic import Clinic

MakeConfig = Callable[..., RunConfig]
NOBODY = "nobody"
_START = """
import os, sys
if len(sys.argv) > 5:  # the vault's group lets its clients' group enter the socket's folder
    os.setgid(int(sys.argv.pop()))
from fedfuse.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


@contextmanager
def running(clinic: Clinic, door: Path, *group: int) -> Iterator[Process]:
    """A vault in a process of its own, as `fedfuse node start` runs it."""
    words = (sys.executable, "-c", _START, "node", "start", clinic.folder, "--only=vault")
    with Process(
        [*words, *map(str, group)],
        environment=environment(clinic.folder / "flower"),
        folder=clinic.folder,
        log=clinic.folder / "out.log",
    ) as process:
        wait_until(lambda: is_guarded(door.parent) and door.exists(), 120, "no vault", process)
        yield process


def letter(clinic: Clinic, request: TrainRequest) -> Letter:
    return Letter(kind="train", record=request.to_record(), settings=clinic.config.to_flat())


def said(door: Path, sent: Letter) -> str:
    told = forwarded(door, sent, tries_s=30).record.config_records["config"]
    return f"{told['status']}: {told['problem']}"


def much(clinic: Clinic, steps: int, **changes: Any) -> TrainRequest:
    """A request for work that takes a while and costs little."""
    honest = clinic.request()
    assert honest.job.mechanism is not None
    what = dataclasses.replace(honest.job.mechanism, steps=steps, noise_multiplier=500.0)
    job = dataclasses.replace(honest.job, mechanism=what, steps=steps)
    return clinic.request(job=job, **changes)


@pytest.mark.slow
def test_a_vault_that_is_killed_has_spent_what_it_reserved_and_nothing_else(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    clinic = Clinic.open(tmp_path / "clinic", make_config(privacy__declared_records=30))
    door = clinic.folder / "door" / "vault.sock"

    def holds() -> bool:
        return verify(clinic.folder / "ledger", anchor=clinic.folder / "anchor").holds

    with running(clinic, door) as vault:  # before it was asked
        os.kill(vault.pid, signal.SIGKILL)
    assert holds()
    assert clinic.ledger().datasets() == ()
    with pytest.raises(FederationError, match="does not answer"):
        forwarded(door, letter(clinic, clinic.request()), tries_s=0.1)
    asked = letter(clinic, much(clinic, 30_000))
    with running(clinic, door) as vault:  # while it trains
        lost: list[Exception] = []

        def ask() -> None:
            try:
                forwarded(door, asked)
            except WireError as error:
                lost.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: bool(clinic.ledger().datasets()), 240, "nothing was reserved", vault)
        os.kill(vault.pid, signal.SIGKILL)
        asking.join(30)
    assert "broke off" in str(lost[0])
    assert holds()
    account = clinic.ledger().accounts()[0]
    assert (account.rounds, account.steps, account.open) == (1, 30_000, 1)
    with running(clinic, door) as vault:
        assert "was answered before" in said(door, asked)  # it comes a second time: charged once
        assert said(door, letter(clinic, clinic.request(round=2))) == "ok: "
        stale = letter(clinic, clinic.request(round=1))
        assert "round 1 is over" in said(door, stale)
        slow = letter(clinic, much(clinic, 1_000, round=3))
        answers: list[str] = []
        asking = threading.Thread(target=lambda: answers.append(said(door, slow)))
        entries = len(list(clinic.ledger().entries()))
        asking.start()
        wait_until(lambda: len(list(clinic.ledger().entries())) > entries, 240, "no entry", vault)
        waits = clinic.request(round=3, deadline=time.time() + 0.1)  # its round ends in the queue
        assert "after its deadline" in said(door, letter(clinic, waits))
        asking.join(240)
        assert answers == ["ok: "]
        os.kill(vault.pid, signal.SIGKILL)  # after it answered
    assert holds()
    after = clinic.ledger().accounts()[0]
    assert (after.rounds, after.steps, after.open) == (3, 31_002, 1)


def raw(sent: Letter) -> str:
    """The bytes of a letter, in hexadecimal digits."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        found = bytearray()

        def read() -> None:
            while piece := theirs.recv(1 << 16):
                found.extend(piece)

        reading = threading.Thread(target=read)
        reading.start()
        send(ours, sent, seconds=10)
        ours.close()
        reading.join(10)
    return found.hex()


# What a bundle's process can do: it has the vault's socket, and every message that its server sent.
HOSTILE = r"""
import fcntl, json, os, select, socket, struct, sys, time
plan = json.load(sys.stdin)
os.setgroups([]); os.setgid(plan["group"]); os.setuid(plan["user"])
denied, done = [], {}

def attempt(name, action):
    try:
        action()
        done[name] = "done"
    except OSError as error:
        denied.append(name)

for path in plan["paths"]:
    attempt("read " + path, lambda: open(path, "rb").read())
    attempt("write " + path, lambda: open(path, "ab").close())
    attempt("list " + path, lambda: os.listdir(path))
door = plan["door"]
attempt("remove the socket", lambda: os.unlink(door))
attempt("another socket", lambda: socket.socket(socket.AF_UNIX).bind(door + "2"))
attempt("take the lock", lambda: fcntl.flock(open(os.path.dirname(door) + "/vault.lock"), 2))
attempt("read the log", lambda: open(os.path.dirname(door) + "/vault.log").read())
attempt("read the status", lambda: open(os.path.dirname(door) + "/status.json").read())
attempt("kill the vault", lambda: os.kill(plan["vault"], 9))
attempt("look into its memory", lambda: open("/proc/%d/mem" % plan["vault"], "rb").read(1))
attempt("look at its environment", lambda: open("/proc/%d/environ" % plan["vault"], "rb").read())

START = struct.Struct(">8sIQ")

def connect():
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(20)
    line.connect(door)
    return line

def exactly(line, size):
    data = b""
    while len(data) < size:
        piece = line.recv(size - len(data))
        if not piece:
            raise OSError("closed")
        data += piece
    return data

def answer(data):
    for _ in range(50):  # its own flood may have had it sent away
        try:
            with connect() as line:
                line.sendall(bytes.fromhex(data))
                _, head, _ = START.unpack(exactly(line, START.size))
                config = json.loads(exactly(line, head))["records"]["config"][1]
                return config["status"] + ": " + config["problem"]
        except OSError:
            time.sleep(0.1)
    return "no answer"

flood = []
for number in range(300):
    try:
        line = connect()
        line.sendall((b"", b"garbage" * 100, START.pack(b"fedfuse\1", 9, 1 << 62),
                      START.pack(b"fedfuse\1", 1 << 20, 0) + b"[" * 999)[number % 4])
        flood.append(line)
    except OSError:
        pass
said = {name: answer(data) for name, data in plan["letters"]}
print(json.dumps({"denied": denied, "done": done, "said": said}))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="takes root, to be another user")
@pytest.mark.slow
def test_a_hostile_bundle_of_another_user_reads_nothing_and_spends_no_more_than_is_allowed(
    make_config: MakeConfig,
) -> None:
    nobody = pwd.getpwnam(NOBODY)
    base = Path(tempfile.mkdtemp())  # where another user can come by, as in /run
    base.chmod(0o711)
    try:
        config = make_config(privacy__declared_records=30)
        clinic = Clinic.open(base / "clinic", config)
        clinic.folder.chmod(0o700)
        door = base / "door" / "vault.sock"
        with (clinic.folder / "node.toml").open("a") as file:
            file.write(f'\n[vault]\nsocket = "{door}"\nclients = ["{NOBODY}", "root"]\n')
        honest = clinic.request()
        cheap = dataclasses.replace(honest, job=dataclasses.replace(honest.job, mechanism=None))
        other = letter(clinic, clinic.request())
        plain = dict(other.settings) | {"privacy.unit": "none"}
        letters = {
            "its server's": letter(clinic, honest),
            "again": letter(clinic, honest),
            "without a mechanism": letter(clinic, cheap),
            "for other settings": dataclasses.replace(other, settings=plain),
            "unsigned": letter(clinic, clinic.request(sign=False)),
            "more rounds": letter(clinic, dataclasses.replace(honest, rounds=1)),
            "metrics": dataclasses.replace(other, kind="evaluate"),
            "a fedfuse of its own": dataclasses.replace(other, package="/tmp/evil/fedfuse"),
        }
        with running(clinic, door, nobody.pw_gid) as vault:
            plan = {
                "user": nobody.pw_uid,
                "group": nobody.pw_gid,
                "paths": [str(clinic.folder), *map(str, sorted(clinic.folder.rglob("*")))],
                "door": str(door),
                "vault": vault.pid,
                "letters": [(name, raw(sent)) for name, sent in letters.items()],
            }
            done = subprocess.run(
                [sys.executable, "-c", HOSTILE],
                input=json.dumps(plan),
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            told = json.loads(done.stdout)
            assert told["done"] == {}
            assert len(told["denied"]) == 3 * len(plan["paths"]) + 8
            answers = told["said"]
            assert answers.pop("its server's") == "ok: "
            for name, words in {
                "again": "was answered before",
                "without a mechanism": "did not sign it",
                "for other settings": "another configuration",
                "unsigned": "not one that this node answers",
                "more rounds": "did not sign it",
                "metrics": "gives no metrics",
                "a fedfuse of its own": "fedfuse of its own",
            }.items():
                answer = answers.pop(name)
                assert answer.startswith("refused: "), (name, answer)
                assert words in answer, (name, answer)
                assert str(base) not in answer
            assert answers == {}
            assert vault.ended is None
            assert said(door, letter(clinic, clinic.request(round=2))) == "ok: "
        account = clinic.ledger().accounts()[0]
        assert (account.rounds, account.steps, account.open) == (2, 4, 0)
        assert verify(clinic.folder / "ledger", anchor=clinic.folder / "anchor").holds
    finally:
        shutil.rmtree(base)
