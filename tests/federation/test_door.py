"""The vault's door: letters whole or not at all, and no visitor that can hold or break it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.errors import ConfigError, FederationError, WireError
from fedfuse.federation import door as doors
from fedfuse.federation import forward
from fedfuse.federation.door import Door, is_guarded
from fedfuse.federation.forward import forwarded
from fedfuse.federation.framing import MOST_HEAD, Letter, connect, receive, send
from fedfuse.federation.wire import encode

START = struct.Struct(">8sIQ")
MAGIC = b"fedfuse\1"


def a_letter(**config: Any) -> Letter:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float64(3.5)}
    return Letter(
        kind="train",
        record=RecordDict(
            {
                "arrays": encode(arrays),
                "config": ConfigRecord({"n": 3, "x": 1.0, "words": ["a", "b"]} | config),
                "metrics": MetricRecord({"weight": 1.0}),
            }
        ),
        settings={"train.rounds": 3, "name": "run", "data.skip_bad": False},
    )


def over(data: bytes, most: int = 1 << 20) -> Letter:
    """What the other end makes of `data`."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        threading.Thread(target=lambda: (ours.sendall(data), ours.close()), daemon=True).start()
        return receive(theirs, most_bytes=most, head_s=5, rate=1e6)


def framed(tree: Any, body: bytes = b"") -> bytes:
    head = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return START.pack(MAGIC, len(head), len(body)) + head + body


def test_a_letter_comes_as_it_was_sent() -> None:
    letter = a_letter()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, letter, seconds=5)
        found = receive(theirs, most_bytes=1 << 20, head_s=5, rate=1e6)
    assert found == letter
    assert type(found.record.config_records["config"]["x"]) is float
    assert found.record.array_records["arrays"]["a"].numpy().tolist() == [[0, 1, 2], [3, 4, 5]]


TREE = {"kind": "train", "version": "1", "package": "p", "settings": {}, "records": {}}


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n\r\n",
        START.pack(b"fedfuse\2", 2, 0) + b"{}",
        START.pack(MAGIC, MOST_HEAD + 1, 0),
        START.pack(MAGIC, 2, 1 << 60) + b"{}",
        START.pack(MAGIC, 100, 0) + b"{",
        framed(b"\xff\xfe"),
        framed(b"[" * 100_000),
        framed(b'{"n": ' + b"9" * 10_000 + b"}"),
        framed(b'{"kind": NaN}'),
        framed([]),
        framed(TREE | {"kind": 3}),
        framed(TREE | {"more": 3}),
        framed(TREE | {"settings": {"a": [1]}}),
        framed(TREE | {"records": {"config": ["pickle", {}]}}),
        framed(TREE | {"records": {"config": ["config", {"a": {"b": 1}}]}}),
        framed(TREE | {"records": {"config": ["config", {"a": [1, "b"]}]}}),
        framed(TREE | {"records": {"metrics": ["metrics", {"a": "b"}]}}),
        framed(TREE, b"more"),
        framed(TREE | {"records": {"arrays": ["arrays", [["a", "f", [1], "s", 9]]]}}, b"four"),
        framed(TREE | {"records": {"arrays": ["arrays", [["a", "f", [1], "s", -1]]]}}, b"four"),
        framed(TREE | {"records": {"arrays": ["arrays", [["a", "f", ["1"], "s", 4]]]}}, b"four"),
    ],
)  # fmt: skip
def test_what_is_no_letter_is_refused(data: bytes) -> None:
    with pytest.raises((WireError, ConnectionError)):
        over(data)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_letter_with_bytes_changed_is_read_or_refused_and_nothing_else(
    data: st.DataObject,
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, a_letter(), seconds=5)
        whole = bytearray(theirs.recv(1 << 16))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError, ConnectionError):
        assert isinstance(over(bytes(whole)).record, RecordDict)


def test_bytes_cross_the_door_as_they_are() -> None:
    ours, theirs = socket.socketpair()
    told = {"raw": b"\x00\xff", "parts": [b"", b"x" * 999]}
    with ours, theirs:
        send(ours, a_letter(**told), seconds=5)
        found = receive(theirs, most_bytes=1 << 20, head_s=5, rate=1e6).record.config_records[
            "config"
        ]
    assert {key: found[key] for key in told} == told


@pytest.mark.parametrize("value", ['{"bytes": 7}', '{"bytes": "?"}', '{"hex": "00"}', "{}"])
def test_bytes_that_are_written_otherwise_are_refused(value: str) -> None:
    tree = json.dumps(TREE | {"records": {"config": ["config", {"raw": "here"}]}})
    with pytest.raises(WireError, match="no letter"):
        over(framed(tree.replace('"here"', value).encode()))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    long = tmp_path / ("a folder with a name that is longer than a socket may have " * 2)
    long.mkdir()
    return long / "door" / "vault.sock"


def an_echo(path: Path, **changes: Any) -> Door:
    """A door behind which each letter's config comes back."""
    wanted = {"clients": frozenset({os.getuid()}), "most_bytes": 1 << 20, "patience_s": 5.0}
    door = Door(path, **wanted | changes)

    def answer() -> None:
        for visit in door.visits():
            visit.answer(RecordDict({"config": visit.letter.record.config_records["config"]}))

    threading.Thread(target=answer, daemon=True).start()
    return door


