"""Simulated nodes with ledgers: runs on the same records share a budget, and heads are kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedfuse.config import RunConfig
from fedfuse.errors import FederationError, LedgerError, PrivacyError
from fedfuse.federation.ledgers import ledger_name
from fedfuse.federation.observer import Silent
from fedfuse.federation.simulate import simulate
from fedfuse.privacy import accounting
from fedfuse.privacy.ledger import Ledger, verify
from fedfuse.privacy.verification import read_heads
from fedfuse.runfolder import RunFolder

MakeConfig = Callable[..., RunConfig]


@pytest.mark.slow
def test_two_runs_on_the_same_records_compose_and_the_third_is_refused(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(privacy__noise_seed="", privacy__epsilon=8.0, train__rounds=2)
    ledgers = tmp_path / "ledgers"
    for name in ("first", "renamed"):
        run = config.with_values({"name": name})
        summary = simulate(run, tmp_path / name, observer=Silent(), ledgers=ledgers)
        assert summary["status"] == "finished"
    path = ledgers / ledger_name("site-a")
    account = Ledger.open(path).accounts()[0]
    assert (account.runs, account.rounds, account.open) == (2, 4, 0)
    one = RunFolder.open(tmp_path / "first")
    spent = [event.mechanism for event in one.events() if event.node == "site-a"]
    both = accounting.epsilon([*spent, *spent], 1e-5)
    assert accounting.epsilon(account.history, 1e-5) == pytest.approx(both)
    assert both <= 8.0
    # Each round's line of each node is in the run's own folder, and in the ledger.
    heads = read_heads(tmp_path / "first" / "heads.jsonl")
    assert len(heads) == 2 * 3
    assert verify(path, heads=[head for head in heads if head.node == "site-a"]).holds
    with pytest.raises(FederationError, match="BudgetExceeded"):
        simulate(config, tmp_path / "third", observer=Silent(), ledgers=ledgers)
    assert Ledger.open(path).accounts()[0].rounds == 4


def test_a_node_whose_budget_is_gone_is_left_out_and_the_others_go_on(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(privacy__noise_seed="", train__rounds=1)
    ledgers = tmp_path / "ledgers"
    simulate(config, tmp_path / "first", observer=Silent(), ledgers=ledgers)
    book = Ledger.open(ledgers / ledger_name("site-b"))
    known = book.history(book.datasets()[0])[0]
    book.reserve(
        book.datasets()[0],
        dataclasses.replace(known, steps=100_000),
        run="d" * 32, server="elsewhere", node="site-b", round=1, request="elsewhere/1",
        allow=lambda history: None,
    )  # fmt: skip
    summary = simulate(config, tmp_path / "second", observer=Silent(), ledgers=ledgers)
    assert summary["status"] == "finished"
    row = json.loads((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["nodes_ok"] == 2
    assert row["failures"].keys() == {"site-b"}
    assert "BudgetExceeded" in row["failures"]["site-b"]
    assert set(summary["privacy"]["epsilon_by_node"]) == {"site-a", "site-c"}


def test_a_lost_ledger_is_not_a_new_budget(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(privacy__noise_seed="", train__rounds=1)
    ledgers = tmp_path / "ledgers"
    simulate(config, tmp_path / "first", observer=Silent(), ledgers=ledgers)
    (ledgers / ledger_name("site-b")).unlink()
    with pytest.raises(LedgerError, match="none of node 'site-b'"):
        simulate(config, tmp_path / "second", observer=Silent(), ledgers=ledgers)


def test_ledgers_hold_no_noise_that_can_be_removed_and_no_run_without_a_promise(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    for changes, message in (
        ({"privacy__noise_seed": "known"}, "can be removed"),
        ({"privacy__noise_seed": "", "privacy__unit": "none"}, "promises nothing"),
    ):
        with pytest.raises(PrivacyError, match=message):
            simulate(
                make_config(**changes), tmp_path / "run", observer=Silent(), ledgers=tmp_path / "l"
            )
        assert not (tmp_path / "l").exists()


def test_a_run_keeps_its_id_when_it_is_gone_on_with(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = RunFolder.create(tmp_path / "run", make_config())
    assert len(folder.run_id()) == 32
    assert RunFolder.create(tmp_path / "run", make_config(), resume=True).run_id() == (
        folder.run_id()
    )
    assert RunFolder.create(tmp_path / "other", make_config()).run_id() != folder.run_id()
