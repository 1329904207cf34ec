"""What one ledger spent is spent in the other too, once, and a forged export is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedfuse.errors import LedgerError
from fedfuse.privacy.ledger import Kind, Ledger, verify
from fedfuse.privacy.transfer import exported, imported
from tests.privacy.ledgers import (
    Tree,
    fill,
    lines_of,
    mechanism,
    spend,
    trees_of,
    write_anew,
)


def test_what_another_ledger_spent_is_spent_here_too(any_ledger: Ledger, tmp_path: Path) -> None:
    target = Ledger.create(tmp_path / "target", node="clinic-b")
    spend(target, "own", what=mechanism(1))
    entries = imported(exported(any_ledger.path), name="export")
    assert target.adopt(entries) == 3
    assert target.history("scans") == (mechanism(13),)
    assert [entry.kind for entry in target.entries()][2:] == [Kind.IMPORTED] * 3
    assert target.accounts()[0].open == 1  # what is imported waits for no commit
    assert target.adopt(entries) == 0
    assert Ledger.open(target.path).history("scans") == (mechanism(13),)
    with pytest.raises(LedgerError, match="answered before"):
        spend(target, "request-1")
    assert verify(target.path).holds


def test_what_was_imported_is_exported_again(any_ledger: Ledger, tmp_path: Path) -> None:
    second = Ledger.create(tmp_path / "second", node="b")
    third = Ledger.create(tmp_path / "third", node="c")
    second.adopt(imported(exported(any_ledger.path), name="export"))
    assert third.adopt(imported(exported(second.path), name="export")) == 3
    assert third.adopt(imported(exported(any_ledger.path), name="export")) == 0


def test_a_copy_that_went_apart_is_brought_home(path: Path, tmp_path: Path) -> None:
    ledger = Ledger.create(path, node="clinic-a")
    fill(ledger, 2)
    shutil.copy(path, tmp_path / "copy")
    spend(Ledger.open(tmp_path / "copy"), "there", what=mechanism(5))
    spend(ledger, "here", what=mechanism(7))
    assert ledger.adopt(imported(exported(tmp_path / "copy"), name="export")) == 1
    assert ledger.history("scans") == (mechanism(20),)


def test_other_work_under_the_same_request_is_not_taken_for_the_same(
    ledger: Ledger, tmp_path: Path
) -> None:
    """Two nodes may have been asked under one id: both spent."""
    other = Ledger.create(tmp_path / "other", node="b")
    spend(ledger, "r1", what=mechanism(4))
    spend(other, "r1", what=mechanism(5))
    assert ledger.adopt(imported(exported(other.path), name="export")) == 1
    assert ledger.history("scans") == (mechanism(9),)


def tampered(document: str, change: Callable[[Tree], object]) -> str:
    tree = json.loads(document)
    change(tree)
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda tree: tree["lines"].pop(), "its head is not that of its lines"),
        (lambda tree: tree["lines"].pop(2), "line 3: it does not follow"),
        (lambda tree: tree["lines"].clear(), "not even a first line"),
        (lambda tree: tree.update(head="0" * 64), "its head is not that of its lines"),
        (lambda tree: tree.update(public_key="0" * 64), "its head is not that of its lines"),
        (lambda tree: tree.update(signature="0" * 128), "its head is not that of its lines"),
        (lambda tree: tree.update(format="x"), "its head is not that of its lines"),
        (lambda tree: tree.update(extra="x"), "its head is not that of its lines"),
        (lambda tree: tree.pop("lines"), "it is no export"),
        (lambda tree: tree.update(lines=[1]), "it is no export"),
        (lambda tree: tree.update(lines=["é"]), "it is no export"),
        (
            lambda tree: tree["lines"].__setitem__(
                1, tree["lines"][1].replace('"steps":4', '"steps":1')
            ),
            "line 2: its hash does not fit",
        ),
    ],
)
def test_an_export_that_was_changed_is_refused(
    any_ledger: Ledger, change: Callable[[Tree], object], problem: str
) -> None:
    document = tampered(exported(any_ledger.path), change)
    with pytest.raises(LedgerError, match=problem):
        imported(document, name="export")


@pytest.mark.parametrize("text", ["", "x", "[]", "null", "{}", "[" * 100_000])
def test_what_is_no_export_is_refused(text: str) -> None:
    with pytest.raises(LedgerError, match="export: it is no export of a ledger"):
        imported(text, name="export")


def test_an_export_must_be_signed_by_the_key_asked_for(
    path: Path, key: Path, tmp_path: Path
) -> None:
    ledger = Ledger.create(path, node="clinic-a", key=key)
    fill(ledger)
    document = exported(path)
    assert imported(document, name="export", public_key=ledger.public_key)
    with pytest.raises(LedgerError, match="its key is"):
        imported(document, name="export", public_key="0" * 64)
    trees = trees_of(path)
    trees[1]["mechanism"]["steps"] = 1
    write_anew(path, trees)
    with pytest.raises(LedgerError, match="its signature is not that of the ledger's key"):
        exported(path)
    lines = [line.decode().rstrip("\n") for line in lines_of(path)]
    last = json.loads(lines[-1])
    forged = tampered(document, lambda tree: tree.update(lines=lines, head=last["hash"]))
    with pytest.raises(LedgerError, match="its signature is not that of the ledger's key"):
        imported(forged, name="export")


def test_an_export_leaves_out_what_is_unfinished(any_ledger: Ledger, path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"data')
    assert len(imported(exported(path), name="export")) == 6
