"""The facts of a privacy report: from the books alone, whole, and against whom."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedfuse.errors import LedgerError, PrivacyError, RunFolderError
from fedfuse.privacy import accounting, second
from fedfuse.privacy.accounting import Relation
from fedfuse.privacy.spec import Unit
from fedfuse.reports.assumptions import Verdict
from fedfuse.reports.budget import of_ledger, of_run
from fedfuse.reports.certificate import certify
from fedfuse.reports.facts import Facts, releases
from fedfuse.reports.figures import rounds_left
from fedfuse.reports.together import together
from fedfuse.reports.wording import floor, forecast, meaning, percent
from fedfuse.runfolder import RunFolder
from tests.reports.books import STEP, event, expose, rounds, write_ledger, write_run

DELTA = 1e-5
NODE = dataclasses.replace(STEP, unit=Unit.NODE, sample_rate=1.0, noise_multiplier=3.0, steps=1)


def epsilon(*steps: int) -> float:
    """What so many steps of STEP cost."""
    return accounting.epsilon([dataclasses.replace(STEP, steps=sum(steps))], DELTA)


def verdict(facts: Facts, text: str) -> Verdict:
    """Of the assumption that begins with `text`."""
    return next(one.verdict for one in facts.assumptions if one.text.startswith(text))


# ---- a run


def test_all_lines_of_the_books_are_composed_for_each_node(tmp_path: Path) -> None:
    books = [*rounds(3, "a", "b"), event("a", 4)]
    facts = of_run(write_run(tmp_path / "run", books))
    assert {a.name: a.figures.epsilon for a in facts.accounts} == {
        "a": epsilon(4, 4, 4, 4),
        "b": epsilon(4, 4, 4),
    }
    assert facts.accounts[0].name == "a"
    assert [one.epsilon for one in facts.statements] == [epsilon(16)] * 2
    assert [(one.steps, one.lines) for one in releases(facts.accounts[0].mechanisms)] == [(16, 4)]


def test_a_round_that_was_broken_off_counts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds(1, "a"))
    RunFolder.open(run).begin_round([event("a", 2, status="reserved")])
    account = of_run(run).accounts[0]
    assert account.figures.epsilon == epsilon(4, 4)
    assert account.reserved == 1


def test_the_figures_hold_each_other_up(tmp_path: Path) -> None:
    facts = of_run(write_run(tmp_path / "run", rounds(3, "a")))
    figures, detail = facts.accounts[0].figures, facts.detail
    assert detail is not None
    low, high = figures.second
    assert low <= figures.epsilon <= figures.rdp
    assert detail.below <= high
    assert figures.epsilon <= 1.001 * high
    assert detail.replace == accounting.epsilon(
        [dataclasses.replace(STEP, steps=12)], DELTA, relation=Relation.REPLACE
    )
    assert [number for number, _ in detail.course] == [1, 2, 3]
    assert detail.course[0][1] == pytest.approx(epsilon(4), rel=1e-3)
    assert detail.course[-1][1] == pytest.approx(figures.epsilon, rel=1e-3)
    assert list(detail.attack) == sorted(detail.attack)
    assert all(found >= alarms for alarms, found in detail.attack)


def test_a_run_without_a_promise_has_no_figure(tmp_path: Path) -> None:
    facts = of_run(write_run(tmp_path / "run", [], privacy__unit="none"))
    assert not facts.private
    assert facts.sentence.startswith("NOT PRIVATE")
    assert (facts.statements, facts.accounts, facts.detail) == ((), (), None)


def test_a_promise_that_only_the_summary_makes_is_none(tmp_path: Path) -> None:
    claims = {"private": True, "epsilon_server": 1.0}
    run = write_run(tmp_path / "run", rounds(1, "a"), privacy__unit="none", privacy=claims)
    facts = of_run(run)
    assert not facts.private
    assert len(facts.problems) == 2


@pytest.mark.parametrize("key", ["epsilon_server", "epsilon_model", "by node"])
def test_a_summary_that_claims_other_figures_is_contradicted(tmp_path: Path, key: str) -> None:
    true = epsilon(12)
    claims = {"epsilon_server": true, "epsilon_model": true, "epsilon_by_node": {"a": true}}
    run = write_run(tmp_path / "honest", rounds(3, "a"), privacy=claims)
    assert of_run(run).problems == ()
    claims |= {"epsilon_by_node": {"a": true / 2}} if key == "by node" else {key: true / 2}
    run = write_run(tmp_path / "other", rounds(3, "a"), privacy=claims)
    assert len(of_run(run).problems) == 1


def test_books_about_another_unit_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds(1, "a", one=NODE))
    with pytest.raises(PrivacyError, match="the books are about unit 'node'"):
        of_run(run)


def test_before_the_first_round_nothing_was_released(tmp_path: Path) -> None:
    facts = of_run(write_run(tmp_path / "run", [], summary=False))
    assert facts.private
    assert facts.sentence == "Nothing has been released yet."


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError):
        of_run(tmp_path)


# ---- unit node: who sees what


def test_nodes_that_add_all_the_noise_are_safe_from_the_server(tmp_path: Path) -> None:
    books = rounds(2, "a", "b", "c", one=NODE)
    facts = of_run(write_run(tmp_path / "run", books, privacy__unit="node"))
    server, public = facts.statements
    summed = dataclasses.replace(NODE, noise_multiplier=3.0 * 3**0.5, steps=2)
    assert server.epsilon == accounting.epsilon([dataclasses.replace(NODE, steps=2)], DELTA)
    assert public.epsilon == accounting.epsilon([summed], DELTA)


def test_where_noise_is_shared_out_the_server_learns_more(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        rounds(2, "a", "b", "c", "d", one=NODE),
        privacy__unit="node",
        privacy__noise_nodes=4,
        federation__min_nodes=4,
    )
    facts = of_run(run)
    server, public = facts.statements
    alone = dataclasses.replace(NODE, noise_multiplier=1.5, steps=2)
    assert server.epsilon == accounting.epsilon([alone], DELTA)
    assert public.epsilon == accounting.epsilon([dataclasses.replace(NODE, steps=2)], DELTA)
    assert verdict(facts, "enough nodes answered") is Verdict.HELD


def test_a_round_with_too_few_shares_breaks_the_assumption(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        rounds(1, "a", "b", one=NODE),
        privacy__unit="node",
        privacy__noise_nodes=4,
        federation__min_nodes=4,
    )
    assert verdict(of_run(run), "enough nodes answered") is Verdict.BROKEN


def test_a_server_that_adds_the_noise_gets_no_guarantee_against_it(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run",
        rounds(2, "a", one=NODE),
        privacy__unit="node",
        privacy__noise_by="server",
        privacy={"epsilon_server": None},
    )
    facts = of_run(run)
    server, public = facts.statements
    assert server.epsilon is None
    assert public.epsilon == accounting.epsilon([dataclasses.replace(NODE, steps=2)], DELTA)
    assert "Nothing is promised against the server" in facts.sentence
    assert facts.problems == ()


def test_real_nodes_whose_noise_the_server_knows_are_not_private(tmp_path: Path) -> None:
    """Only a summary that names all the data, as a simulation's does, shows that it was one."""
    for name, more in (("real", {"fingerprint": ""}), ("broken-off", {"summary": False})):
        run = write_run(tmp_path / name, rounds(2, "a"), privacy__noise_seed="s", **more)
        facts = of_run(run)
        assert (facts.private, facts.accounts) == (False, ())
        assert facts.sentence.startswith("NOT PRIVATE")
        (problem,) = facts.problems
        assert "it can take the noise off" in problem
        with pytest.raises(PrivacyError, match="NOT PRIVATE"):
            certify([facts], now=datetime.now(UTC))
    assert of_run(write_run(tmp_path / "made", rounds(2, "a"), privacy__noise_seed="s")).private


