"""`fedfuse ledger`: what was spent is told, and what does not hold gives exit code 6 by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedfuse.privacy import accounting
from fedfuse.privacy.ledger import Ledger
from fedfuse.privacy.spec import Mechanism, Unit
from tests.cli.stand_ins import Result
from tests.privacy.ledgers import fill, lines_of, mechanism, spend, trees_of, write_anew

Run = Callable[..., Result]
LEDGER, KEY = Path("node.ledger"), Path("node.pem")


@pytest.fixture
def made(run: Run) -> Ledger:
    """Signed, in the working directory, with 12 steps spent on "scans" and 7 on "notes"."""
    assert run("ledger", "init", LEDGER, "--node", "clinic-a", "--key", KEY).code == 0
    ledger = Ledger.open(LEDGER, key=KEY)
    fill(ledger)
    spend(ledger, "other", dataset="notes", what=mechanism(7), run="run-2", server="aa")
    return ledger


@pytest.mark.parametrize(
    ("words", "example"),
    [
        ((), "show"),
        (("init",), "fedfuse ledger init clinic.ledger --node clinic-a"),
        (("show",), "fedfuse ledger show clinic.ledger"),
        (("verify",), "fedfuse ledger verify clinic.ledger"),
        (("export",), "fedfuse ledger export clinic.ledger"),
        (("import",), "fedfuse ledger import clinic.ledger"),
        (("anchor",), "fedfuse ledger anchor clinic.ledger"),
    ],
)
def test_each_command_has_help_with_an_example(
    run: Run, words: tuple[str, ...], example: str
) -> None:
    result = run("ledger", *words, "--help")
    assert result.code == 0
    assert example in result.out
    assert result.err == ""


# ---- init


def test_init_makes_a_ledger_and_its_key(run: Run) -> None:
    result = run("ledger", "init", LEDGER, "--node", "clinic-a", "--key", KEY, "--anchor", "a")
    ledger = Ledger.open(LEDGER, key=KEY, anchor=Path("a"))
    assert result.code == 0
    assert result.out.splitlines() == [
        f"ledger      {ledger.id}",
        "node        clinic-a",
        f"public key  {ledger.public_key}",
    ]
    assert "made the key node.pem" in result.err
    assert KEY.stat().st_mode & 0o777 == 0o600


def test_init_takes_a_key_that_is_there(run: Run, made: Ledger) -> None:
    before = KEY.read_bytes()
    result = run("ledger", "init", "second", "--node", "clinic-a", "--key", KEY)
    assert result.code == 0
    assert result.err == ""
    assert made.public_key in result.out
    assert KEY.read_bytes() == before


def test_init_without_a_key_says_so(run: Run) -> None:
    result = run("ledger", "init", LEDGER, "--node", "clinic-a")
    assert "public key  none: lines are not signed" in result.out


def test_init_overwrites_nothing_and_makes_no_key_for_it(run: Run) -> None:
    run("ledger", "init", LEDGER, "--node", "clinic-a")
    before = LEDGER.read_bytes()
    result = run("ledger", "init", LEDGER, "--node", "clinic-a", "--key", KEY)
    assert result.code == 6
    assert result.err.startswith("error: node.ledger: a file is there already")
    assert LEDGER.read_bytes() == before
    assert not KEY.exists()


# ---- show


def test_show_tells_each_data_set(run: Run, made: Ledger) -> None:
    result = run("ledger", "show", LEDGER)
    epsilon = [accounting.shown(accounting.epsilon([mechanism(n)], 1e-5)) for n in (7, 12)]
    head, notes, scans, last = (line.split() for line in result.out.splitlines())
    assert head[:7] == ["dataset", "unit", "runs", "servers", "rounds", "steps", "open"]
    assert " ".join(head[7:]) == "epsilon (delta = 1e-05)"
    assert notes == ["notes", "record", "1", "1", "1", "7", "1", epsilon[0]]
    assert scans == ["scans", "record", "1", "1", "3", "12", "1", epsilon[1]]
    assert last[0] == "open:"
    assert result.code == 0
    assert result.err == ""


def test_show_as_json(run: Run, made: Ledger) -> None:
    tree = json.loads(run("ledger", "show", LEDGER, "--delta", "1e-6", "--json").out)
    assert (tree["ledger"], tree["node"], tree["delta"]) == (made.id, "clinic-a", 1e-6)
    assert (tree["head"], tree["public_key"]) == (made.head, made.public_key)
    scans = tree["datasets"][1]
    epsilon = accounting.epsilon([mechanism(12)], 1e-6)
    assert scans.pop("epsilon") == pytest.approx(epsilon)
    assert scans == {
        "dataset": "scans",
        "unit": "record",
        "runs": 1,
        "servers": 1,
        "rounds": 3,
        "steps": 12,
        "open": 1,
        "exposed": False,
        "epsilon_shown": accounting.shown(epsilon),
    }


def test_nothing_spent_is_said_so(run: Run) -> None:
    run("ledger", "init", LEDGER, "--node", "clinic-a")
    assert run("ledger", "show", LEDGER) == Result(0, "nothing spent\n", "")
    assert json.loads(run("ledger", "show", LEDGER, "--json").out)["datasets"] == []


def test_epsilon_of_absurd_entries_is_told_at_once_and_never_too_low(run: Run) -> None:
    """Their fine account would take hours."""
    run("ledger", "init", LEDGER, "--node", "clinic-a")
    ledger = Ledger.open(LEDGER)
    spend(ledger, "r1", dataset="bare", what=mechanism(4, sigma=0.01))
    spend(ledger, "r2", dataset="endless", what=mechanism(10**12))
    spend(ledger, "r3", dataset="huge", what=mechanism(10**400))
    _, bare, endless, huge, _ = run("ledger", "show", LEDGER).out.splitlines()
    assert bare.endswith("  inf")
    assert huge.endswith("  inf")
    assert float(endless.split()[-1]) > 1000
    tree = json.loads(run("ledger", "show", LEDGER, "--json").out)
    assert tree["datasets"][0]["epsilon"] is None


def test_promises_of_different_units_are_not_added(run: Run, made: Ledger) -> None:
    subject = Mechanism(
        unit=Unit.SUBJECT, sample_rate=0.1, noise_multiplier=1.0, clip_norm=1.0, steps=1
    )
    spend(made, "by subject", what=subject)
    result = run("ledger", "show", LEDGER)
    assert [line.split()[:2] for line in result.out.splitlines()[1:4]] == [
        ["notes", "record"],
        ["scans", "record"],
        ["scans", "subject"],
    ]
    assert "scans: promises of different units do not add up" in result.err


def test_show_says_that_a_last_line_is_unfinished(run: Run, made: Ledger) -> None:
    with LEDGER.open("ab") as file:
        file.write(b'{"da')
    result = run("ledger", "show", LEDGER)
    assert result.code == 0
    assert result.err == "node.ledger: note: an unfinished last line of 4 bytes is left out\n"


def test_show_does_not_tell_what_a_damaged_ledger_says(run: Run, made: Ledger) -> None:
    LEDGER.write_bytes(LEDGER.read_bytes().replace(b'"steps":4', b'"steps":1', 1))
    result = run("ledger", "show", LEDGER)
    assert (result.code, result.out) == (6, "")
    assert result.err.startswith("error: node.ledger, line 2: its hash does not fit its content")


# ---- verify


def test_verify_says_what_holds(run: Run, made: Ledger) -> None:
    result = run("ledger", "verify", LEDGER)
    assert result.code == 0
    assert result.out.splitlines() == [
        f"ledger      {made.id}",
        "node        clinic-a",
        "entries     7",
        f"head        {made.head}",
        f"public key  {made.public_key}",
    ]
    assert result.err.splitlines() == [
        "node.ledger: note: signed with the key that it names itself: compare it with the node's",
        "node.ledger: note: 2 reserved and never committed: they count as spent",
        "node.ledger: it holds",
    ]


@pytest.mark.parametrize("option", ["--public-key", "--key"])
def test_verify_takes_the_key_in_each_form(run: Run, made: Ledger, option: str) -> None:
    for given in (made.public_key, KEY):
        result = run("ledger", "verify", LEDGER, option, given, "--every-signature")
        assert result.code == 0
        assert "compare it" not in result.err
    result = run("ledger", "verify", LEDGER, option, "0" * 64)
    assert result.code == 6
    assert f"error: node.ledger: its key is {made.public_key}, not 000" in result.out


def test_verify_names_the_broken_line(run: Run, made: Ledger) -> None:
    lines = lines_of(LEDGER)
    lines[2] = lines[2].replace(b'"round":1', b'"round":2')
    LEDGER.write_bytes(b"".join(lines))
    result = run("ledger", "verify", LEDGER)
    assert result.code == 6
    assert result.out.startswith("error: node.ledger, line 3: its hash does not fit its content")
    assert "entries     2" in result.out
    assert result.err.splitlines()[-1] == "node.ledger: 1 problem"


def test_verify_as_json(run: Run, made: Ledger) -> None:
    tree = json.loads(run("ledger", "verify", LEDGER, "--json").out)
    assert (tree["holds"], tree["problems"], tree["entries"]) == (True, [], 7)
    LEDGER.write_bytes(LEDGER.read_bytes()[:-1] + b"x")
    result = run("ledger", "verify", LEDGER, "--json")
    assert result.code == 6
    tree = json.loads(result.out)
    assert tree["holds"] is False
    assert tree["problems"][0].startswith("node.ledger, line 7: ")


def test_verify_asks_the_anchor(run: Run, made: Ledger) -> None:
    assert run("ledger", "anchor", LEDGER, "anchor", "--key", KEY) == Result(0, "", "")
    assert run("ledger", "verify", LEDGER, "--anchor", "anchor").code == 0
    LEDGER.write_bytes(b"".join(lines_of(LEDGER)[:-1]))
    assert run("ledger", "verify", LEDGER).code == 0
    result = run("ledger", "verify", LEDGER, "--anchor", "anchor")
    assert result.code == 6
    assert "the ledger ends with entry 5, but 6 was anchored" in result.out
    assert run("ledger", "anchor", LEDGER, "anchor", "--key", KEY).code == 6


def test_verify_asks_for_heads(run: Run, made: Ledger) -> None:
    heads = [entry.hash for entry in made.entries()]
    asked = ["--head", heads[1], "--head", heads[-1].upper()]
    assert run("ledger", "verify", LEDGER, *asked).code == 0
    LEDGER.write_bytes(b"".join(lines_of(LEDGER)[:-1]))
    result = run("ledger", "verify", LEDGER, *asked)
    assert result.code == 6
    assert f"it lacks the line {heads[-1]}, which --head saw" in result.out


def test_verify_asks_the_heads_in_run_folders(run: Run, made: Ledger) -> None:
    kept = [
        {"round": 1, "node": "clinic-b", "ledger": "f" * 32, "head": "0" * 64},
        {"round": 1, "node": "clinic-a", "ledger": made.id, "head": made.head},
    ]
    for name, lines in (("one", kept), ("two", kept[:1]), ("three", [])):
        Path(name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        Path(name, "heads.jsonl").write_text(text, encoding="utf-8")
    assert run("ledger", "verify", LEDGER, "--run", "one").code == 0
    result = run("ledger", "verify", LEDGER, "--run", "two")
    assert result.code == 6
    assert "two/heads.jsonl, line 1 has no line of this ledger" in result.out
    for name in ("three", "nosuch"):
        result = run("ledger", "verify", LEDGER, "--run", name)
        assert result.code == 0
        assert f"{name} keeps no heads: nothing was compared with it" in result.err
    LEDGER.write_bytes(b"".join(lines_of(LEDGER)[:-1]))
    result = run("ledger", "verify", LEDGER, "--run", "one")
    assert result.code == 6
    assert f"it lacks the line {made.head}, which one/heads.jsonl, line 2 saw" in result.out


# ---- export and import


def test_what_was_exported_is_imported_once(run: Run, made: Ledger) -> None:
    assert run("ledger", "export", LEDGER, "--out", "e.json") == Result(0, "", "")
    assert run("ledger", "export", LEDGER).out == Path("e.json").read_text(encoding="utf-8")
    run("ledger", "init", "b.ledger", "--node", "clinic-b")
    first = run("ledger", "import", "b.ledger", "e.json", "--public-key", made.public_key)
    assert first == Result(0, "4 of 4 entries were new, and are spent here too\n", "")
    again = run("ledger", "import", "b.ledger", "e.json")
    assert again.out == "0 of 4 entries were new, and are spent here too\n"
    assert Ledger.open(Path("b.ledger")).history("scans") == made.history("scans")


def test_an_export_is_never_written_over_another(run: Run, made: Ledger) -> None:
    Path("e.json").write_text("mine", encoding="utf-8")
    result = run("ledger", "export", LEDGER, "--out", "e.json")
    assert result.code == 6
    assert Path("e.json").read_text(encoding="utf-8") == "mine"


def test_a_forged_export_is_refused_and_nothing_is_spent(run: Run, made: Ledger) -> None:
    run("ledger", "init", "b.ledger", "--node", "clinic-b")
    before = Path("b.ledger").read_bytes()
    trees = trees_of(LEDGER)
    trees[1]["mechanism"]["steps"] = 1
    text = run("ledger", "export", LEDGER).out
    write_anew(LEDGER, trees)
    tree = json.loads(text)
    tree["lines"] = [line.decode().rstrip() for line in lines_of(LEDGER)]
    tree["head"] = json.loads(tree["lines"][-1])["hash"]
    Path("e.json").write_text(json.dumps(tree), encoding="utf-8")
    result = run("ledger", "import", "b.ledger", "e.json")
    assert result.code == 6
    assert "e.json, line 7: its signature is not that of the ledger's key" in result.err
    assert Path("b.ledger").read_bytes() == before


def test_a_signed_ledger_imports_with_its_key_and_anchors(run: Run, made: Ledger) -> None:
    run("ledger", "export", LEDGER, "--out", "e.json")
    run("ledger", "init", "b.ledger", "--node", "b", "--key", "b.pem", "--anchor", "b.anchor")
    assert run("ledger", "import", "b.ledger", "e.json").code == 6
    words = ("--key", "b.pem", "--anchor", "b.anchor")
    assert run("ledger", "import", "b.ledger", "e.json", *words).code == 0
    ledger = Ledger.open(Path("b.ledger"), key=Path("b.pem"), anchor=Path("b.anchor"))
    assert ledger.head in Path("b.anchor").read_text(encoding="utf-8")


# ---- all of them


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (("init", "x"), 2, "--node"),
        (("init", "nosuch/x", "--node", "a"), 6, "cannot create it"),
        (("init", "x", "--node", ""), 6, "node must not be empty"),
        (("show", "nosuch"), 6, "nosuch: there is no ledger"),
        (("show", "nosuch", "--delta", "0"), 2, "--delta 0"),
        (("show", "nosuch", "--delta", "nan"), 2, "--delta nan"),
        (("verify", "nosuch"), 6, "nosuch: there is no ledger"),
        (("verify", "nosuch", "--public-key", "short"), 6, "short: the key cannot be read"),
        (("export", "nosuch"), 6, "nosuch: there is no ledger"),
        (("import", "nosuch", "nosuch.json"), 6, "nosuch.json: it cannot be read"),
        (("anchor", "nosuch", "x"), 6, "nosuch: there is no ledger"),
    ],
)
def test_a_wrong_command_line_gives_one_clear_error(
    run: Run, words: tuple[str, ...], code: int, error: str
) -> None:
    result = run("ledger", *words)
    assert (result.code, result.out) == (code, "")
    assert result.err.startswith("error: ")
    assert error in result.err.splitlines()[0]
    assert list(Path().iterdir()) == []


def test_the_commands_load_nothing_heavy(made: Ledger) -> None:
    """Only the accountant's own libraries, and those only where there is something to tell."""
    code = (
        "import sys\n"
        "from fedfuse.cli import main\n"
        "main(sys.argv[1:])\n"
        "heavy = ('torch', 'flwr', 'opacus', 'rich', 'dp_accounting')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)\n"
    )

    def loaded(*words: object) -> str:
        command = [sys.executable, "-c", code, "ledger", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stderr.splitlines()[-1]

    assert loaded("verify", LEDGER) == "[]"
    assert loaded("export", LEDGER) == "[]"
    assert loaded("init", "new", "--node", "a") == "[]"
    assert loaded("show", "new") == "[]"
    assert loaded("show", LEDGER) == "['dp_accounting']"
