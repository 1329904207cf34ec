"""`fedfuse report`: what is written where, and one clear line for whatever is no report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedfuse.privacy import accounting
from fedfuse.privacy.signing import SigningKey
from fedfuse.runfolder import RunFolder
from tests.cli.stand_ins import Result
from tests.reports.books import STEP, event, rounds, write_ledger, write_run

Run = Callable[..., Result]
RUN = Path("run")


def epsilon(steps: int) -> float:
    return accounting.epsilon([dataclasses.replace(STEP, steps=steps)], 1e-5)


def told(result: Result, code: int) -> str:
    """The one error line of a command that failed in the foreseen way."""
    assert result.code == code, result
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert "error: unexpected" not in result.err
    return errors[0]


@pytest.mark.parametrize("words", [(), ("privacy",), ("verify",)])
def test_help_says_what_it_does_with_an_example(run: Run, words: tuple[str, ...]) -> None:
    result = run("report", *words, "--help")
    assert result.code == 0
    assert not words or "Example: fedfuse report" in result.out


def test_a_run_gets_its_page_and_certificate_beside_it(run: Run) -> None:
    write_run(RUN, rounds(3, "a", "b"))
    result = run("report", "privacy", RUN)
    assert result.code == 0
    assert f"epsilon {accounting.shown(epsilon(12))} of 8" in result.out
    assert (RUN / "privacy.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "UNSIGNED" in result.err
    checked = run("report", "verify", RUN / "certificate.json")
    assert checked.code == 0
    assert "it holds" in checked.out
    assert "UNSIGNED" in checked.out


def test_json_has_the_figures_in_full(run: Run) -> None:
    write_run(RUN, rounds(3, "a"), privacy__noise_seed="s")
    (facts,) = json.loads(run("report", "privacy", RUN, "--json").out)
    assert facts["accounts"][0]["epsilon"] == epsilon(12)
    assert facts["statements"][0]["epsilon"] == epsilon(12)
    assert facts["delta"] == 1e-5
    assert facts["accounts"][0]["releases"] == [
        {
            "unit": "record",
            "sample_rate": 0.25,
            "noise_multiplier": 1.5,
            "clip_norm": 1.0,
            "count_noise": 0.0,
            "steps": 12,
            "lines": 3,
        }
    ]
    assert any(text.startswith("SEEDED NOISE") for text in facts["cautions"])


def test_a_run_without_a_promise_is_not_private_and_has_no_certificate(run: Run) -> None:
    write_run(RUN, [], privacy__unit="none")
    result = run("report", "privacy", RUN)
    assert result.code == 0
    assert "*** NOT PRIVATE ***" in result.out
    assert not (RUN / "certificate.json").exists()
    assert "NOT PRIVATE" in (RUN / "privacy.html").read_text(encoding="utf-8")
    asked = run("report", "privacy", RUN, "--certificate", "c.json")
    assert "NOT PRIVATE" in told(asked, 6)
    assert not Path("c.json").exists()


def test_a_signed_certificate_holds_for_its_key_and_its_ledger_alone(run: Run) -> None:
    SigningKey.create(Path("key"))
    other = SigningKey.create(Path("other"))
    write_ledger(Path("ledger"), [("scans", STEP)] * 2, key=Path("key"))
    write_ledger(Path("else"), [("scans", STEP)] * 2)
    words = ("--certificate", "c.json", "--key", "key", "--epsilon", 8)
    assert run("report", "privacy", "ledger", *words).code == 0
    key = SigningKey.load(Path("key")).public
    good = run("report", "verify", "c.json", "--public-key", key, "--ledger", "ledger", "--json")
    assert good.code == 0
    assert json.loads(good.out)["holds"]
    assert json.loads(good.out)["pinned"]
    wrong_key = run("report", "verify", "c.json", "--public-key", other.public)
    assert "signed by another key" in told(wrong_key, 6)
    wrong_ledger = run("report", "verify", "c.json", "--ledger", "else")
    assert "nothing in it is about this ledger" in told(wrong_ledger, 6)
    tree = json.loads(Path("c.json").read_text(encoding="utf-8"))
    tree["sections"][0]["delta"] = 1e-3
    Path("c.json").write_text(json.dumps(tree), encoding="utf-8")
    changed = run("report", "verify", "c.json")
    assert changed.code == 6
    assert "IT DOES NOT HOLD" in changed.out
    assert "it was changed after it was signed" in changed.err


def test_names_do_not_reach_the_terminal_as_commands(run: Run) -> None:
    write_run(RUN, rounds(1, "a\x1b[2Jb"))
    result = run("report", "privacy", RUN)
    assert "\x1b" not in result.out
    assert "a\ufffd[2Jb" in result.out


# ---- what is no report


def rewrite(name: str, old: str, new: str) -> None:
    path = RUN / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "old", "new", "code", "words"),
    [
        (
            "events.jsonl",
            '"noise_multiplier": 1.5',
            '"noise_multiplier": 0.0',
            6,
            "entry 1: noise_",
        ),
        (
            "events.jsonl",
            '"noise_multiplier": 1.5',
            '"noise_multiplier": NaN',
            6,
            "entry 1: noise_",
        ),
        ("events.jsonl", '"noise_multiplier": 1.5', '"noise_multiplier": -1', 6, "entry 1: noise_"),
        ("events.jsonl", '"noise_multiplier": 1.5', '"noise_multiplier": "1"', 8, "wrong type"),
        ("events.jsonl", '"noise_multiplier": 1.5', '"noise_multiplier": 0.2', 6, "NOT PRIVATE"),
        ("events.jsonl", '"steps": 4', '"steps": 4.5', 8, "steps = 4.5 is of the wrong type"),
        ("events.jsonl", '"steps": 4', '"steps": true', 8, "steps = True is of the wrong type"),
        ("events.jsonl", '"steps": 4', '"steps": 0', 6, "at least 1 is needed"),
        ("events.jsonl", '"steps": 4', '"steps": 4000000000', 6, "protects nobody"),
        ("events.jsonl", '"sample_rate": 0.25', '"sample_rate": 2', 6, "sample_rate = 2"),
        ("events.jsonl", '"unit": "record"', '"unit": "node"', 6, "the books are about unit"),
        ("events.jsonl", '"unit": "record"', '"unit": "x"', 6, "'x' is unknown"),
        ("events.jsonl", '"node"', '"nude"', 8, "cannot be read"),
        ("events.jsonl", "{", "[", 8, "events.jsonl, line 1 cannot be read"),
        ("events.jsonl", '"count_noise": 0.0}\n', '"count_noise": 0.0', 8, "cut off"),
        ("summary.json", "{", "", 8, "summary.json cannot be read"),
        ("config.toml", "[privacy]", "[privacy", 3, "config.toml"),
        ("config.toml", 'unit = "record"', 'unit = "perhaps"', 3, "unit"),
    ],
)
def test_a_damaged_run_is_one_clear_line_and_no_report(
    run: Run, name: str, old: str, new: str, code: int, words: str
) -> None:
    write_run(RUN, rounds(2, "a"))
    rewrite(name, old, new)
    assert words in told(run("report", "privacy", RUN), code)
    assert not (RUN / "privacy.html").exists()
    assert not (RUN / "certificate.json").exists()


def test_books_that_lack_a_round_give_no_figure(run: Run) -> None:
    write_run(RUN, rounds(3, "a"))
    lines = (RUN / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (RUN / "events.jsonl").write_text("".join(lines[:-1]), encoding="utf-8")
    assert "round 3 was done, but the books have no line of it" in told(
        run("report", "privacy", RUN), 8
    )
    (RUN / "metrics.jsonl").unlink()
    rewrite("summary.json", '"status"', '"rounds_done": 3, "status"')
    assert "round 3 was done" in told(run("report", "privacy", RUN), 8)
    (RUN / "events.jsonl").unlink()
    assert "round 1 was done" in told(run("report", "privacy", RUN), 8)


def test_a_line_that_was_cut_off_counts_where_it_was_reserved(run: Run) -> None:
    write_run(RUN, rounds(2, "a"), summary=False)
    RunFolder.open(RUN).begin_round([event("a", 3, status="reserved")])
    with (RUN / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"node": "a", "round": 3')
    (facts,) = json.loads(run("report", "privacy", RUN, "--json").out)
    assert facts["accounts"][0]["epsilon"] == epsilon(12)
    (RUN / "reserved.json").unlink()
    assert "the last line of the books is cut off" in told(run("report", "privacy", RUN), 8)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("nowhere",), 8, "no run and no ledger is here"),
        (("empty",), 8, "no run is here"),
        (("letter",), 6, "letter"),
        (("ledger", "--delta", "0"), 2, "--delta"),
        (("ledger", "--delta", "nan"), 2, "--delta"),
        (("ledger", "--epsilon", "-1"), 2, "--epsilon"),
        (("ledger", "--key", "nokey", "--certificate", "c"), 6, "nokey"),
        (("ledger", "--html", "no/such/folder/x.html"), 6, "cannot write it"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(
    run: Run, words: tuple[str, ...], code: int, said: str
) -> None:
    Path("empty").mkdir()
    Path("letter").write_text("Dear Sir or Madam\n", encoding="utf-8")
    write_ledger(Path("ledger"), [("scans", STEP)])
    assert said in told(run("report", "privacy", *words), code)


def test_a_ledger_that_was_changed_gives_no_report(run: Run) -> None:
    write_ledger(Path("ledger"), [("scans", STEP)] * 2)
    data = Path("ledger").read_bytes()
    Path("ledger").write_bytes(data.replace(b'"steps":4', b'"steps":1', 1))
    assert "ledger" in told(run("report", "privacy", "ledger", "--html", "x.html"), 6)
    assert not Path("x.html").exists()


def test_a_ledger_on_which_nothing_was_spent_says_so(run: Run) -> None:
    write_ledger(Path("ledger"), [])
    result = run("report", "privacy", "ledger", "--html", "x.html", "--certificate", "c.json")
    assert result.code == 0
    assert "Nothing has been released yet." in result.out
    assert run("report", "verify", "c.json", "--ledger", "ledger").code == 0


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe", b"[1, 2"])
def test_what_is_no_certificate_is_one_clear_line(run: Run, content: bytes | None) -> None:
    if content is not None:
        Path("c.json").write_bytes(content)
    told(run("report", "verify", "c.json"), 6)
