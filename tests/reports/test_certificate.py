"""A certificate holds where it is true, and shows where it is not."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedfuse.errors import CertificateError, PrivacyError
from fedfuse.privacy import second
from fedfuse.privacy.signing import SigningKey, verify
from fedfuse.privacy.spec import Unit
from fedfuse.reports import examination
from fedfuse.reports.budget import of_ledger, of_run
from fedfuse.reports.certificate import PURPOSE, Tree, certify, parse, signed_part, text
from fedfuse.reports.examination import Examination, examine
from tests.reports.books import STEP, rounds, write_ledger, write_run

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
DELTA = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, a ledger, and two keys."""
    folder = tmp_path_factory.mktemp("certified")
    SigningKey.create(folder / "key")
    SigningKey.create(folder / "other")
    write_run(folder / "run", rounds(3, "clinic-a", "clinic-b"))
    write_ledger(folder / "ledger", [("scans", STEP), ("notes", STEP), ("scans", STEP)])
    return folder


@pytest.fixture
def key(folder: Path) -> SigningKey:
    return SigningKey.load(folder / "key")


@pytest.fixture
def of_the_run(folder: Path, key: SigningKey) -> Tree:
    """A signed certificate of the run."""
    return certify([of_run(folder / "run")], now=NOW, key=key)


@pytest.fixture
def of_the_ledger(folder: Path, key: SigningKey) -> Tree:
    """A signed certificate of the ledger."""
    facts = of_ledger(folder / "ledger", delta=DELTA, allowed=8.0)
    return certify([facts], now=NOW, key=key)


def check(tree: Tree, **options: Any) -> Examination:
    """What is found of a certificate in a file."""
    return examine(text(tree).encode(), where="certificate.json", **options)


def resigned(tree: Tree, key: SigningKey) -> Tree:
    """The tree, signed by whoever changed it."""
    tree = tree | {"public_key": key.public}
    return tree | {"signature": key.sign(signed_part(tree), purpose=PURPOSE)}


def changed(tree: Tree, change: Callable[[Tree], object]) -> Tree:
    """A copy in which `change` was made to the first section."""
    tree = copy.deepcopy(tree)
    change(tree["sections"][0])
    return tree


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all plain values in a tree."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from leaves(inner, (*path, number))
    else:
        yield path


def another(value: Any) -> Any:
    """A value of the same type that is not `value`."""
    if isinstance(value, str):
        return value + "x"
    return 1.0 if value is None else value + type(value)(1)


# ---- signature


def test_a_certificate_holds(of_the_run: Tree, key: SigningKey) -> None:
    found = check(of_the_run, public_key=key.public)
    assert found.faults == []
    assert found.signed
    assert found.pinned
    assert [claim.account for claim in found.claims] == ["clinic-a", "clinic-b"]
    for claim in found.claims:
        assert claim.lower <= claim.epsilon <= 1.001 * claim.upper


def test_the_signature_covers_every_field(of_the_run: Tree, key: SigningKey) -> None:
    del of_the_run["sections"][0]["accounts"][1:]
    of_the_run = resigned(of_the_run, key)
    assert check(of_the_run).signed
    paths = [path for path in leaves(of_the_run) if path != ("signature",)]
    assert len(paths) > 100
    for path in paths:
        tree = copy.deepcopy(of_the_run)
        inner: Any = tree
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = another(inner[path[-1]])
        try:
            found = check(tree)
        except CertificateError:
            assert path in (("format",), ("version",)), path
            continue
        assert not found.signed, path
        assert any("signature" in fault for fault in found.faults), path


def test_the_signature_covers_every_byte_that_means_something(
    of_the_run: Tree, key: SigningKey
) -> None:
    del of_the_run["sections"][0]["accounts"][1:], of_the_run["sections"][0]["assumptions"][1:]
    tree = resigned(of_the_run, key)
    data = text(tree).encode()
    assert len(data) > 3000
    passed = 0
    for place in range(len(data)):
        for byte in {data[place] ^ 1, data[place] ^ 32}:
            forged = data[:place] + bytes([byte]) + data[place + 1 :]
            with suppress(CertificateError):
                read = parse(forged, where="certificate.json")
                # What reads the same is the same: 1e-05 and 1E-05, \u03B5 and \u03b5.
                passed += 1
                signature = read["signature"]
                signed = verify(read["public_key"], signed_part(read), signature, purpose=PURPOSE)
                assert read == tree or not signed, place
    assert passed > 1000


