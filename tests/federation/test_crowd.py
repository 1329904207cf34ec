"""Many real nodes at one SuperLink, as the benchmark starts them: no answer is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedfuse.privacy.ledger import Ledger, verify
from fedfuse.privacy.verification import read_heads
from fedfuse.runfolder import RunFolder

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.skipif(not os.environ.get("FEDFUSE_ALL"), reason="takes minutes: FEDFUSE_ALL=1")
def test_no_answer_of_a_crowd_is_lost_and_its_ledgers_agree_with_the_servers_books(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight nodes with a model of 16 MB, which Flower cuts into several pieces."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from deployed import MARK, Case, deployed, shown

    monkeypatch.setenv(MARK, "test")
    told = deployed(tmp_path / "crowd", Case(nodes=8, rounds=2, width=1000, forked=True))
    assert (told.lost, len(told.rounds), told.parameters) == (0, 2, 4_024_002)
    assert all(line["bytes_received"] > 8 * 16_000_000 for line in told.rounds)
    (run,) = (tmp_path / "crowd" / "srv" / "runs").glob("deployed-*")
    events, heads = RunFolder.open(run).events(), read_heads(run / "heads.jsonl")
    assert {event.status for event in events} == {"spent"}
    for number in range(8):
        node = tmp_path / "crowd" / f"c{number}"
        assert sum(event.node == node.name for event in events) == 2
        mine = [head for head in heads if head.node == node.name]
        assert verify(node / "ledger", anchor=node.with_suffix(".anchor"), heads=mine).holds
        account = Ledger.open(node / "ledger").accounts()[0]
        assert (account.rounds, account.open) == (2, 0)
    kinds = told.watch.kinds()
    assert (kinds["vault"].most, kinds["SuperNode"].most) == (8, 8)
    assert "| 8 | 2 | 0 |" in shown(told)