@pytest.fixture
def door(path: Path) -> Iterator[Door]:
    open_door = an_echo(path)
    yield open_door
    open_door.close()


def echoed(path: Path, number: int) -> bool:
    reply = forwarded(path, a_letter(n=number), tries_s=5)
    return reply.record.config_records["config"]["n"] == number


def test_letters_are_answered_one_after_the_other(door: Door, path: Path) -> None:
    assert is_guarded(path.parent)
    assert [echoed(path, number) for number in range(5)] == [True] * 5
    assert (path.parent.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o750, 0o660)


def test_visitors_that_send_nonsense_dawdle_or_leave_hold_nobody_up(door: Door, path: Path) -> None:
    lines = [connect(path, seconds=5) for _ in range(3 * doors._VISITORS)]  # they say nothing
    lines[-1].sendall(START.pack(MAGIC, 100, 0))  # and this one stops in the middle
    for data in (b"x" * 10_000, START.pack(MAGIC, 4, 1 << 40), framed(TREE)[:-3]):
        with connect(path, seconds=5) as line:
            line.sendall(data)
    began = time.monotonic()
    assert echoed(path, 7)
    assert time.monotonic() - began < 4
    for line in lines:
        line.close()
    assert echoed(path, 8)


def test_a_dawdler_is_sent_away_in_time(path: Path) -> None:
    door = an_echo(path, patience_s=0.3)
    with connect(path, seconds=10) as line:
        line.sendall(START.pack(MAGIC, 100, 0))
        assert line.recv(1) == b""
    door.close()
    assert not is_guarded(path.parent)


def test_who_leaves_before_the_turn_is_passed_over(path: Path) -> None:
    door = Door(path, clients=frozenset({os.getuid()}), most_bytes=1 << 20)
    visits = door.visits()
    gone, stays = connect(path, seconds=5), connect(path, seconds=5)
    send(gone, a_letter(n=1), seconds=5)
    time.sleep(0.3)
    send(stays, a_letter(n=2), seconds=5)
    gone.close()
    visit = next(visits)
    assert visit.letter.record.config_records["config"]["n"] == 2
    stays.close()
    assert not visit.answer(RecordDict({"config": ConfigRecord({"long": "x" * 1_000_000})}))
    door.close()
    assert list(visits) == []


def test_another_user_is_not_heard(path: Path) -> None:
    door = an_echo(path, clients=frozenset({os.getuid() + 1}))
    with pytest.raises(WireError, match="broke off"):
        echoed(path, 1)
    door.close()


def test_a_folder_that_others_can_write_or_enter_is_refused(path: Path) -> None:
    path.parent.mkdir()
    for mode in (0o770, 0o751, 0o777):
        path.parent.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 750"):
            an_echo(path)
    path.parent.chmod(0o700)
    an_echo(path).close()


def test_one_vault_at_a_time_and_a_killed_one_leaves_no_obstacle(door: Door, path: Path) -> None:
    with pytest.raises(FederationError, match="another vault is running"):
        an_echo(path)
    assert echoed(path, 1)
    door.close()
    stale = socket.socket(socket.AF_UNIX)
    with doors.nearby(path) as name:
        stale.bind(name)
    stale.close()
    assert path.exists()
    again = an_echo(path)
    assert echoed(path, 2)
    again.close()


def test_an_answer_that_takes_too_long_is_not_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_BEYOND_S", 0.2)
    silent = Door(path, clients=frozenset({os.getuid()}), most_bytes=1 << 20)
    with pytest.raises(WireError, match="before the round was over"):
        forwarded(path, a_letter(deadline=time.time() + 0.1))
    silent.close()


def test_a_request_that_is_too_large_is_told_with_the_setting_that_decides(
    door: Door, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {"a": np.zeros(1 << 20, dtype=np.float32)}
    large = Letter(kind="train", record=RecordDict({"arrays": encode(weights)}))
    with pytest.raises(WireError, match=r"of 4,194,432 bytes: vault\.max_megabytes"):
        forwarded(path, large, tries_s=5)
    assert "at most 1,048,576 are taken" in caplog.text
    assert echoed(path, 1)


@pytest.mark.parametrize(("rate", "taken"), [(1e7, True), (1e9, False)])
def test_a_large_answer_has_more_time_to_be_taken(path: Path, rate: float, taken: bool) -> None:
    weights = encode({"a": np.zeros(2 << 20, dtype=np.float32)})  # 0.9 s, or 0.1
    slow = Door(
        path, clients=frozenset({os.getuid()}), most_bytes=1 << 20, patience_s=0.1, answer_rate=rate
    )
    with connect(path, seconds=5) as line:
        send(line, a_letter(), seconds=5)
        visit = next(slow.visits())
        with ThreadPoolExecutor(1) as other:
            answered = other.submit(visit.answer, RecordDict({"arrays": weights}))
            time.sleep(0.4)
            with contextlib.suppress(OSError):
                receive(line, most_bytes=1 << 30, head_s=5, rate=1e6)
            assert answered.result() is taken
    slow.close()


def test_no_vault_is_told_without_a_path(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="does not answer") as caught:
        forwarded(tmp_path / "secret" / "vault.sock", a_letter(), tries_s=0.1)
    assert "secret" not in str(caught.value)