# ---- assumptions


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("nobody can know or repeat the noise", {"privacy__noise_seed": "s"}),
        ("the divisor of a step's sum", {"privacy__declared_records": 0}),
        ("a person has one record", {"privacy__records_are_units": True}),
        ("each record is drawn on its own", {"privacy__sample_rate": 0.1}),
        ("the clip norm is public", {"privacy__clip_norm": 2.0}),
        ("nobody spent more than allowed", {"privacy__epsilon": 0.5}),
    ],
)
def test_an_assumption_that_did_not_hold_is_told(
    tmp_path: Path, text: str, changes: dict[str, object]
) -> None:
    honest = of_run(write_run(tmp_path / "honest", rounds(2, "a")))
    assert verdict(honest, text) is not Verdict.BROKEN
    other = of_run(write_run(tmp_path / "other", rounds(2, "a"), **changes))
    assert verdict(other, text) is Verdict.BROKEN


def test_what_the_run_says_of_itself_is_passed_on_as_such(tmp_path: Path) -> None:
    facts = of_run(write_run(tmp_path / "run", rounds(1, "a")))
    assert verdict(facts, "which nodes were asked") is Verdict.TRUSTED


# ---- a ledger


def test_a_ledger_composes_each_data_set_over_all_runs_and_servers(tmp_path: Path) -> None:
    spending = [("scans", STEP), ("notes", STEP), ("scans", STEP), ("scans", STEP)]
    write_ledger(tmp_path / "ledger", spending, broken_off=1)
    facts = of_ledger(tmp_path / "ledger", delta=DELTA, allowed=8.0)
    assert {a.name: a.figures.epsilon for a in facts.accounts} == {
        "scans": epsilon(4, 4, 4),
        "notes": epsilon(4),
    }
    assert {a.name: a.reserved for a in facts.accounts} == {"scans": 1, "notes": 0}
    assert facts.ledgers[0].lines == 1 + 4 + 3