def test_a_field_cannot_be_added_or_taken_away(of_the_run: Tree) -> None:
    for change in (
        lambda section: section.update(more=1),
        lambda section: section.pop("assumptions"),
        lambda section: section["accounts"][0].pop("epsilon_rdp"),
        lambda section: section.update(delta="1e-5"),
        lambda section: section["accounts"][0]["releases"][0].update(steps=4.0),
        lambda section: section["accounts"][0]["releases"][0].update(steps=True),
    ):
        with pytest.raises(CertificateError, match="must"):
            check(changed(of_the_run, change))


def test_another_key_is_refused(folder: Path, of_the_run: Tree) -> None:
    other = SigningKey.load(folder / "other")
    assert check(of_the_run, public_key=other.public).faults
    forged = resigned(of_the_run, other)
    assert check(forged).faults == []  # whole, but by whom?
    assert any("not who signed" in note for note in check(forged).notes)
    assert not check(forged).pinned
    mine = SigningKey.load(folder / "key").public
    assert any("another key" in fault for fault in check(forged, public_key=mine).faults)


def test_a_signature_that_was_taken_off_shows(of_the_run: Tree, key: SigningKey) -> None:
    found = check(of_the_run | {"signature": ""})
    assert any("signature" in fault for fault in found.faults)
    bare = of_the_run | {"signature": "", "public_key": ""}
    assert any(note.startswith("UNSIGNED") for note in check(bare).notes)
    assert not check(bare).signed
    assert any("not signed" in fault for fault in check(bare, public_key=key.public).faults)


def test_a_signature_for_another_purpose_is_worth_nothing(
    of_the_run: Tree, key: SigningKey
) -> None:
    elsewhere = key.sign(signed_part(of_the_run), purpose="ledger line")
    assert not check(of_the_run | {"signature": elsewhere}).signed


def test_an_unsigned_certificate_says_so(folder: Path) -> None:
    found = check(certify([of_run(folder / "run")], now=NOW))
    assert found.faults == []
    assert not found.signed
    assert found.notes[0].startswith("UNSIGNED")


# ---- figures, by an attacker who signs what they like


@pytest.mark.parametrize("share", [0.5, 0.99, 0.998])
def test_an_understated_epsilon_is_caught(of_the_run: Tree, key: SigningKey, share: float) -> None:
    def understate(section: Tree) -> None:
        for account in section["accounts"]:
            account["epsilon"] *= share
        for one in section["statements"]:
            one["epsilon"] *= share

    found = check(resigned(changed(of_the_run, understate), key))
    assert sum("epsilon = " in fault and "at least" in fault for fault in found.faults) == 2


@pytest.mark.parametrize(
    ("field", "value"), [("noise_multiplier", 1.2), ("sample_rate", 0.3), ("steps", 15)]
)
def test_releases_that_cost_more_than_is_claimed_are_caught(
    of_the_run: Tree, key: SigningKey, field: str, value: float
) -> None:
    def more(section: Tree) -> None:
        section["accounts"][0]["releases"][0][field] = value

    assert any(
        "at least" in fault for fault in check(resigned(changed(of_the_run, more), key)).faults
    )


@pytest.mark.parametrize(
    ("field", "share"), [("epsilon_rdp", 0.8), ("gdp_mu", 0.99), ("profile", 0.99)]
)
def test_every_other_figure_is_derived_anew_too(
    of_the_run: Tree, key: SigningKey, field: str, share: float
) -> None:
    def understate(section: Tree) -> None:
        account = section["accounts"][0]
        if field == "profile":
            account["profile"] = [[e, d * share] for e, d in account["profile"]]
        else:
            account[field] *= share

    found = check(resigned(changed(of_the_run, understate), key))
    assert any("clinic-a" in fault and "claimed" in fault for fault in found.faults)


def test_a_claim_far_too_high_is_odd(of_the_run: Tree, key: SigningKey) -> None:
    def overstate(section: Tree) -> None:
        section["accounts"][1]["releases"][0]["steps"] = 4

    found = check(resigned(changed(of_the_run, overstate), key))
    assert any("odd" in note for note in found.notes)


