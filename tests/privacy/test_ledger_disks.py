"""Disks that are really full or really read-only, and what is said of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedfuse.cli import main
from fedfuse.errors import LedgerError
from fedfuse.privacy.ledger import Ledger, verify
from fedfuse.privacy.transfer import exported
from tests.disks import fill_up, mount, small_disk
from tests.privacy.ledgers import fill, mechanism, spend

ROOT = Path(__file__).resolve().parents[2]
Say = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    with small_disk(tmp_path / "small") as folder:
        yield folder


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Say:
    """Exit code and messages of a command."""

    def run(*words: object) -> tuple[int, list[str]]:
        code = main([str(word) for word in words])
        return code, capfd.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize("signed", [False, True])
def test_a_full_disk_enters_nothing_and_forgets_nothing(
    small: Path, key: Path, signed: bool
) -> None:
    """At each place in the last page where a line may end."""
    path, its_key = small / "node.ledger", key if signed else None
    ledger = Ledger.create(path, node="clinic-a", key=its_key)
    filler = fill_up(small, but=2)
    done, failed = 0, None
    while failed is None:
        before = path.read_bytes()
        try:
            spend(ledger, f"r{done}" + "x" * (17 * done % 200), what=mechanism(1))
        except LedgerError as error:
            failed = error
        else:
            done += 1
    assert failed.what == "cannot write, so nothing was entered: No space left on device"
    assert failed.where == str(path)
    assert failed.hint == "free some space on its disk, and try again"
    assert 3 < done < 40
    assert path.read_bytes() == before
    for book in (ledger, Ledger.open(path, key=its_key)):
        assert book.history("scans") == (mechanism(done),)
    filler.unlink()
    spend(ledger, "more", what=mechanism(1))
    assert Ledger.open(path).history("scans") == (mechanism(done + 1),)
    assert verify(path).holds


def test_a_full_disk_under_the_anchor_stops_work_and_forgets_nothing(
    small: Path, path: Path
) -> None:
    anchor = small / "anchor"
    ledger = Ledger.create(path, node="clinic-a", anchor=anchor)
    filler = fill_up(small)
    with pytest.raises(LedgerError) as error:
        spend(ledger, "r1")
    assert error.value.what == (
        "the entry counts as spent, but the anchor cannot be written: No space left on device"
    )
    assert error.value.hint == (
        "free some space on its disk, and try again: without its anchor no work may start"
    )
    assert set(small.iterdir()) == {anchor, filler}
    assert ledger.history("scans") == (mechanism(4),)
    filler.unlink()
    spend(ledger, "r2")
    assert Ledger.open(path, anchor=anchor).history("scans") == (mechanism(8),)


def test_commands_say_that_the_disk_is_full(small: Path, tmp_path: Path, say: Say) -> None:
    """What, where and what to do; exit code 6; and what was there is as it was."""
    path, other = small / "node.ledger", tmp_path / "other"
    Ledger.create(path, node="clinic-a")
    fill(Ledger.create(other, node="clinic-b"), 30)
    (tmp_path / "export").write_text(exported(other), encoding="utf-8")
    fill_up(small)
    before = path.read_bytes()
    full, hint = "No space left on device", "hint: free some space on its disk, and try again"
    new, key, out = small / "new", small / "new.pem", small / "out"
    assert say("ledger", "init", new, "--node", "a") == (
        6,
        [f"error: {new}: cannot create it: {full}", hint],
    )
    assert say("ledger", "init", new, "--node", "a", "--key", key) == (
        6,
        [f"error: {key}: the key cannot be written: {full}", hint],
    )
    assert say("ledger", "export", other, "--out", out) == (
        6,
        [f"error: {out}: cannot write it: {full}", hint],
    )
    assert say("ledger", "import", path, tmp_path / "export") == (
        6,
        [f"error: {path}: cannot write, so nothing was entered: {full}", hint],
    )
    for words in (
        ("anchor", path, small / "anchor"),
        ("init", tmp_path / "new", "--node", "a", "--anchor", small / "anchor"),
    ):
        assert say("ledger", *words) == (
            6,
            [f"error: {small}/anchor: the anchor cannot be written: {full}", hint],
        )
    assert not (tmp_path / "new").exists()
    assert sorted(file.name for file in small.iterdir()) == ["filler", "node.ledger"]
    assert path.read_bytes() == before
    assert say("ledger", "show", path) == (0, [])


def test_a_disk_that_is_mounted_to_be_read_is_read(small: Path, tmp_path: Path, say: Say) -> None:
    path, other = small / "node.ledger", tmp_path / "other"
    ledger = Ledger.create(path, node="clinic-a")
    fill(ledger)
    fill(Ledger.create(other, node="clinic-b"), 2, start=9)
    (tmp_path / "export").write_text(exported(other), encoding="utf-8")
    assert mount("-o", "remount,ro", small)
    hint = "hint: mount its disk so that it can be written"
    assert ledger.history("scans") == (mechanism(12),)
    assert say("ledger", "show", path) == (0, [])
    assert say("ledger", "verify", path)[0] == 0
    assert say("ledger", "import", path, tmp_path / "export") == (
        6,
        [f"error: {path}: cannot use it: Read-only file system", hint],
    )
    assert say("ledger", "init", small / "new", "--node", "a") == (
        6,
        [f"error: {small}/new: cannot create it: Read-only file system", hint],
    )
    with pytest.raises(LedgerError, match="Read-only file system"):
        spend(ledger, "r9")
    assert mount("-o", "remount,rw", small)
    spend(ledger, "r9")
    assert Ledger.open(path).history("scans") == (mechanism(16),)


COMMANDS_WITHOUT_RIGHTS = """
import os, sys
from fedfuse.cli import main
from fedfuse.privacy import accounting, ledger, signing, transfer
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_commands_say_that_they_may_not_write(tmp_path: Path) -> None:
    """Of a user without rights, in a folder of root's; relative, for tmp_path is root's too."""
    (tmp_path / "shut").mkdir(mode=0o755)
    path = tmp_path / "shut" / "node.ledger"
    Ledger.create(path, node="clinic-a")
    fill(Ledger.create(tmp_path / "other", node="clinic-b"))
    (tmp_path / "export").write_text(exported(tmp_path / "other"), encoding="utf-8")
    for folder in (tmp_path, tmp_path / "export"):
        folder.chmod(0o755)
    hint = "hint: let the user that runs this read and write it"
    for mode in (0o600, 0o644):
        path.chmod(mode)
        for words, message in (
            (("import", "shut/node.ledger", "export"), "shut/node.ledger: cannot use it"),
            (("init", "shut/new", "--node", "a"), "shut/new: cannot create it"),
        ):
            done = subprocess.run(
                [sys.executable, "-c", COMMANDS_WITHOUT_RIGHTS, "ledger", *words],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            assert done.stderr.splitlines() == [f"error: {message}: Permission denied", hint]
            assert done.returncode == 6
    assert list(path.parent.iterdir()) == [path]
    assert Ledger.open(path).history("scans") == ()