def test_figures_of_two_units_are_kept_apart_and_told(tmp_path: Path) -> None:
    write_ledger(tmp_path / "ledger", [("scans", STEP), ("scans", NODE)])
    facts = of_ledger(tmp_path / "ledger", delta=DELTA, allowed=None)
    assert {a.unit for a in facts.accounts} == {Unit.RECORD, Unit.NODE}
    assert len(facts.statements) == 2
    assert len(facts.problems) == 1


def test_no_figure_holds_for_what_a_run_without_a_promise_has_read(tmp_path: Path) -> None:
    for name in ("l1", "l2"):
        write_ledger(tmp_path / name, [("scans", STEP), ("notes", STEP)])
    expose(tmp_path / "l1", "scans")
    one, other = (of_ledger(tmp_path / n, delta=DELTA, allowed=None) for n in ("l1", "l2"))
    assert [account.name for account in one.accounts] == ["notes"]
    assert any("NOT PRIVATE: scans" in problem for problem in one.problems)
    joint = {section.data: section for section in together([one, other])}
    assert not joint["scans",].private
    assert joint["scans",].accounts == ()
    assert joint["notes",].private
    expose(tmp_path / "l1", "notes")
    assert not of_ledger(tmp_path / "l1", delta=DELTA, allowed=None).private


def test_a_ledger_that_was_changed_gives_no_report(tmp_path: Path) -> None:
    write_ledger(tmp_path / "ledger", [("scans", STEP)] * 3)
    data = (tmp_path / "ledger").read_bytes()
    (tmp_path / "ledger").write_bytes(data.replace(b'"steps":4', b'"steps":1', 1))
    with pytest.raises(LedgerError):
        of_ledger(tmp_path / "ledger", delta=DELTA, allowed=None)


# ---- several on the same data


def test_runs_on_the_same_data_add_up(tmp_path: Path) -> None:
    sections = [
        of_run(write_run(tmp_path / "one", rounds(2, "a", "b"))),
        of_run(write_run(tmp_path / "two", rounds(1, "a"))),
        of_run(write_run(tmp_path / "else", rounds(1, "a"), fingerprint="e" * 64)),
    ]
    (joint,) = together(sections)
    assert {a.name: a.figures.epsilon for a in joint.accounts} == {
        "a": epsilon(8, 4),
        "b": epsilon(8),
    }
    assert {one.epsilon for one in joint.statements} == {epsilon(12)}


def test_a_run_without_a_promise_leaves_none_to_the_others_on_its_data(tmp_path: Path) -> None:
    sections = [
        of_run(write_run(tmp_path / "one", rounds(1, "a"))),
        of_run(write_run(tmp_path / "two", [], privacy__unit="none")),
    ]
    (joint,) = together(sections)
    assert not joint.private
    assert joint.accounts == joint.statements == ()