@pytest.mark.parametrize(
    "change",
    [
        lambda section: section["statements"][0].update(epsilon=0.1),
        lambda section: section["statements"][0].update(role="model"),
        lambda section: section.update(statement="(0.01, 1e-05)-differential privacy."),
        lambda section: section.update(statements=[]),
        lambda section: section.update(neighbouring_relation="none"),
        lambda section: section["statements"][0].update(unit="subject"),
        lambda section: section.update(delta=0.5),
        lambda section: section.update(delta=2.0),
        lambda section: section["accounts"].append(section["accounts"][0]),
        lambda section: section["accounts"][0].update(releases=[]),
        lambda section: section["accounts"][0]["releases"][0].update(unit="node"),
        lambda section: section["accounts"][0]["releases"][0].update(noise_multiplier=-1.0),
        lambda section: section["accounts"][0]["releases"][0].update(noise_multiplier=1e-9),
        lambda section: section["accounts"][0]["releases"][0].update(steps=10**400),
        lambda section: section["accounts"][0]["releases"][0].update(lines=0),
        lambda section: section["accounts"][0].update(profile=[[1.0]]),
    ],
)
def test_parts_that_do_not_fit_together_are_faults(
    of_the_run: Tree, key: SigningKey, change: Callable[[Tree], object]
) -> None:
    assert check(resigned(changed(of_the_run, change), key)).faults


def test_an_empty_certificate_says_nothing(of_the_run: Tree, key: SigningKey) -> None:
    assert check(resigned(of_the_run | {"sections": []}, key)).faults


def test_what_did_not_hold_is_told_by_whoever_checks(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rounds(1, "a"), privacy__noise_seed="s", privacy__epsilon=0.1)
    notes = check(certify([of_run(run)], now=NOW)).notes
    assert any("not held: nobody can know or repeat the noise" in note for note in notes)
    assert any("more was spent than the 0.1 allowed" in note for note in notes)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"format": "fedfuse privacy certificate"}',
        b'{"format": "fedfuse privacy certificate", "version": 2}',
    ],
)
def test_what_is_no_certificate_is_told_in_one_line(data: bytes) -> None:
    with pytest.raises(CertificateError, match="not a certificate"):
        examine(data, where="certificate.json")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "null", '"4"'])
def test_numbers_are_numbers(of_the_run: Tree, number: str) -> None:
    data = text(of_the_run).replace('"delta": 1e-05', f'"delta": {number}')
    with pytest.raises(CertificateError):
        examine(data.encode(), where="certificate.json")


def test_a_field_that_is_there_twice_is_refused(of_the_run: Tree) -> None:
    data = text(of_the_run).replace('"delta": 1e-05', '"delta": 0.5, "delta": 1e-05')
    with pytest.raises(CertificateError, match="twice"):
        examine(data.encode(), where="certificate.json")


# ---- what cannot be certified


def test_a_run_without_a_promise_has_no_certificate(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [], privacy__unit="none")
    with pytest.raises(PrivacyError, match="NOT PRIVATE"):
        certify([of_run(run)], now=NOW)


def test_a_figure_that_is_not_finite_is_not_certified(folder: Path) -> None:
    facts = of_run(folder / "run")
    endless = dataclasses.replace(facts.accounts[0].figures, epsilon=float("inf"))
    account = dataclasses.replace(facts.accounts[0], figures=endless)
    with pytest.raises(PrivacyError, match="no finite epsilon"):
        certify([dataclasses.replace(facts, accounts=(account,))], now=NOW)


# ---- against a ledger


def test_a_ledger_bears_its_certificate_out(folder: Path, of_the_ledger: Tree) -> None:
    found = check(of_the_ledger, ledger=folder / "ledger")
    assert found.faults == []
    assert not any("came later" in note for note in found.notes)


def test_what_was_released_later_is_told(folder: Path, of_the_ledger: Tree, tmp_path: Path) -> None:
    later = tmp_path / "ledger"
    later.write_bytes((folder / "ledger").read_bytes())
    later.chmod(0o600)
    write_ledger(later, [("scans", STEP)])
    found = check(of_the_ledger, ledger=later)
    assert found.faults == []
    assert any("1 releases came later" in note for note in found.notes)


def _drop_a_data_set(section: Tree) -> None:
    section["accounts"] = [a for a in section["accounts"] if a["name"] == "scans"]


def _understate_steps(section: Tree) -> None:
    section["accounts"][0]["releases"][0]["steps"] -= 1


