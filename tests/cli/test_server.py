"""`fedfuse server`, as far as it goes without Flower's processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedfuse.cli import main
from fedfuse.data.prepare import open_split
from tests.federation.conftest import write_manifest


@pytest.fixture
def server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["server", "init", str(tmp_path / "srv"), "--host", "fl.example.org"]) == 0
    told = capsys.readouterr()
    assert len(told.out.strip()) == 64
    assert "server.pub" in told.err
    return tmp_path / "srv"


def test_a_server_keeps_test_records_and_no_others(
    server: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path)
    for _ in range(2):  # the second time in the place of the first
        assert main(["server", "prepare", str(server), str(manifest)]) == 0
        assert capsys.readouterr().out == "30 test records of left, right\n"
    assert len(open_split(server / "store", "test")) == 30
    assert {path.name for path in (server / "store").iterdir()} == {"test", "reading.json"}
    head, *rows = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join([head, *(row for row in rows if ",train," in row)]))
    assert main(["server", "prepare", str(server), str(manifest)]) == 4
    assert "no good test record" in capsys.readouterr().err
    assert len(open_split(server / "store", "test")) == 30


def test_a_certificate_is_renewed_for_the_same_hosts(
    server: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (server / "tls/server.pem").read_bytes()
    assert main(["server", "renew", str(server)]) == 0
    assert "for fl.example.org, localhost" in capsys.readouterr().out
    assert (server / "tls/server.pem").read_bytes() != before


def test_a_server_that_does_not_run_says_so(
    server: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["server", "status", str(server)]) == 1
    told = capsys.readouterr().out
    assert "fl.example.org:9092, does not answer" in told
    assert "in 397 days" in told
    assert main(["server", "status", str(server), "--json"]) == 1
    tree = json.loads(capsys.readouterr().out)
    assert (tree["answers"], tree["pid"], tree["runs"], tree["turned_away"]) == (
        False,
        None,
        [],
        {},
    )
    assert main(["server", "metrics", str(server)]) == 0
    assert "\nfedfuse_up 0\n" in capsys.readouterr().out
    assert main(["server", "stop", str(server)]) == 0
    assert "was not running" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["start"], 7, "no test records"),
        (["run"], 7, "the SuperLink does not answer"),
        (["run", "--resume", "nothing"], 8, "no run is here"),
        (["run", "--resume", "nothing", "--set", "seed=1"], 2, "no --set"),
        (["run", "--set", "train.rounds=0"], 3, "rounds"),
        (["register", "key", "--list"], 2, "one thing at a time"),
        (["register", "--remove", "somebody"], 7, "no node 'somebody'"),
        (["stop", "--run", "nothing"], 8, "no run of this server's"),
        (["follow", "nothing"], 8, "no run of this server's"),
        (["init", "--host", "x"], 3, "never overwritten"),
    ],
)
def test_what_cannot_be_done_says_why(
    server: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, told: str
) -> None:
    command, *rest = words
    assert main(["server", command, str(server), *rest]) == code
    assert told in capsys.readouterr().err


def test_a_folder_that_is_no_server_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["server", "status", str(tmp_path)]) == 3
    assert "fedfuse server init" in capsys.readouterr().err
