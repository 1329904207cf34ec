"""Nodes and runs whose disk is really full or really read-only: told in a line, nothing counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedfuse.cli import main
from fedfuse.config import RunConfig
from fedfuse.errors import RunFolderError
from fedfuse.federation.observer import RoundRecord, Silent
from fedfuse.federation.simulate import simulate
from fedfuse.privacy.ledger import verify
from fedfuse.runfolder import RunFolder
from tests.disks import fill_up, mount, small_disk
from tests.federation.clinic import Clinic

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    with small_disk(tmp_path / "disk", 1024) as folder:
        yield folder


def test_a_node_that_cannot_write_its_ledger_refuses_and_spends_nothing(
    make_config: MakeConfig,
    tmp_path: Path,
    disk: Path,
    unread: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    clinic = Clinic.open(tmp_path / "clinic", make_config(privacy__declared_records=30))
    (disk / "ledger").write_bytes((clinic.folder / "ledger").read_bytes())
    (clinic.folder / "ledger").unlink()
    (clinic.folder / "ledger").symlink_to(disk / "ledger")
    filler, run = fill_up(disk), 0
    told = "cannot write, so nothing was entered: No space left on device"
    while (said := clinic.said(clinic.request(run=f"{run:032x}"))) == "ok: ":
        run += 1  # the ledger's last page has some room
    if said == f"failed: LedgerError: {told}":  # room to reserve, and none to commit: it is spent
        run += 1
    spent, read, asked = clinic.ledger().accounts(), len(unread), clinic.request(run="f" * 32)
    assert spent[0].rounds == run
    assert clinic.said(asked) == f"refused: LedgerError: {told}"
    assert f"{told}\nhint: free some space on its disk" in caplog.text
    assert mount("-o", "remount,ro", disk)
    told = "cannot use it: Read-only file system"
    assert clinic.said(asked) == f"refused: LedgerError: {told}"
    assert mount("-o", "remount,rw", disk)
    assert clinic.ledger().accounts() == spent
    assert len(unread) == read
    filler.unlink()
    assert clinic.said(asked) == "ok: "  # it was never answered
    assert clinic.ledger().accounts()[0].rounds == run + 1
    assert verify(clinic.folder / "ledger", anchor=clinic.folder / "anchor").holds


def test_a_node_on_a_disk_that_cannot_be_written_does_not_start(
    make_config: MakeConfig, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clinic = Clinic.open(disk / "clinic", make_config(privacy__declared_records=30))
    assert mount("-o", "remount,ro", disk)
    assert main(["node", "start", str(clinic.folder), "--only", "vault"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert "Read-only file system" in lines[0]
    assert len(lines) <= 2
    assert clinic.ledger().datasets() == ()


@pytest.mark.slow
def test_a_run_whose_disk_is_full_ends_and_goes_on_when_there_is_room(
    make_config: MakeConfig, disk: Path
) -> None:
    """What cannot be reserved is not asked for, so it is not spent."""

    class Filling(Silent):
        def round_finished(self, record: RoundRecord) -> None:
            fill_up(disk)

    config = make_config(privacy__noise_seed="", train__rounds=2)
    with pytest.raises(RunFolderError, match="No space left on device"):
        simulate(config, disk / "run", observer=Filling())
    (disk / "filler").unlink()
    summary = simulate(config, disk / "run", observer=Silent(), resume=True)
    assert summary["status"] == "finished"
    events = RunFolder.open(disk / "run").events()
    assert [event.status for event in events] == ["spent"] * 6  # nobody was asked in between
    assert len({(event.node, event.round) for event in events}) == 3 * summary["rounds_done"] == 6
    assert max(summary["privacy"]["epsilon_by_node"].values()) <= config.privacy.epsilon