def test_of_several_deltas_the_smallest_is_taken(tmp_path: Path) -> None:
    sections = [
        of_run(write_run(tmp_path / "one", rounds(1, "a"))),
        of_run(write_run(tmp_path / "two", rounds(1, "a"), privacy__delta=1e-7)),
    ]
    (joint,) = together(sections)
    assert joint.delta == 1e-7


def test_a_trusted_server_in_one_run_is_unguarded_in_all(tmp_path: Path) -> None:
    node = {"privacy__unit": "node"}
    sections = [
        of_run(write_run(tmp_path / "one", rounds(1, "a", "b", one=NODE), **node)),
        of_run(
            write_run(
                tmp_path / "two",
                rounds(1, "a", "b", one=NODE),
                privacy__noise_by="server",
                **node,
            )
        ),
    ]
    (joint,) = together(sections)
    both = accounting.epsilon([dataclasses.replace(NODE, steps=2)], DELTA)
    assert [one.epsilon for one in joint.statements] == [None, both]


def test_whoever_sees_shares_in_one_run_sees_whole_updates_of_the_other(tmp_path: Path) -> None:
    books = rounds(1, "a", "b", "c", "d", one=NODE)
    shares = {"privacy__noise_nodes": 4, "federation__min_nodes": 4}
    sections = [
        of_run(write_run(tmp_path / "one", books, privacy__unit="node", **shares)),
        of_run(write_run(tmp_path / "two", books, privacy__unit="node")),
    ]
    (joint,) = together(sections)
    share = dataclasses.replace(NODE, noise_multiplier=1.5)
    assert joint.statements[0].epsilon == accounting.epsilon([share, NODE], DELTA)


def test_ledgers_that_name_the_same_data_add_up(tmp_path: Path) -> None:
    write_ledger(tmp_path / "l1", [("scans", STEP), ("notes", STEP)])
    write_ledger(tmp_path / "l2", [("scans", STEP)], node="clinic-b")
    sections = [of_ledger(tmp_path / n, delta=DELTA, allowed=None) for n in ("l1", "l2")]
    (joint,) = together(sections)
    assert [(a.name, a.figures.epsilon) for a in joint.accounts] == [("scans", epsilon(8))]


# ---- words and forecasts


def test_the_forecast_is_the_last_round_that_fits(tmp_path: Path) -> None:
    left = rounds_left([STEP, STEP], STEP, epsilon=4.0, delta=DELTA)
    assert left > 0
    assert epsilon(8, 4 * left) <= 4.0 < epsilon(8, 4 * (left + 1))
    run = write_run(tmp_path / "run", rounds(2, "a"), privacy__epsilon=4.0)
    assert f"afford {left} more rounds" in forecast(of_run(run))[0]


def test_a_spent_budget_has_ended(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds(3, "a"), privacy__epsilon=epsilon(12))
    assert "the budget has ended" in forecast(of_run(run))[0]


def test_what_an_attacker_finds_is_never_rounded_down(tmp_path: Path) -> None:
    facts = of_run(write_run(tmp_path / "run", rounds(3, "a")))
    assert facts.detail is not None
    found = facts.detail.true_positives(0.01)
    sentence = next(text for text in meaning(facts) if "at most 1 % false alarms" in text)
    said = float(sentence.split("finds at most ")[1].split(" %")[0])
    assert 100 * found <= said <= 100 * found + 1


@pytest.mark.parametrize(
    ("share", "words"), [(0.0, "0 %"), (0.001, "0.1 %"), (0.0412, "4.2 %"), (0.9901, "100 %")]
)
def test_percentages_are_rounded_up(share: float, words: str) -> None:
    assert percent(share) == words


def test_lower_bounds_are_rounded_down() -> None:
    low, _ = second.bounds([(0.25, 1.5, 12)], DELTA)
    assert float(floor(low)) <= low


def test_facts_load_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds(1, "a"))
    code = (
        "import sys, json\nfrom pathlib import Path\nfrom fedfuse.reports.budget import of_run\n"
        f"of_run(Path({str(run)!r}))\n"
        "print(json.dumps([m for m in ('torch', 'flwr', 'matplotlib') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