@pytest.mark.parametrize(
    "change",
    [
        _drop_a_data_set,
        _understate_steps,
        lambda section: section["accounts"][0].update(name="other"),
        lambda section: section["accounts"][0]["releases"][0].update(clip_norm=0.5),
        lambda section: section["ledgers"][0].update(head="0" * 64),
        lambda section: section["ledgers"][0].update(lines=3),
        lambda section: section["ledgers"][0].update(lines=300),
        lambda section: section["ledgers"][0].update(lines=-1),
        lambda section: section["ledgers"][0].update(node="clinic-z"),
        lambda section: section["ledgers"][0].update(id="0" * 32),
        lambda section: section.update(ledgers=[]),
    ],
)
def test_a_certificate_that_leaves_out_what_the_ledger_has_is_caught(
    folder: Path, of_the_ledger: Tree, key: SigningKey, change: Callable[[Tree], object]
) -> None:
    tree = resigned(changed(of_the_ledger, change), key)
    assert not any("ledger" in fault for fault in check(tree).faults)
    found = check(tree, ledger=folder / "ledger")
    assert any("ledger" in fault or "line" in fault for fault in found.faults)


def test_an_older_copy_of_the_ledger_does_not_do(
    folder: Path, of_the_ledger: Tree, tmp_path: Path
) -> None:
    lines = (folder / "ledger").read_bytes().splitlines(keepends=True)
    older = tmp_path / "ledger"
    older.write_bytes(b"".join(lines[:-1]))
    older.chmod(0o600)
    assert any("lost lines" in fault for fault in check(of_the_ledger, ledger=older).faults)


def test_a_ledger_that_was_changed_does_not_do(
    folder: Path, of_the_ledger: Tree, tmp_path: Path
) -> None:
    other = tmp_path / "ledger"
    data = (folder / "ledger").read_bytes()
    other.write_bytes(data.replace(b'"steps":4', b'"steps":1', 1))
    assert any("does not hold" in fault for fault in check(of_the_ledger, ledger=other).faults)


def test_a_run_is_held_against_its_nodes_ledger(
    of_the_run: Tree, folder: Path, tmp_path: Path
) -> None:
    write_ledger(tmp_path / "whole", [("scans", STEP)] * 3)
    assert check(of_the_run, ledger=tmp_path / "whole").faults == []
    write_ledger(tmp_path / "less", [("scans", STEP)] * 2)
    assert any("fewer" in fault for fault in check(of_the_run, ledger=tmp_path / "less").faults)
    write_ledger(tmp_path / "foreign", [("scans", STEP)] * 3, node="clinic-z")
    found = check(of_the_run, ledger=tmp_path / "foreign")
    assert any("nothing in it is about" in fault for fault in found.faults)


# ---- anywhere, at once


def test_a_check_needs_neither_torch_nor_an_accountant(
    of_the_run: Tree, of_the_ledger: Tree, folder: Path, tmp_path: Path
) -> None:
    tree = of_the_ledger | {"sections": of_the_run["sections"] + of_the_ledger["sections"]}
    path = tmp_path / "certificate.json"
    path.write_text(text(resigned(tree, SigningKey.load(folder / "key"))), encoding="utf-8")
    code = (
        "import sys\n"
        "for name in ('torch', 'dp_accounting', 'flwr', 'opacus', 'matplotlib'):\n"
        "    sys.modules[name] = None  # as if it were not installed\n"
        "from fedfuse.cli import main\n"
        f"code = main(['report', 'verify', {str(path)!r}, '--ledger', "
        f"{str(folder / 'ledger')!r}])\n"
        "heavy = ('pandas', 'jinja2', 'scipy.stats', 'safetensors', 'sklearn')\n"
        "print([name for name in heavy if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr


def test_equal_histories_are_derived_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", rounds(3, *(f"node-{n}" for n in range(50))))
    tree = certify([of_run(run)], now=NOW)
    asked = []
    real = second.bounds
    monkeypatch.setattr(second, "bounds", lambda *args: asked.append(args) or real(*args))
    examination._bounds.cache_clear()
    assert len(check(tree).claims) == 50
    assert len(asked) == 1


def test_a_unit_of_the_certificate_is_a_unit(of_the_run: Tree) -> None:
    units = {a["unit"] for s in of_the_run["sections"] for a in s["accounts"]}
    assert units <= {unit.value for unit in Unit}
    assert json.loads(text(of_the_run)) == of_the_run
